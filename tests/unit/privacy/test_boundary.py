"""The gate: what passes, what it leaves behind, and that nothing goes around it."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cutlayer.errors import ConfigError, StorageError
from cutlayer.model.rows import pack
from cutlayer.privacy.boundary import Boundary, BoundaryName, Released
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.run_privacy import RunPrivacy
from cutlayer.wire.codec import CODECS, Packed, decode, get_codec

MakeBoundary = Callable[..., Boundary]

ROWS = pack([[1, 2, 3], [4], [5, 6]])
IDS = ("row-0", "row-1", "row-2")
D = 40
"""Not a multiple of a codec's group."""


def wire_bytes(released: Released) -> list[bytes]:
    return [bytes(buffer) for buffer in released.packed.buffers]


@pytest.fixture
def x_ND() -> torch.Tensor:
    return torch.randn(ROWS.num_tokens, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("mechanism", ["none", "gaussian"])
def test_what_leaves_is_the_noised_tensor(
    make_boundary: MakeBoundary, x_ND: torch.Tensor, codec: str, mechanism: str
):
    noised_ND, released = make_boundary(mechanism, codec=codec).release(x_ND, ROWS, IDS, "base")
    expected = get_codec(codec).encode(noised_ND)
    assert wire_bytes(released) == [bytes(buffer) for buffer in expected.buffers]
    assert released.packed.shape == (6, D)
    assert noised_ND.equal(x_ND) == (mechanism == "none")


def test_the_layout_travels_and_the_tokens_do_not(make_boundary: MakeBoundary, x_ND: torch.Tensor):
    _, released = make_boundary().release(x_ND, ROWS, IDS, "base")
    assert released.rows.lengths == (3, 1, 2)
    assert released.rows.tokens_N is None
    assert released.boundary is BoundaryName.ACTIVATIONS


def test_the_noised_tensor_stays_in_the_graph(make_boundary: MakeBoundary, x_ND: torch.Tensor):
    x_ND.requires_grad_()
    noised_ND, _ = make_boundary(codec="fp8").release(x_ND * 2, ROWS, IDS, "base")
    upstream = torch.randn_like(noised_ND)
    noised_ND.backward(upstream)
    assert x_ND.grad is not None
    assert x_ND.grad.equal(2 * upstream)


def test_a_repeated_release_sends_the_same_bytes_and_pays_once(
    make_boundary: MakeBoundary, run: RunPrivacy, x_ND: torch.Tensor
):
    _, first = make_boundary().release(x_ND, ROWS, IDS, "base")
    _, again = make_boundary().release(x_ND.clone(), ROWS, IDS, "base")
    assert wire_bytes(first) == wire_bytes(again)
    assert (first.is_replay, again.is_replay) == (False, True)
    assert run.ledger.summary().num_vectors == {"activations": 6}
    assert run.ledger.summary().num_lines == 1


def test_a_row_is_noised_alike_in_any_batch(make_boundary: MakeBoundary, x_ND: torch.Tensor):
    boundary = make_boundary()
    together, _ = boundary.release(x_ND, ROWS, IDS, "base")
    alone, released = boundary.release(x_ND[4:], pack([[5, 6]]), IDS[2:], "base")
    assert alone.equal(together[4:])
    assert released.is_replay


def test_bf16_vectors_are_noised_in_float32_and_stay_bf16(
    make_boundary: MakeBoundary, x_ND: torch.Tensor
):
    x = x_ND.bfloat16()
    noised, released = make_boundary(scale=0.5).release(x, ROWS, IDS, "base")
    assert noised.dtype == torch.bfloat16
    assert decode(released.packed).equal(noised)


@pytest.mark.parametrize("change", ["row", "version", "start", "h", "scale", "boundary"])
def test_whatever_changes_brings_new_noise(
    make_boundary: MakeBoundary, x_ND: torch.Tensor, change: str
):
    old, _ = make_boundary().release(x_ND, ROWS, IDS, "base")
    h = x_ND.clone()
    if change == "h":
        h[:, 0] += 1e-3
    boundary = make_boundary(
        scale=0.1 if change == "scale" else 0.05,
        name=BoundaryName.GRADIENTS if change == "boundary" else BoundaryName.ACTIVATIONS,
    )
    ids = ("a", "b", "c") if change == "row" else IDS
    rows = pack([[1, 2, 3], [4], [5, 6]], [7, 7, 7]) if change == "start" else ROWS
    version = "step-1" if change == "version" else "base"
    new, released = boundary.release(h, rows, ids, version)
    a, b = (old - x_ND).flatten(), (new - h).flatten()
    assert not released.is_replay
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / len(a) ** 0.5


class WatchingCodec:
    """Encodes as raw and notes what the ledger file held at that moment."""

    def __init__(self, ledger_file: Path) -> None:
        self._ledger_file = ledger_file
        self.seen: list[str] = []

    def encode(self, x: torch.Tensor) -> Packed:
        self.seen = self._ledger_file.read_text().splitlines()
        return get_codec("raw").encode(x)

    def decode(self, packed: Packed, device: torch.device | str = "cpu") -> torch.Tensor:
        return decode(packed, device)

    def layout(self, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        return get_codec("raw").layout(shape, dtype)


def test_the_ledger_line_is_on_disk_before_anything_is_encoded(
    run: RunPrivacy, tmp_path: Path, x_ND: torch.Tensor
):
    codec = WatchingCodec(tmp_path / "run" / "ledger.jsonl")
    rule = MECHANISMS.make("none")
    boundary = Boundary(BoundaryName.ACTIVATIONS, rule, codec, run.ledger, run.secret)
    boundary.release(x_ND, ROWS, IDS, "base")
    (line,) = codec.seen
    assert json.loads(line)["record"]["mechanism"] == "none"
    assert json.loads(line)["record"]["vectors"] == 6


def test_the_ledger_names_no_row(make_boundary: MakeBoundary, x_ND: torch.Tensor, tmp_path: Path):
    make_boundary().release(x_ND, ROWS, ("patient-17", "patient-18", "patient-19"), "base")
    assert "patient" not in (tmp_path / "run" / "ledger.jsonl").read_text()


def test_nothing_leaves_when_the_ledger_cannot_be_written(
    make_boundary: MakeBoundary, run: RunPrivacy, x_ND: torch.Tensor
):
    boundary = make_boundary()
    run.ledger.close()
    with pytest.raises(StorageError):
        boundary.release(x_ND, ROWS, IDS, "base")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_never_leave(
    make_boundary: MakeBoundary, run: RunPrivacy, x_ND: torch.Tensor, bad: float
):
    x_ND[3, 1] = bad
    with pytest.raises(ConfigError, match=r"activations.*diverged.*lower the learning rate"):
        make_boundary().release(x_ND, ROWS, IDS, "base")
    assert run.ledger.summary().num_lines == 0


@pytest.mark.parametrize(
    ("ids", "version"),
    [
        (("row-0", "Mr Smith has a cough", "row-2"), "base"),
        (("row-0", "", "row-2"), "base"),
        (("row-0", "x" * 129, "row-2"), "base"),
        (IDS, "step 1"),
    ],
)
def test_a_name_that_may_be_text_is_refused_and_not_shown(
    make_boundary: MakeBoundary,
    run: RunPrivacy,
    x_ND: torch.Tensor,
    ids: tuple[str, ...],
    version: str,
):
    with pytest.raises(ConfigError, match="never name rows by text") as caught:
        make_boundary().release(x_ND, ROWS, ids, version)
    assert "Smith" not in str(caught.value)
    assert run.ledger.summary().num_lines == 0


@pytest.mark.parametrize("case", ["vectors", "ids", "rank", "double", "integers"])
def test_what_does_not_fit_is_refused_before_the_ledger(
    make_boundary: MakeBoundary, run: RunPrivacy, x_ND: torch.Tensor, case: str
):
    x = {
        "vectors": x_ND[:5],
        "rank": x_ND[None],
        "double": x_ND.double(),
        "integers": x_ND.to(torch.int64),
    }.get(case, x_ND)
    ids = IDS[:2] if case == "ids" else IDS
    with pytest.raises(ConfigError, match="activations: "):
        make_boundary().release(x, ROWS, ids, "base")
    assert run.ledger.summary().num_lines == 0


class TestNobodyElseMakesAReleased:
    @pytest.fixture
    def released(self, make_boundary: MakeBoundary, x_ND: torch.Tensor) -> Released:
        return make_boundary().release(x_ND, ROWS, IDS, "base")[1]

    def test_not_the_constructor(self, released: Released):
        fields = {f.name: getattr(released, f.name) for f in dataclasses.fields(released)}
        with pytest.raises(TypeError):
            Released(**fields)
        with pytest.raises(TypeError, match="only Boundary"):
            Released(**fields, gate=object())

    def test_not_replace(self, released: Released):
        with pytest.raises((TypeError, ValueError)):
            dataclasses.replace(released, is_replay=True)
        with pytest.raises(TypeError, match="only Boundary"):
            dataclasses.replace(released, gate=None)

    def test_not_a_change_of_its_fields(self, released: Released):
        with pytest.raises(dataclasses.FrozenInstanceError):
            released.packed = None

    @pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_not_a_copy(self, released: Released, way: Callable[[object], object]):
        with pytest.raises(TypeError, match="not copied"):
            way(released)

    def test_not_a_subclass(self):
        with pytest.raises(TypeError, match="no subclass"):
            type("Forged", (Released,), {"__post_init__": lambda self, gate: None})

    def test_and_its_values_are_not_printed(self, released: Released):
        assert "packed" not in repr(released)
        assert len(repr(released)) < 300


def test_the_guarantee_is_the_rules(make_boundary: MakeBoundary):
    assert make_boundary("gaussian").guarantee == "no guarantee (unclipped)"
    assert make_boundary("none").guarantee == "no noise: none"
