"""What the tensor-parallel parity test does to a trunk, and the process that does it on a share.

It does not compare (`test_tensor_parallel_equals_whole`). Run by torchrun: rank 0 leads and writes
what it got, the others follow.

Shapes: N = tokens of all rows, D = hidden size.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cutlayer.model.adapter_slots import Segment
from cutlayer.model.adapters import (
    Adapter,
    AdapterSettings,
    attach,
    base_only,
    layout,
    use_segments,
)
from cutlayer.model.collectives import join_ranks
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer
from cutlayer.model.partition import Cut, Trunk
from cutlayer.model.rows import Rows
from cutlayer.model.tensor_parallel import ParallelTrunk
from cutlayer.server.tensor_parallel import follow, parallel_trunk
from tests.tiny_models import NUM_BLOCKS

Results = dict[str, Tensor]

CUT = Cut(1, NUM_BLOCKS - 1)
ROWS = Rows(lengths=(9, 3, 14, 1))
TIMEOUT_S = 60.0
PREFIX = {"kinds": ["lora", "prefix"], "prefix": {"num_virtual_tokens": 3}}


def draw(num_tokens: int, width: int, seed: int) -> Tensor:
    """Seeded hidden states or gradients [N, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, width, generator=generator)


def adapter_on(trunk: Trunk, name: str, seed: int, **changes: object) -> Adapter:
    """An adapter neither of whose factors is zero."""
    settings = AdapterSettings.model_validate({"rank": 3, "alpha": 5, "seed": seed, **changes})
    adapter = attach(trunk, settings, name)
    generator = torch.Generator().manual_seed(seed)
    shapes = layout(adapter)
    adapter.load({k: torch.randn(*s, generator=generator) * 0.2 for k, s in shapes.items()})
    return adapter


def gradients(adapter: Adapter, into: str) -> Results:
    """And forget them."""
    named = zip(adapter.trained_keys(), adapter.parameters(), strict=True)
    found = {f"{into}/{key}": p.grad.clone() for key, p in named if p.grad is not None}
    found[f"{into}/sq_norm"] = torch.tensor(adapter.sq_norm())
    for parameter in adapter.parameters():
        parameter.grad = None
    return found


def train_once(trunk: Trunk) -> Results:
    """The base model, then forward and backward of one adapter, twice."""
    h_ND = draw(ROWS.num_tokens, trunk.hidden_size, 1)
    with torch.no_grad():
        results = {"bare": trunk(h_ND, ROWS)}
    adapter = adapter_on(trunk, "one", 2)
    for turn in ("first", "second"):
        h_ND = h_ND.detach().clone().requires_grad_()
        y_ND = trunk(h_ND, ROWS)
        y_ND.backward(draw(ROWS.num_tokens, trunk.hidden_size, 3))
        assert h_ND.grad is not None
        results |= {f"{turn}/y": y_ND.detach(), f"{turn}/h": h_ND.grad}
        results |= gradients(adapter, f"{turn}/grads")
    with base_only(trunk), torch.no_grad():
        results["base_only"] = trunk(h_ND, ROWS)
    adapter.remove()
    return results


def decode(trunk: Trunk) -> Results:
    """Prefill of two rows, single tokens, a truncation, then one row alone."""
    adapter = adapter_on(trunk, "decoding", 4, **PREFIX)
    caches = [RowCache(len(trunk.block_range), 32) for _ in range(2)]
    results = {}
    calls = [((7, 2), (0, 0)), ((1, 1), (7, 2)), ((1, 1), (8, 3)), ((3, 1), (5, 1))]
    with torch.inference_mode():
        for index, (lengths, starts) in enumerate(calls):
            for cache, start in zip(caches, starts, strict=True):
                cache.truncate(start)
            h_ND = draw(sum(lengths), trunk.hidden_size, 10 + index)
            results[f"decode/{index}"] = trunk(h_ND, Rows(lengths=lengths, starts=starts), caches)
        h_ND = draw(2, trunk.hidden_size, 20)
        alone = Rows(lengths=(2,), starts=(caches[1].length,))
        results["decode/alone"] = trunk(h_ND, alone, caches[1:])
    adapter.remove()
    return results


