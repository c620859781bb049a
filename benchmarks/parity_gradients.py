"""Gradients of one client batch of K clients against the unsplit model's on the union of the rows.

One real server and K real clients over mutual TLS, in one process; float32, codec raw. It takes no
step and measures no time.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from peft import set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from benchmarks.parity_server import parity_client, parity_server
from benchmarks.split import make_kits
from benchmarks.subjects import ragged_rows, write_tiny_llama
from benchmarks.unsplit import new_peft_model
from cutlayer import Client
from cutlayer.client.settings import TrainSettings
from cutlayer.client.step import StepName
from cutlayer.data.batches import batch
from cutlayer.data.template import Example
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.server.local_pool import LocalPool
from cutlayer.wire.federation_messages import round_run_id

__all__ = ["Gradients", "compare_gradients"]

_VOCAB_SIZE = 256
_LENGTHS = ((12, 5), (9,), (7, 7, 3), (16, 2, 11))
"""Lengths of each client's rows: ragged, and not equally many."""
_FEDERATION = "parity"
_BATCHED: Mapping[str, Mapping[str, object]] = {}
"""Server settings with a window long enough for all clients' calls to meet."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What the clients and the trunk gave."""

    max_rel_diff: float
    """Over all tensors: largest absolute difference of the sum over clients from the unsplit
    model's gradient of the summed loss, over that gradient's largest absolute value."""
    updates: dict[str, AdapterState]
    """Each client's own gradients, of head and tail."""


def compare_gradients(folder: Path, num_clients: int) -> Gradients:
    """Run one client batch and the unsplit model on the same rows and adapter weights."""
    model = write_tiny_llama(folder / "parity-llama")
    rows = [
        ragged_rows(list(_LENGTHS[number % len(_LENGTHS)]), _VOCAB_SIZE, seed=number)
        for number in range(num_clients)
    ]
    start, whole = _unsplit(model, [row for own in rows for row in own])
    own, trunk = _split(folder, model, rows, start)
    sums = {
        key: sum(state[key] for state in [*own.values(), *trunk.values()] if key in state)
        for key in whole
    }
    diffs = [
        float((torch.as_tensor(sums[key]) - grad).abs().max() / grad.abs().max())
        for key, grad in whole.items()
    ]
    return Gradients(max_rel_diff=max(diffs), updates=own)


def _unsplit(model: Path, rows: Sequence[Sequence[int]]) -> tuple[AdapterState, AdapterState]:
    """Random adapter weights, and the gradient of the loss summed over all rows, one by one."""
    peft_model = new_peft_model(AutoModelForCausalLM.from_pretrained(model))
    names = {
        name.replace(".default", ""): parameter
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    generator = torch.Generator().manual_seed(0)
    # B is not zero, or all gradients of A were.
    start = {
        key: 0.1 * torch.randn(parameter.shape, generator=generator)
        for key, parameter in sorted(names.items())
    }
    set_peft_model_state_dict(peft_model, start)
    for row in rows:
        tokens = torch.tensor([row])
        loss = peft_model(tokens, labels=tokens).loss * (len(row) - 1)
        torch.autograd.backward(loss)
    gradients = {}
    for key, parameter in names.items():
        assert parameter.grad is not None
        gradients[key] = parameter.grad
    return start, gradients


def _split(
    folder: Path, model: Path, rows: Sequence[list[list[int]]], start: AdapterState
) -> tuple[dict[str, AdapterState], dict[str, AdapterState]]:
    """Gradients of each client's head and tail, and of the trunk for each client."""
    names = [f"owner{number}" for number in range(len(rows))]
    kits = make_kits(folder / "parity-kits", names)
    run_id = round_run_id(_FEDERATION, 1, 1)
    adapter = AdapterSettings(rank=8, alpha=16)
    with ExitStack() as stack:
        server = stack.enter_context(parity_server(model, folder / "state", kits.server, _BATCHED))
        pool = LocalPool(server._host, server._runner)
        trunk_start = {key: start[key] for key in pool.layout(adapter)}
        pool.begin_round(run_id, adapter, dict.fromkeys(names, trunk_start))
        clients = [
            stack.enter_context(
                parity_client(model, folder / name, server.port, kits.clients[name], {})
            )
            for name in names
        ]
        with ThreadPoolExecutor(len(names)) as threads:
            own = threads.map(
                _gradients, clients, rows, [run_id] * len(names), [start] * len(names)
            )
            own_by_name = dict(zip(names, own, strict=True))
        trunk: Mapping[str, TrunkUpdate] = pool.collect(run_id, names, UpdateKind.GRADIENT)
        return own_by_name, {name: dict(update.state) for name, update in trunk.items()}


def _gradients(
    client: Client, rows: list[list[int]], run_id: str, start: AdapterState
) -> AdapterState:
    """One client's gradients of head and tail; the trunk's stay at the server."""
    settings = TrainSettings(steps=1)
    parts, step = client._parts, client._split_step(settings)
    parts.start_from(start)
    parts.set_training(True)
    client.trunk.open_run(
        msgspec.structs.replace(
            client._open_run(settings), run_id=run_id, saved_steps=[], federation=_FEDERATION
        )
    )
    examples = [
        Example(tokens=row, labels=[-100, *row[1:]], row_id=index) for index, row in enumerate(rows)
    ]
    micro_batches = [batch(examples, [index]) for index in range(len(examples))]
    step.gradients(StepName(run_id=run_id, step=1, weights="start"), micro_batches)
    return {key: grad for state in parts.gradient_states().values() for key, grad in state.items()}
