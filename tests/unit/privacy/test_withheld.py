"""Vectors that stay with the owner: nothing crosses, is counted or comes back in their place."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cutlayer.errors import BudgetExceeded, ConfigError
from cutlayer.model.rows import Rows, pack
from cutlayer.privacy.boundary import Boundary, BoundaryName
from cutlayer.privacy.budget import SessionBudget
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.run_privacy import RunPrivacy
from cutlayer.privacy.withheld import all_leave, leaving
from cutlayer.wire.codec import CODECS, decode, get_codec

MakeGate = Callable[..., Boundary]

ROWS = pack([[1, 2, 3], [4, 4], [5, 6]])
IDS = ("row-0", "row-1", "row-2")
STAYS = torch.tensor([True, False, True, True, False, False, False])
"""One vector of the first row leaves, one of the second, all of the third."""
RULES = {
    "none": (None, None),
    "gaussian": (0.5, None),
    "clipped_gaussian": (1.0, 2.0),
    "matrix_gaussian": (1.0, 2.0),
    "metric_dp": (20.0, 2.0),
}
D = 40


@pytest.fixture
def x_ND() -> Tensor:
    return torch.randn(ROWS.num_tokens, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gate(run: RunPrivacy) -> MakeGate:
    def make(mechanism: str = "gaussian", codec: str = "raw", withholds: bool = True) -> Boundary:
        rule = MECHANISMS.make(mechanism, *RULES[mechanism])
        name = BoundaryName.ACTIVATIONS
        return Boundary(name, rule, get_codec(codec), run.ledger, run.secret, withholds=withholds)

    return make


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("mechanism", sorted(RULES))
def test_rows_cross_without_what_stays(gate: MakeGate, x_ND: Tensor, codec: str, mechanism: str):
    noised_MD, released = gate(mechanism, codec).release(x_ND, ROWS, IDS, "base", withheld_N=STAYS)
    assert decode(released.packed).shape == noised_MD.shape == (4, D)
    assert released.rows == Rows(lengths=(1, 1, 2))


def test_without_noise_the_very_vectors_cross(gate: MakeGate, x_ND: Tensor):
    _, released = gate("none").release(x_ND, ROWS, IDS, "base", withheld_N=STAYS)
    assert decode(released.packed).equal(x_ND[~STAYS])


@pytest.mark.parametrize("mechanism", sorted(RULES))
def test_what_stays_has_no_influence_on_what_leaves(gate: MakeGate, x_ND: Tensor, mechanism: str):
    # Not through the clip of a row either, nor through the key of the noise.
    other_ND = torch.where(STAYS[:, None], 100 * torch.randn_like(x_ND), x_ND)
    one, first = gate(mechanism).release(x_ND, ROWS, IDS, "base", withheld_N=STAYS)
    two, again = gate(mechanism).release(other_ND, ROWS, IDS, "base", withheld_N=STAYS)
    assert one.equal(two)
    assert (first.is_replay, again.is_replay) == (False, True)


def test_only_what_leaves_is_counted(gate: MakeGate, run: RunPrivacy, x_ND: Tensor):
    gate().release(x_ND, ROWS, IDS, "base", withheld_N=STAYS)
    summary = run.ledger.summary()
    assert summary.num_vectors == {"activations": 4}
    assert summary.num_releases == 3
    gate().release(x_ND, ROWS, IDS, "base", withheld_N=STAYS)
    assert run.ledger.summary().num_lines == 1
    assert run.ledger.summary().num_replayed_vectors == 4


def test_a_row_of_which_everything_stays_is_refused(gate: MakeGate, run: RunPrivacy, x_ND: Tensor):
    stays = STAYS.clone()
    stays[3:5] = True
    with pytest.raises(ConfigError, match="row 1 of the call every vector is withheld"):
        gate().release(x_ND, ROWS, IDS, "base", withheld_N=stays)
    assert run.ledger.summary().num_lines == 0


def test_nothing_is_withheld_from_what_goes_on_from_a_cache(gate: MakeGate, x_ND: Tensor):
    later = Rows(lengths=ROWS.lengths, starts=(0, 4, 0))
    with pytest.raises(ConfigError, match="whole rows alone"):
        gate().release(x_ND, later, IDS, "base", withheld_N=STAYS)


@pytest.mark.parametrize("mechanism", sorted(RULES))
def test_no_gradient_comes_back_through_what_stays(gate: MakeGate, x_ND: Tensor, mechanism: str):
    x_ND.requires_grad_()
    noised_ND, _ = gate(mechanism).release(x_ND, ROWS, IDS, "base", withheld_N=STAYS)
    noised_ND.backward(torch.randn_like(noised_ND))
    assert x_ND.grad is not None
    assert not x_ND.grad[STAYS].any()
    assert bool(x_ND.grad[~STAYS].any(1).all())


@pytest.mark.parametrize("mechanism", sorted(RULES))
def test_a_mask_that_withholds_nothing_changes_nothing(
    gate: MakeGate, x_ND: Tensor, mechanism: str
):
    # The keys too: a run that sends whole rows replays those of a run from before masks.
    nothing = torch.zeros(ROWS.num_tokens, dtype=torch.bool)
    plain, _ = gate(mechanism, withholds=False).release(x_ND, ROWS, IDS, "base")
    masked, released = gate(mechanism).release(x_ND, ROWS, IDS, "base", withheld_N=nothing)
    assert masked.equal(plain)
    assert released.is_replay


def test_the_same_vectors_at_other_places_meet_other_noise(gate: MakeGate):
    h, rows = torch.zeros(3, 500), Rows(lengths=(3,))
    first, _ = gate().release(h, rows, ["a"], "base", withheld_N=torch.tensor([True, False, False]))
    second, released = gate().release(
        h, rows, ["a"], "base", withheld_N=torch.tensor([False, True, False])
    )
    assert not released.is_replay
    pair = torch.stack([first.flatten(), second.flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / 1000**0.5


def test_a_conversation_pays_for_what_leaves_alone(gate: MakeGate, x_ND: Tensor):
    budgets = [SessionBudget(1), SessionBudget(1), SessionBudget(2)]
    gate().release(x_ND, ROWS, IDS, "base", budgets, withheld_N=STAYS)
    assert [budget.num_spent for budget in budgets] == [1, 1, 2]
    with pytest.raises(BudgetExceeded):
        gate().release(x_ND, ROWS, IDS, "step1", budgets, withheld_N=STAYS)


def test_a_gate_that_withholds_lets_nothing_pass_without_a_mask(
    gate: MakeGate, run: RunPrivacy, x_ND: Tensor
):
    with pytest.raises(ConfigError, match=r'privacy.withhold = "private".*does not generate'):
        gate().release(x_ND, ROWS, IDS, "base")
    assert run.ledger.summary().num_lines == 0


@pytest.mark.parametrize(
    "mask", [STAYS[:-1], STAYS.float(), STAYS[:, None], torch.zeros(0, dtype=torch.bool)]
)
def test_a_mask_that_does_not_fit_is_refused(
    gate: MakeGate, run: RunPrivacy, x_ND: Tensor, mask: Tensor
):
    with pytest.raises(ConfigError, match="one bool per vector"):
        gate().release(x_ND, ROWS, IDS, "base", withheld_N=mask)
    assert run.ledger.summary().num_lines == 0


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=5))
def test_what_is_gathered_is_what_does_not_stay(mask: list[list[bool]]):
    mask = [[*row, False] for row in mask]
    rows = Rows(lengths=tuple(len(row) for row in mask))
    stays_N = torch.tensor([stays for row in mask for stays in row])
    x_ND = torch.arange(1.0, rows.num_tokens + 1)[:, None].expand(-1, 2)
    going = leaving(rows, stays_N)
    assert going.gather(x_ND).equal(x_ND[~stays_N])
    assert going.rows.lengths == tuple(row.count(False) for row in mask)
    assert all_leave(rows).gather(x_ND).equal(x_ND)
