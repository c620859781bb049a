"""Several adapters in one call of a part: each segment as if it were alone."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ModelError
from cutlayer.model.adapter_slots import Segment
from cutlayer.model.adapters import Adapter, AdapterSettings, attach, base_only, use_segments
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.model.rows import Rows
from tests.tiny_models import FAMILIES, tiny_model
from tests.unit.model.test_adapters import stir

SETTINGS = AdapterSettings(rank=3, alpha=6.0, dropout=0.25)


def _trunk(tmp_path: Path, family: str = "llama") -> Trunk:

    folder = resolve_model(str(tiny_model(family, tmp_path)[0]), None)
    trunk = load_part(folder, Cut(1, 3), Part.TRUNK, "float32", "cpu")
    assert isinstance(trunk, Trunk)
    return trunk


def _adapters(trunk: Trunk, *settings: AdapterSettings) -> list[Adapter]:
    adapters = [attach(trunk, s, f"a{number}") for number, s in enumerate(settings)]
    for number, adapter in enumerate(adapters):
        stir(adapter, number)
    return adapters


def _random(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


def _run(trunk: Trunk, segments: Sequence[Segment], h_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    with use_segments(trunk, segments):
        y_ND: Tensor = trunk(h_ND, Rows(lengths=tuple(lengths)))
    return y_ND


def _gradients(adapters: Sequence[Adapter], y_ND: Tensor) -> list[list[Tensor]]:
    grads = torch.autograd.grad(
        (y_ND * _random(len(y_ND), 9)).sum(), [p for a in adapters for p in a.parameters()]
    )
    sizes = [len(adapter.parameters()) for adapter in adapters]
    bounds = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    return [list(grads[a:b]) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_segment_gives_the_bits_of_peft_s_own_dropout_and_update(
    family: str, tmp_path: Path
) -> None:
    trunk = _trunk(tmp_path, family)
    (adapter,) = _adapters(trunk, SETTINGS)
    h_ND, rows = _random(7), Rows(lengths=(4, 3))
    torch.manual_seed(5)
    for module in trunk.modules():
        module.training = type(module).__name__ == "Dropout" and module.p == 0.25
    expected = trunk(h_ND, rows)
    trunk.eval()
    segment = Segment(adapter="a0", num_tokens=7, dropout_seed=5)
    y_ND = _run(trunk, [segment], h_ND, rows.lengths)
    assert torch.equal(y_ND, expected)
    ours, theirs = _gradients([adapter], y_ND), _gradients([adapter], expected)
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    without = _run(trunk, [Segment(adapter="a0", num_tokens=7)], h_ND, rows.lengths)
    assert torch.equal(without, trunk(h_ND, rows))
    assert not torch.equal(without, y_ND)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 1, 3)], ids=["equal", "ragged"])
def test_each_segment_is_as_if_it_were_alone(
    family: str, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    trunk = _trunk(tmp_path, family)
    adapters = _adapters(trunk, *[SETTINGS] * 3)
    segments = [
        Segment(adapter=a.name, num_tokens=n, dropout_seed=10 + n)
        for a, n in zip(adapters, lengths, strict=True)
    ]
    h_ND = _random(sum(lengths))
    together = _run(trunk, segments, h_ND, lengths)
    grads = _gradients(adapters, together)
    begin = 0
    for index, (segment, adapter) in enumerate(zip(segments, adapters, strict=True)):
        end = begin + segment.num_tokens
        alone = _run(trunk, [segment], h_ND[begin:end], [segment.num_tokens])
        torch.testing.assert_close(together[begin:end], alone, rtol=1e-5, atol=1e-5)
        expected = torch.autograd.grad(
            (alone * _random(len(h_ND), 9)[begin:end]).sum(), adapter.parameters()
        )
        ours, theirs = (_flat(found) for found in (grads[index], expected))
        assert torch.linalg.vector_norm(ours - theirs) < 1e-5 * torch.linalg.vector_norm(theirs)
        begin = end


def test_other_ranks_targets_and_no_adapter_share_a_call(tmp_path: Path) -> None:
    trunk = _trunk(tmp_path)
    _adapters(trunk, SETTINGS, AdapterSettings(rank=2, targets=["q_proj"]))
    names, lengths = ["a0", None, "a1"], (3, 3, 3)
    segments = [Segment(adapter=name, num_tokens=3) for name in names]
    h_ND = _random(9)
    together = _run(trunk, segments, h_ND, lengths)
    for index, segment in enumerate(segments):
        own = slice(3 * index, 3 * index + 3)
        alone = _run(trunk, [segment], h_ND[own], [3])
        torch.testing.assert_close(together[own], alone, rtol=1e-5, atol=1e-5)
    with base_only(trunk):
        bare = trunk(h_ND[3:6], Rows(lengths=(3,)))
    torch.testing.assert_close(together[3:6], bare, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [(4, 4), (4, 2)], ids=["equal", "ragged"])
def test_bad_values_of_one_segment_reach_no_other_gradient(
    lengths: tuple[int, int], tmp_path: Path
) -> None:
    trunk = _trunk(tmp_path)
    adapters = _adapters(trunk, SETTINGS, SETTINGS)
    segments = [Segment(adapter=f"a{i}", num_tokens=n) for i, n in enumerate(lengths)]
    h_ND = _random(sum(lengths))
    clean = _gradients(adapters, _run(trunk, segments, h_ND, lengths))
    h_ND[:2] = float("nan")
    poisoned = _gradients(adapters, _run(trunk, segments, h_ND, lengths))
    assert all(torch.equal(a, b) for a, b in zip(clean[1], poisoned[1], strict=True))
    assert not any(grad.isfinite().all() for grad in poisoned[0])


def test_neighbours_of_one_adapter_are_one_segment(tmp_path: Path) -> None:
    trunk = _trunk(tmp_path)
    _adapters(trunk, SETTINGS)
    h_ND = _random(6)
    two = _run(trunk, [Segment(adapter="a0", num_tokens=3)] * 2, h_ND, [3, 3])
    one = _run(trunk, [Segment(adapter="a0", num_tokens=6)], h_ND, [3, 3])
    assert torch.equal(two, one)


def test_active_adapter_comes_back_after_a_call_that_failed(tmp_path: Path) -> None:
    trunk = _trunk(tmp_path)
    first, _ = _adapters(trunk, SETTINGS, SETTINGS)
    first.activate()
    h_ND = _random(4)
    expected = trunk(h_ND, Rows(lengths=(4,)))
    segments = [Segment(adapter=f"a{i}", num_tokens=3) for i in range(2)]
    with pytest.raises(ModelError, match="max_clients=1"):
        _run(trunk, segments, h_ND, [4])
    assert torch.equal(trunk(h_ND, Rows(lengths=(4,))), expected)


def test_segments_of_a_two_byte_base_give_two_bytes(tmp_path: Path) -> None:
    trunk = _trunk(tmp_path).to(torch.bfloat16)
    _adapters(trunk, SETTINGS, SETTINGS)
    segments = [Segment(adapter=f"a{i}", num_tokens=3, dropout_seed=i) for i in range(2)]
    assert _run(trunk, segments, _random(6).bfloat16(), [3, 3]).dtype == torch.bfloat16


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
