"""Every strategy against the plain thing that it promises to equal."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.federation.aggregation import check_state
from cutlayer.federation.strategy import STRATEGIES, Update, get_strategy
from cutlayer.federation.strategy_settings import StrategySettings
from cutlayer.federation.trunk_pool import UpdateKind
from cutlayer.model.adapters import AdapterState

RANK, ROWS, COLUMNS = 2, 7, 5
A, B = "layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight"


def _state(seed: int, scale: float = 1.0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {
        A: scale * torch.randn(RANK, COLUMNS, generator=generator),
        B: scale * torch.randn(ROWS, RANK, generator=generator),
    }


def _updates(count: int, scale: float = 1.0) -> list[Update]:
    return [
        Update(member=f"m{i:02}", weight=10.0 + 7 * i, state=_state(100 + i, scale))
        for i in range(count)
    ]


def _plain_mean(updates: list[Update], key: str) -> Tensor:
    total = sum(update.weight for update in updates)
    return torch.stack([u.state[key].double() * (u.weight / total) for u in updates]).sum(0)


def _aggregate(kind: str, current: AdapterState, updates: list[Update]) -> AdapterState:
    return get_strategy(StrategySettings(kind=kind)).aggregate(current, updates)


@pytest.mark.parametrize("kind", ["fedavg", "fedavg_frozen_a", "fedprox"])
def test_fedavg_is_the_weighted_mean_of_trained_weights(kind: str) -> None:
    current, updates = _state(0), _updates(4)
    new = _aggregate(kind, current, updates)
    for key in (A, B):
        trained = sum(u.weight * (current[key] + u.state[key]).double() for u in updates)
        wanted = trained / sum(u.weight for u in updates)
        torch.testing.assert_close(new[key].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["fedavg", "fedprox", "trimmed_mean", "median"])
def test_a_federation_of_one_is_that_member(kind: str) -> None:
    current, (update,) = _state(0), _updates(1)
    new = _aggregate(kind, current, [update])
    for key in (A, B):
        torch.testing.assert_close(new[key], current[key] + update.state[key])


def test_a_key_is_averaged_over_those_who_have_it() -> None:
    current, updates = _state(0), _updates(3)
    del updates[1].state[B]
    new = _aggregate("fedavg", current, updates)
    wanted = current[B] + _plain_mean([updates[0], updates[2]], B).float()
    torch.testing.assert_close(new[B], wanted)
    assert _aggregate("fedavg", current, [Update(member="a", weight=0, state=_state(1))]) == current


def test_frozen_a_averages_products_exactly_and_fedavg_does_not() -> None:
    current, updates = _state(0), _updates(3)
    for update in updates:
        del update.state[A]
    new = _aggregate("fedavg_frozen_a", current, updates)
    products = [(current[B] + u.state[B]).double() @ current[A].double() for u in updates]
    total = sum(u.weight for u in updates)
    wanted = sum(u.weight / total * p for u, p in zip(updates, products, strict=True))
    assert torch.equal(new[A], current[A])
    torch.testing.assert_close((new[B] @ new[A]).double(), wanted, rtol=1e-5, atol=1e-5)
    both = _aggregate("fedavg", current, _updates(3))
    dense = _dense(current, _updates(3))
    assert (both[B].double() @ both[A].double() - dense).norm() > 0.1 * dense.norm()


def _dense(current: AdapterState, updates: list[Update]) -> Tensor:
    """The weighted mean of the products, as nobody could afford it."""
    total = sum(u.weight for u in updates)
    parts = (
        u.weight / total * (current[B] + u.state[B]).double() @ (current[A] + u.state[A]).double()
        for u in updates
    )
    return torch.stack(list(parts)).sum(0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_svd_is_the_best_approximation_of_the_dense_mean(count: int) -> None:
    current, updates = _state(0), _updates(count)
    new = _aggregate("svd", current, updates)
    dense = _dense(current, updates)
    u, values, vt = torch.linalg.svd(dense, full_matrices=False)
    best = u[:, :RANK] @ values[:RANK].diag() @ vt[:RANK]
    torch.testing.assert_close((new[B] @ new[A]).double(), best, rtol=1e-5, atol=1e-5)
    lost = math.sqrt(float(values[RANK:].square().sum()))
    assert float((new[B].double() @ new[A].double() - dense).norm()) == pytest.approx(
        lost, rel=1e-4, abs=1e-5
    )
    # Balanced: both factors carry the same singular values.
    torch.testing.assert_close(new[B].T @ new[B], new[A] @ new[A].T, rtol=1e-4, atol=1e-5)


def test_svd_of_untrained_factors_can_still_be_trained() -> None:
    current = {A: _state(0)[A], B: torch.zeros(ROWS, RANK)}
    still = {A: torch.zeros(RANK, COLUMNS), B: torch.zeros(ROWS, RANK)}
    updates = [Update(member=name, weight=1.0, state=still) for name in ("a", "b")]
    new = _aggregate("svd", current, updates)
    assert torch.equal(new[B], current[B])
    assert torch.equal(new[A], current[A])


def test_svd_of_more_rank_than_the_layer_has_keeps_the_product() -> None:
    generator = torch.Generator().manual_seed(3)
    current = {A: torch.randn(4, 3, generator=generator), B: torch.zeros(3, 4)}
    states = [{A: torch.zeros(4, 3), B: torch.randn(3, 4, generator=generator)} for _ in range(2)]
    updates = [Update(member=str(i), weight=1.0, state=s) for i, s in enumerate(states)]
    new = _aggregate("svd", current, updates)
    wanted = (states[0][B] + states[1][B]) @ current[A] / 2
    torch.testing.assert_close(new[B] @ new[A], wanted, rtol=1e-5, atol=1e-5)


def test_svd_refuses_one_factor_without_the_other() -> None:
    updates = _updates(2)
    del updates[1].state[B]
    with pytest.raises(ProtocolError, match="m01"):
        _aggregate("svd", _state(0), updates)


def test_fedadam_is_the_published_formula() -> None:
    chosen = StrategySettings(kind="fedadam", lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3)
    strategy, current = get_strategy(chosen), _state(0)
    w = current[A].double().numpy().copy()
    m, v = 0.0 * w, 0.0 * w + 1e-3**2
    for number in range(4):
        updates = _updates(3 + number, scale=0.1)
        current = strategy.aggregate(current, updates)
        d = _plain_mean(updates, A).numpy()
        m = 0.9 * m + 0.1 * d
        v = 0.99 * v + 0.01 * d**2
        w = w + 0.1 * m / (v**0.5 + 1e-3)
    torch.testing.assert_close(current[A].double(), torch.from_numpy(w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_every_step_is_centralised_training_on_the_union(clip_norm: float | None) -> None:
    """Three owners of unequal rows fit one linear layer; torch's own loop fits it on all rows."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(count, COLUMNS, generator=generator) for count in (3, 8, 5)]
    chosen = StrategySettings(
        kind="every_step", lr=0.05, beta2=0.99, weight_decay=0.1, clip_norm=clip_norm
    )
    strategy = get_strategy(chosen)
    central = nn.Parameter(_state(0)[A].clone())
    adamw = torch.optim.AdamW([central], lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    current = {A: central.detach().clone()}
    for _ in range(20):
        updates = [
            Update(member=str(i), weight=len(x), state={A: _mean_gradient(current[A], x)})
            for i, x in enumerate(rows)
        ]
        current = strategy.aggregate(current, updates)
        adamw.zero_grad()
        _loss_sum(central, torch.cat(rows)).div(16).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([central], clip_norm)
        adamw.step()
        torch.testing.assert_close(current[A], central.detach(), rtol=1e-5, atol=1e-6)


def _loss_sum(weight: Tensor, x: Tensor) -> Tensor:
    return (x @ weight.T).tanh().square().sum()


def _mean_gradient(weight: Tensor, x: Tensor) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    _loss_sum(parameter, x).div(len(x)).backward()
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("kind", sorted(STRATEGIES))
def test_members_in_any_order_give_the_same_bits(kind: str) -> None:
    updates = _updates(6)
    wanted = _aggregate(kind, _state(0), updates)
    for seed in range(5):
        shuffled = random.Random(seed).sample(updates, len(updates))
        new = _aggregate(kind, _state(0), shuffled)
        assert all(torch.equal(new[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", sorted(STRATEGIES))
def test_a_strategy_reloaded_from_its_state_goes_on_alike(kind: str) -> None:
    first, second = (get_strategy(StrategySettings(kind=kind)) for _ in range(2))
    current = first.aggregate(_state(0), _updates(3))
    second.load({key: value.clone() for key, value in first.state().items()})
    one = first.aggregate(current, _updates(4))
    two = second.aggregate(current, _updates(4))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(one[key].dtype == torch.float32 for key in one)


@pytest.mark.parametrize("kind", sorted(STRATEGIES))
def test_mean_and_single_updates_agree_or_the_mean_is_refused(kind: str) -> None:
    strategy, current, updates = (
        get_strategy(StrategySettings(kind=kind)),
        _state(0),
        _updates(3),
    )
    mean = {key: _plain_mean(updates, key).float() for key in (A, B)}
    if strategy.needs_single_updates:
        with pytest.raises(ConfigError, match="single updates"):
            strategy.apply(current, mean)
        return
    new = strategy.apply(current, mean)
    wanted = _aggregate(kind, current, updates)
    for key in (A, B):
        torch.testing.assert_close(new[key], wanted[key], rtol=1e-5, atol=1e-6)


def test_only_every_step_asks_for_gradients() -> None:
    kinds = [kind for kind in STRATEGIES if STRATEGIES.get(kind).sends is UpdateKind.GRADIENT]
    assert kinds == ["every_step"]


values = st.floats(min_value=-1024, max_value=1024, width=32, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(values, min_size=3, max_size=9),
    st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
    st.data(),
)
def test_a_minority_of_liars_cannot_leave_the_honest_range(
    honest: list[float], lie: float, data: st.DataObject
) -> None:
    liars = data.draw(st.integers(0, (len(honest) - 1) // 2))
    for kind in ("median", "trimmed_mean"):
        told = [*honest, *[lie] * liars]
        updates = [
            Update(member=f"{i:02}", weight=1.0, state={A: torch.tensor([value])})
            for i, value in enumerate(told)
        ]
        chosen = StrategySettings(kind=kind, trim=min(0.49, liars / len(told) + 1e-3))
        new = get_strategy(chosen).aggregate({A: torch.zeros(1)}, updates)
        slack = 1e-3
        assert min(honest) - slack <= float(new[A]) <= max(honest) + slack


def test_one_liar_moves_a_mean_anywhere() -> None:
    """The documented threat: mean-type strategies believe everyone."""
    updates = _updates(5)
    updates[0].state[A].fill_(1e9)
    assert float(_aggregate("fedavg", _state(0), updates)[A].abs().max()) > 1e7
    assert float(_aggregate("median", _state(0), updates)[A].abs().max()) < 10


@pytest.mark.parametrize("wrong", ["nan", "inf", "key", "extra", "shape", "dtype"])
def test_a_wrong_update_is_refused_by_its_members_name(wrong: str) -> None:
    layout = {key: list(value.shape) for key, value in _state(0).items()}
    state: dict[str, Tensor] = dict(_state(1))
    if wrong in ("nan", "inf"):
        state[A][0, 0] = float(wrong)
    if wrong == "key":
        del state[B]
    if wrong == "extra":
        state["layers.9.lora_A.weight"] = torch.zeros(1)
    if wrong == "shape":
        state[A] = state[A].T
    if wrong == "dtype":
        state[A] = state[A].half()
    with pytest.raises(ProtocolError, match="member hospital-b"):
        check_state("hospital-b", state, layout)
    check_state("hospital-b", _state(1), layout)


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"fedmean.*every_step, fedadam"):
        get_strategy(StrategySettings(kind="fedmean"))
