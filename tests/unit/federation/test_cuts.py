"""Layouts and means of different cuts, as plainly as they can be written."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.errors import ProtocolError
from cutlayer.federation.aggregation import Update
from cutlayer.federation.cuts import (
    block_of,
    client_part,
    fill,
    num_holders,
    read_cuts,
    server_part,
    vector_layout,
    write_cuts,
)
from cutlayer.federation.pooling import mean_of_all, pooled_change, pooled_gradient
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.settings import SecureSettings
from cutlayer.federation.state import flatten, unflatten
from cutlayer.model.cut import Cut
from tests.unit.federation.cuts_world import CUTS, WHOLE

HEAD = {"base_model.model.lm_head.lora_A.weight": [2, 3]}


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("base_model.model.model.layers.12.self_attn.q_proj.lora_A.weight", 12),
        ("base_model.model.transformer.h.0.attn.c_attn.lora_B.weight", 0),
        ("base_model.model.model.layers.3.mlp.experts.5.w1.lora_A.weight", 3),
        ("base_model.model.lm_head.lora_A.weight", None),
    ],
)
def test_a_key_names_its_block(key: str, block: int | None) -> None:
    assert block_of(key) == block


def test_a_cut_parts_a_layout_between_client_and_server() -> None:
    whole = {**WHOLE, **HEAD}
    for cut in CUTS.values():
        own, rest = client_part(whole, cut), server_part(whole, cut)
        assert own | rest == whole
        assert not own.keys() & rest.keys()
        assert own.keys() >= HEAD.keys()


def test_equal_cuts_make_the_vector_of_one_cut() -> None:
    cut = Cut(2, 4)
    same = vector_layout(WHOLE, {"a": cut, "b": cut, "c": cut})
    assert same == client_part(WHOLE, cut)
    assert vector_layout(same, {}) == same


def test_a_vector_has_what_anybody_holds_and_says_who_holds_what_not_all_do() -> None:
    layout = vector_layout(WHOLE, CUTS)
    blocks = {block_of(key) for key in layout if ".layers." in key}
    assert blocks == {0, 1, 2, 4, 5}, "nobody has block 3 at its client"
    assert sorted(key for key in layout if key.startswith("share.")) == [
        "share.block.1",
        "share.block.2",
        "share.block.4",
    ]


def test_the_rarest_block_is_that_of_the_fewest() -> None:
    assert num_holders(CUTS["d"], range(6), CUTS) == (2, 1)
    assert num_holders(CUTS["a"], range(6), CUTS) == (0, 4)
    assert num_holders(Cut(0, 6), range(6), CUTS) is None


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_pooled_means_are_those_of_all_who_trained_a_key(seed: int) -> None:
    dice, count = random.Random(seed), 2 + seed % 5
    cuts = {}
    for number in range(count):
        lower = dice.randrange(5)
        cuts[f"m{number}"] = Cut(lower, dice.randrange(lower + 1, 7))
    torch.manual_seed(seed)
    weights = {name: dice.choice([0, 1, 7, 500]) for name in cuts}
    weights["m0"] = 9
    learnt = {name: {key: torch.randn(*shape) for key, shape in WHOLE.items()} for name in cuts}
    at_clients = [
        Update(member=n, weight=weights[n], state={k: learnt[n][k] for k in client_part(WHOLE, c)})
        for n, c in cuts.items()
    ]
    at_server = [
        Update(member=n, weight=weights[n], state={k: learnt[n][k] for k in server_part(WHOLE, c)})
        for n, c in cuts.items()
    ]
    total, layout = sum(weights.values()), vector_layout(WHOLE, cuts)
    vectors = [flatten(fill(u.state, layout, cuts[u.member]), layout).double() for u in at_clients]
    summed = sum(u.weight * v for u, v in zip(at_clients, vectors, strict=True))
    mean = unflatten(summed / total, layout)
    pooled = pooled_change(mean, total, at_server)
    scaled = [
        Update(member=u.member, weight=1, state={k: u.weight * x for k, x in u.state.items()})
        for u in at_server
    ]
    gradients = pooled_gradient(mean, total, scaled)
    in_the_open = pooled_gradient(mean_of_all(at_clients, total), total, scaled)
    for key in WHOLE:
        wanted = sum(weights[n] * learnt[n][key].double() for n in cuts) / total
        for found in (pooled[key], gradients[key], in_the_open[key]):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [-0.25, 1.5, float("nan")])
def test_a_share_that_honest_members_cannot_have_ends_the_sum(share: float) -> None:
    mean = {"layers.1.x": torch.ones(1), "share.block.1": torch.tensor([share])}
    with pytest.raises(ProtocolError, match="members of block 1 have"):
        pooled_change(mean, 10, [])


def test_cuts_travel_as_pairs() -> None:
    assert read_cuts(write_cuts(CUTS)) == CUTS
    for pair in ([1], [1, 2, 3], [3, 2], [2, 2], [-1, 2]):
        with pytest.raises(ProtocolError, match="cut of eve"):
            read_cuts({"eve": pair})


def test_signatures_bind_everybody_s_cut_and_without_cuts_what_they_ever_did() -> None:
    terms = {
        "federation": "x", "round": 1, "attempt": 1,
        "cohort": tuple(CUTS), "policy": SecureSettings(),
    }  # fmt: skip
    plain = Attempt(**terms).binding("keys", "a")
    assert Attempt(**terms, cuts={}).binding("keys", "a") == plain
    bound = Attempt(**terms, cuts=CUTS).binding("keys", "a")
    moved = Attempt(**terms, cuts={**CUTS, "d": Cut(2, 4)}).binding("keys", "a")
    assert len({plain, bound, moved}) == 3
    laid = {name: Attempt(**terms, cuts=CUTS, vector={name: [2]}).binding("keys") for name in "xy"}
    assert laid["x"] != laid["y"]
    assert Attempt(**terms, vector={"x": [2]}).binding("keys", "a") == plain