def several_adapters(trunk: Trunk) -> Results:
    """Two clients in one call, one with dropout and frozen A; their graphs finish out of order."""
    one = adapter_on(trunk, "one", 5)
    two = adapter_on(
        trunk, "two", 6, dropout=0.4, train_a=False, targets=["q_proj", "down_proj"], **PREFIX
    )
    results = {}
    segments = [
        Segment(adapter="one", num_tokens=12),
        Segment(adapter="two", num_tokens=14, dropout_seed=8),
        Segment(adapter=None, num_tokens=1),
    ]
    h_ND = draw(ROWS.num_tokens, trunk.hidden_size, 7).requires_grad_()
    with use_segments(trunk, segments):
        joint_ND = trunk(h_ND, ROWS)
    equal = [Segment(adapter=name, num_tokens=6) for name in ("one", "two")]
    with use_segments(trunk, [equal[0], Segment(adapter="one", num_tokens=6, dropout_seed=1)]):
        equal_ND = trunk(draw(12, trunk.hidden_size, 9), Rows(lengths=(6, 6)))
    two.activate()
    alone_ND = trunk(draw(5, trunk.hidden_size, 9), Rows(lengths=(5,)))
    for name, y_ND in (("joint", joint_ND), ("alone", alone_ND), ("equal", equal_ND)):
        y_ND.backward(draw(y_ND.shape[0], trunk.hidden_size, 3))
        results |= {f"{name}/y": y_ND.detach()}
        results |= gradients(one, f"{name}/one") | gradients(two, f"{name}/two")
    assert h_ND.grad is not None
    results["joint/h"] = h_ND.grad
    one.remove()
    two.remove()
    return results


def asked_gradients(trunk: Trunk) -> Results:
    """Two clients' leaves in one call, differentiated as the server's engine does it."""
    clients = [adapter_on(trunk, f"client{index}", index) for index in (1, 2)]
    inputs = [draw(n, trunk.hidden_size, n).requires_grad_(n == 5) for n in (4, 5)]
    names = [Segment(adapter=c.name, num_tokens=n) for c, n in zip(clients, (4, 5), strict=True)]
    with use_segments(trunk, names):
        y_ND = trunk(torch.cat(inputs), Rows(lengths=(4, 2, 3)))
    leaves = [*clients[0].parameters(), *clients[1].parameters(), inputs[1]]
    for client in clients:
        # As when a run ends before its backward.
        client.remove()
    found = torch.autograd.grad(y_ND, leaves, draw(9, trunk.hidden_size, 3), allow_unused=True)
    return {f"asked/{index}": grad for index, grad in enumerate(found) if grad is not None}


def train_steps(trunk: Trunk) -> Results:
    """Optimizer steps with dropout as the server takes them; one forward is computed twice."""
    adapter = adapter_on(trunk, "trained", 11, dropout=0.3)
    optimizer = PartOptimizer(adapter, AdamWSettings())
    results = {}
    for step in range(3):
        h_ND = draw(ROWS.num_tokens, trunk.hidden_size, step).requires_grad_(step != 2)
        for _ in range(1 + step % 2):
            torch.manual_seed(step)
            trunk.train()
            y_ND = trunk(h_ND, ROWS)
            trunk.eval()
        y_ND.backward(draw(ROWS.num_tokens, trunk.hidden_size, 30 + step))
        results |= {f"steps/{step}/y": y_ND.detach()}
        results[f"steps/{step}/sq_norm"] = torch.tensor(optimizer.sq_norm())
        optimizer.step(scale=0.1, lr=0.01)
    results |= {f"steps/state/{key}": value for key, value in adapter.state().items()}
    results |= {f"steps/{key}": value.clone() for key, value in optimizer.state().items()}
    adapter.remove()
    return results


CASES: dict[str, tuple[Callable[[Trunk], Results], ...]] = {
    "llama": (train_once, decode, several_adapters, asked_gradients, train_steps),
    "phi3": (train_once, decode, train_steps),
}
"""What is done to a family's trunk; the others get `USUAL`."""
USUAL = (train_once, decode)


def exercise(trunk: Trunk, family: str) -> Results:
    """Everything, in order, on one trunk."""
    results: Results = {}
    for case in CASES.get(family, USUAL):
        results |= case(trunk)
    return {name: value.clone().contiguous() for name, value in results.items()}


def main(folder: Path, out: Path, families: list[str]) -> None:
    """One family after the other, with the same processes."""
    ranks = join_ranks(torch.device("cpu"), TIMEOUT_S)
    results: Results = {}
    for family in families:
        trunk = parallel_trunk(folder / f"tiny-{family}", CUT, ranks=ranks)
        if not ranks.is_leader:
            follow(trunk)
            continue
        found = exercise(trunk, family)
        results |= {f"{family}/{name}": value for name, value in found.items()}
        results[f"{family}/num_weights"] = torch.tensor(sum(p.numel() for p in trunk.parameters()))
        assert isinstance(trunk, ParallelTrunk)
        assert trunk.mirror is not None
        trunk.mirror.stop()
    if ranks.is_leader:
        save_file(results, out)
    ranks.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
