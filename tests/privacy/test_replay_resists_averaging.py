"""Averaging what was released: no gain over replays, the full gain over fresh noise (the control).

The attacker knows the mechanism and its scale, and sees decoded wire bytes alone.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Boundary, BoundaryName
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.run_privacy import RunPrivacy, open_run_privacy
from cutlayer.wire.codec import CODECS, decode, get_codec

D, LENGTH, EPOCHS = 96, 12, 25
ROWS = Rows(lengths=(LENGTH,))
RULES: dict[str, tuple[float, float | None]] = {
    "gaussian": (1.0, None),
    "clipped_gaussian": (0.1, 12.0),
    "matrix_gaussian": (0.03, 40.0),
    "metric_dp": (10.0, 12.0),
}
"""Scale and clip; the clips are above the norms of randn, so that the mean is the input itself."""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunPrivacy]:
    with open_run_privacy(tmp_path / "run", "run-1") as run:
        yield run


def boundary(
    run: RunPrivacy, codec: str = "raw", scale: float = 1.0, name: str = "gaussian"
) -> Boundary:
    rule = MECHANISMS.make(name, *((scale, None) if name == "gaussian" else RULES[name]))
    return Boundary(BoundaryName.ACTIVATIONS, rule, get_codec(codec), run.ledger, run.secret)


def error_of_mean(
    run: RunPrivacy, codec: str, h_ND: Tensor, versions: list[str], name: str = "gaussian"
) -> float:
    gate = boundary(run, codec, name=name)
    seen = [decode(gate.release(h_ND, ROWS, ["row-0"], v)[1].packed) for v in versions]
    return float((torch.stack(seen).mean(0) - h_ND).square().mean().sqrt())


def test_every_rule_with_noise_is_averaged_here():
    assert set(RULES) == set(MECHANISMS.names) - {"none"}


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_averaging_replays_gains_nothing(run: RunPrivacy, codec: str, name: str):
    h_ND = torch.randn(LENGTH, D)
    once = error_of_mean(run, codec, h_ND, ["base"], name)
    many = error_of_mean(run, codec, h_ND, ["base"] * EPOCHS, name)
    assert many == pytest.approx(once, rel=1e-5)
    assert run.ledger.summary().num_vectors == {"activations": LENGTH}


@pytest.mark.parametrize("name", sorted(RULES))
def test_control_averaging_new_versions_gains_and_is_counted(run: RunPrivacy, name: str):
    h_ND = torch.randn(LENGTH, D)
    once = error_of_mean(run, "raw", h_ND, ["base"], name)
    many = error_of_mean(run, "raw", h_ND, [f"step-{i}" for i in range(EPOCHS)], name)
    assert many == pytest.approx(once / math.sqrt(EPOCHS), rel=0.2)
    # What the attacker gained shows in the ledger, vector by vector.
    assert run.ledger.summary().num_vectors == {"activations": LENGTH * (EPOCHS + 1)}


def test_a_replay_after_a_restart_is_the_same_bytes(tmp_path: Path):
    h_ND = torch.randn(LENGTH, D)
    seen = []
    for _ in range(3):
        with open_run_privacy(tmp_path / "run", "run-1") as run:
            _, released = boundary(run).release(h_ND, ROWS, ["row-0"], "base")
            seen.append((bytes(released.packed.buffers[0]), released.is_replay))
            assert run.ledger.summary().num_lines == 1
    assert len({wire for wire, _ in seen}) == 1
    assert [is_replay for _, is_replay in seen] == [False, True, True]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    index=st.integers(0, LENGTH * D - 1),
    delta=st.floats(2**-10, 10),
    scale=st.sampled_from([0.02, 1.0]),
)
def test_a_changed_h_never_meets_old_noise(run: RunPrivacy, index: int, delta: float, scale: float):
    # Same row, same version: were the noise the same, the difference would give the change away.
    h_ND = torch.zeros(LENGTH, D)
    changed_ND = h_ND.clone()
    changed_ND.view(-1)[index] += delta
    gate = boundary(run, scale=scale)
    old = gate.release(h_ND, ROWS, ["row-0"], "base")[0]
    new = gate.release(changed_ND, ROWS, ["row-0"], "base")[0] - changed_ND
    pair = torch.stack([old.flatten(), new.flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5.5 / math.sqrt(LENGTH * D)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"gaussian"}))
def test_two_vectors_that_the_clip_makes_equal_meet_independent_noise(run: RunPrivacy, name: str):
    # The key is of what came in: h and 2 h are two releases, and are counted as two.
    h_ND = 10 * torch.randn(LENGTH, D)
    gate = boundary(run, name=name)
    one, two = (gate.release(k * h_ND, ROWS, ["row-0"], "base")[0] for k in (1, 2))
    shown = gate.mechanism.apply(h_ND, Silence())
    assert torch.allclose(shown, gate.mechanism.apply(2 * h_ND, Silence()), rtol=1e-5)
    pair = torch.stack([(one - shown).flatten(), (two - shown).flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5.5 / math.sqrt(LENGTH * D)
    assert run.ledger.summary().num_vectors == {"activations": 2 * LENGTH}


class Silence:
    """As good as no noise."""

    lengths = (LENGTH,)

    def standard_normal(self, num_vectors: int, width: int) -> Tensor:
        return torch.full((num_vectors, width), 1e-30)


def test_two_scales_over_one_h_do_not_give_it_away(run: RunPrivacy):
    # With shared normals z: (h + z) and (h + 2 z) give h = 2 a - b exactly.
    h_ND = torch.randn(LENGTH, D)
    a = boundary(run, scale=1.0).release(h_ND, ROWS, ["row-0"], "base")[0]
    b = boundary(run, scale=2.0).release(h_ND, ROWS, ["row-0"], "base")[0]
    assert float((2 * a - b - h_ND).square().mean().sqrt()) > 1.0


def test_two_runs_noise_the_same_row_independently(tmp_path: Path):
    h_ND = torch.zeros(LENGTH, D)
    noises = []
    for name in ("a", "b"):
        with open_run_privacy(tmp_path / name, "run-1") as run:
            noises.append(boundary(run).release(h_ND, ROWS, ["row-0"], "base")[0].flatten())
    assert abs(float(torch.corrcoef(torch.stack(noises))[0, 1])) < 5 / math.sqrt(LENGTH * D)
