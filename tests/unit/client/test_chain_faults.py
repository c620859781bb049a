"""Hops that restart, lag behind, lose rows or misbehave: one hop's trouble stays exactly-once."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from cutlayer import Client, TrunkServer
from cutlayer.client.chain_trunk import ChainTrunk
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.session import Feed
from cutlayer.client.settings import SamplingSettings
from cutlayer.client.train import Report
from cutlayer.errors import BudgetExceeded, ConfigError, PeerMisbehaved, StepExpired, TransportError
from cutlayer.wire.channel import Channel
from cutlayer.wire.messages import Kind
from tests.chain_worlds import chain_settings, client_of_hops, hop_server, running_hops, six_blocks
from tests.hostile_trunks import Answer, LyingChannel
from tests.worlds import Table, loopback, running_server

NOISE: Table = {"mechanism": "gaussian", "scale": 0.02}
GREEDY = SamplingSettings(max_new_tokens=8)
PROMPTS = ([65, 66, 67, 68, 69], [90, 91], [100, 101, 102])
CUTS = ((1, 3), (3, 5))
NUM_STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return six_blocks(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("plain")
    settings = chain_settings(model, folder, train__save_every=2)
    with running_hops(model, folder) as servers, client_of_hops(servers, settings) as client:
        return _losses(client)


def _hops(client: Client) -> Sequence[RemoteTrunk]:
    assert isinstance(client.trunk, ChainTrunk)
    return client.trunk.hops


def _losses(client: Client, on_step: Callable[[Report], None] = lambda report: None) -> list[float]:
    return [record.loss for record in client.train(on_step).history]


def _move(client: Client, hop: int, server: TrunkServer) -> None:
    """As if the hop had been restarted: its connection is lost, and another process answers."""
    link = _hops(client)[hop]._link
    link._connect = lambda place: loopback(server)
    link._drop_channel()


@pytest.mark.parametrize("number", [0, 1])
def test_a_hop_that_restarts_takes_all_back_to_a_common_step(
    model: Path, tmp_path: Path, expected: list[float], number: int
) -> None:
    settings = chain_settings(model, tmp_path, train__save_every=2)
    with (
        ExitStack() as stack,
        running_hops(model, tmp_path) as servers,
        client_of_hops(servers, settings) as client,
    ):
        seen: list[int] = []

        def restart(report: Report) -> None:
            seen.append(report.record.step)
            if seen == [1, 2, 3]:
                servers[number].stop(grace_s=0)
                again = running_server(hop_server(model, tmp_path, *CUTS[number]))
                _move(client, number, stack.enter_context(again))

        assert _losses(client, restart) == pytest.approx(expected, rel=1e-6)
    assert seen == [1, 2, 3, 3, 4, 5, 6]


def test_a_hop_that_is_ahead_is_brought_back_to_the_newest_common_step(
    model: Path, tmp_path: Path, expected: list[float]
) -> None:
    settings = chain_settings(model, tmp_path, train__save_every=2)
    with running_hops(model, tmp_path) as servers:
        with client_of_hops(servers, settings) as client:
            second = _hops(client)[1]
            second.save = partial(_fails_at, 4, second.save)  # type: ignore[method-assign]
            # The first hop has saved step 4 by then; the second and the client have not.
            with pytest.raises(RuntimeError):
                client.train()
        assert _saved(tmp_path, client) == [4, 2]
        with client_of_hops(servers, settings) as client:
            assert _losses(client) == pytest.approx(expected, rel=1e-6)
        assert _saved(tmp_path, client) == [NUM_STEPS, NUM_STEPS]


def _saved(folder: Path, client: Client) -> list[int]:
    """The newest step that each hop has saved."""
    runs = [folder / f"server{lower}" / "runs" / "clinic" / client.run_id for lower, _ in CUTS]
    return [max(int(path.name[-8:]) for path in run.glob("step-*")) for run in runs]


def _fails_at(step: int, save: Callable[..., None], run_id: str, at: int, *rest: object) -> None:
    if at == step:
        raise RuntimeError("killed between the saves of two hops")
    save(run_id, at, *rest)


def test_a_hop_without_the_run_says_so_and_the_others_lose_nothing(
    model: Path, tmp_path: Path
) -> None:
    settings = chain_settings(model, tmp_path, train__save_every=2)
    with running_hops(model, tmp_path) as servers:
        with client_of_hops(servers, settings) as client:
            client.train()
        empty = hop_server(model, tmp_path / "empty", *CUTS[1])
        with (
            running_server(empty) as other,
            client_of_hops([servers[0], other], settings) as client,
            pytest.raises(StepExpired, match="none in common"),
        ):
            client.train()
    assert _saved(tmp_path, client)[0] == NUM_STEPS


@pytest.mark.parametrize("hop", [0, 1])
def test_a_hop_that_loses_its_rows_gets_the_same_bytes_and_no_other_hop_hears_of_it(
    model: Path, tmp_path: Path, hop: int
) -> None:
    noisy = {"privacy__mechanism": "gaussian", "privacy__scale": 0.02}
    settings = chain_settings(model, tmp_path, privacy=NOISE, **noisy)
    with (
        running_hops(model, tmp_path) as servers,
        running_server(hop_server(model, tmp_path / "second", *CUTS[hop])) as second,
        client_of_hops(servers, settings) as client,
    ):
        session = client.session([30, 30, 30])
        feed = [list(prompt) for prompt in PROMPTS]
        num_calls = []
        for step in range(8):
            if step == 5:
                _move(client, hop, second)
            sent = client.trunk.bytes_sent, _hops(client)[1 - hop].bytes_sent
            logits_BV = torch.cat(session.step([Feed(row=r, tokens=f) for r, f in enumerate(feed)]))
            num_calls.append(_hops(client)[1 - hop].bytes_sent - sent[1])
            feed = [[int(logits_V.argmax())] for logits_V in logits_BV]
        assert session.num_replays == 1
        # The other hop got one token of each row, as in every step.
        assert len({num_calls[step] for step in (3, 4, 5, 6)}) <= 2
        vectors = client.ledger.num_vectors
        fed = sum(len(prompt) for prompt in PROMPTS) + 7 * len(PROMPTS)
        assert vectors == {"generation": fed, "generation.hop2": fed}


def test_a_server_that_was_away_costs_no_second_noise_on_what_a_hop_has_had(
    model: Path, tmp_path: Path
) -> None:
    settings = chain_settings(model, tmp_path, privacy=NOISE)
    with running_hops(model, tmp_path) as servers, client_of_hops(servers, settings) as client:
        session = client.session([30])
        session.step([Feed(row=0, tokens=PROMPTS[0])])
        second = _hops(client)[1]
        link, connect = second._link, second._link._connect
        link._connect, link._reconnect_s = _nobody, 0.0
        link._drop_channel()
        with pytest.raises(TransportError):
            session.step([Feed(row=0, tokens=[5])])
        link._connect = connect
        session.step([Feed(row=0, tokens=[5])])
        num_vectors = client.ledger.num_vectors
    # Token 5 went to the first hop before the second was missed: it is there, and counted, once.
    assert num_vectors["generation"] == len(PROMPTS[0]) + 1
    assert num_vectors["generation.hop2"] <= len(PROMPTS[0]) + 2


def _nobody(place: str | None) -> Channel:
    raise TransportError("nobody there")


def test_what_leaves_for_each_hop_has_its_own_name_noise_and_promise(
    model: Path, tmp_path: Path
) -> None:
    clipped: Table = {"mechanism": "clipped_gaussian", "scale": 2.0, "clip": 30.0}
    clipped |= {"gradient_mechanism": "clipped_gaussian"}
    clipped |= {"gradient_scale": 2.0, "gradient_clip": 1.0}
    settings = chain_settings(model, tmp_path, privacy=clipped)
    with running_hops(model, tmp_path) as servers, client_of_hops(servers, settings) as client:
        client.train()
        names = set(client.ledger.num_vectors)
        report = client.privacy_report()
        assert set(client.ledger.rules) == {
            "none",
            "clipped_gaussian scale=2.0 clip=30.0",
            "clipped_gaussian scale=2.0 clip=1.0",
        }
    assert names == {"activations", "activations.hop2", "gradients", "gradients.hop2"}
    bounded = {p.boundary for p in report.promises if p.rdp.is_bounded}
    assert bounded == {"activations.hop2", "gradients.hop2"}
    assert not report.uncounted


def test_a_budget_in_epsilon_counts_every_hop_and_wants_a_rule_that_clips_at_each(
    model: Path, tmp_path: Path
) -> None:
    clipped = {"mechanism": "clipped_gaussian", "scale": 2.0, "clip": 30.0}
    own = {f"privacy__{name}": value for name, value in clipped.items()}
    own |= {"privacy__budget": {"run_epsilon": 1e6, "boundaries": ["activations"]}}
    settings = chain_settings(model, tmp_path, train__clip_norm=0, **own)
    with (
        running_hops(model, tmp_path) as servers,
        client_of_hops(servers, settings) as client,
        pytest.raises(ConfigError, match="privacy of hop 2"),
    ):
        client.train()
    assert not client.ledger.num_vectors
    settings = chain_settings(model, tmp_path, privacy=clipped, train__clip_norm=0, **own)
    with running_hops(model, tmp_path) as servers, client_of_hops(servers, settings) as client:
        client.train()


def test_every_hop_is_recomputed_and_one_that_lies_ends_all_sending(
    model: Path, tmp_path: Path
) -> None:
    settings = chain_settings(model, tmp_path, checks__spot_check_every=1)
    decodes = frozenset({Kind.DECODE})
    with running_hops(model, tmp_path) as servers:

        def lying() -> Channel:
            return LyingChannel(loopback(servers[1]), lambda a: a.honest_ND * 1.05, decodes)

        with Client(
            settings, connect=partial(loopback, servers[0]), connect_hops=[lying]
        ) as client:
            client.train()
            assert client.trunk.checks.num_spot_checks >= 2 * NUM_STEPS
            for _ in range(2):
                with pytest.raises(PeerMisbehaved, match=r"hop 2 \(127.0.0.1:2\) returned"):
                    client.score([PROMPTS[0]])
                sent = client.trunk.bytes_sent
            assert client.trunk.bytes_sent == sent


def test_what_stands_beside_results_names_every_hop(model: Path, tmp_path: Path) -> None:
    clipped: Table = {"mechanism": "clipped_gaussian", "scale": 2.0, "clip": 30.0}
    settings = chain_settings(model, tmp_path, privacy=clipped)
    with running_hops(model, tmp_path) as servers, client_of_hops(servers, settings) as client:
        assert client.guarantee.startswith("hop 1: no noise: none; hop 2: ")
        engine = client.engine()
        try:
            assert engine.status().guarantee == client.guarantee
        finally:
            engine.close()


def test_a_hop_above_frozen_blocks_is_given_one_noise_per_row_however_often_it_is_trained_on(
    model: Path, tmp_path: Path
) -> None:
    changes: Table = {"adapter__parts": ["tail"], "train__epochs": 3, "train__micro_batch_rows": 1}
    changes |= {"train__steps": None}
    settings = chain_settings(model, tmp_path, privacy=NOISE, **changes)
    with running_hops(model, tmp_path) as servers, client_of_hops(servers, settings) as client:
        client.train()
        vectors = client.ledger.num_vectors
    assert vectors["activations.hop2"] == vectors["activations"]


def test_two_hops_that_are_one_process_are_refused(model: Path, tmp_path: Path) -> None:
    settings = chain_settings(model, tmp_path)
    with (
        running_server(hop_server(model, tmp_path, 1, 5)) as server,
        client_of_hops([server, server], settings) as client,
        pytest.raises(ConfigError, match="hops 1 and 2 are one server"),
    ):
        client.score([PROMPTS[0]])


def test_whatever_a_hop_refuses_is_told_with_its_name(model: Path, tmp_path: Path) -> None:
    settings = chain_settings(model, tmp_path)
    with running_hops(model, tmp_path) as servers:
        narrow = hop_server(model, tmp_path / "narrow", 4, 5)
        with (
            running_server(narrow) as other,
            client_of_hops([servers[0], other], settings) as client,
            pytest.raises(ConfigError, match=r"hop 2 \(127.0.0.1:2\)"),
        ):
            client.train()
        with client_of_hops(servers, settings) as client:
            _hops(client)[1]._link._connect = _nobody
            _hops(client)[1]._link._reconnect_s = 0.0
            with pytest.raises(TransportError, match=r"hop 2 \(127.0.0.1:2\)"):
                client.train()


def test_a_conversation_pays_for_each_hop_though_the_first_has_only_replays(
    model: Path, tmp_path: Path
) -> None:
    own = {"privacy__mechanism": "gaussian", "privacy__scale": 0.02}
    limit = {"privacy__generation": {"max_session_vectors": 8}}
    settings = chain_settings(model, tmp_path, privacy=NOISE, **own, **limit)
    replies = itertools.count(1)

    def other_bits(answer: Answer) -> torch.Tensor:
        return answer.honest_ND * (1 + 1e-5 * next(replies))

    with running_hops(model, tmp_path) as servers:

        def restless() -> Channel:
            return LyingChannel(loopback(servers[0]), other_bits, frozenset({Kind.DECODE}))

        second = partial(loopback, servers[1])
        with Client(settings, connect=restless, connect_hops=[second]) as client:
            session = client.session([30])
            session.step([Feed(row=0, tokens=PROMPTS[0])])
            for _ in range(2):
                session.truncate(0, 0)
                with pytest.raises(BudgetExceeded, match=r"generation\.hop2"):
                    session.step([Feed(row=0, tokens=PROMPTS[0])])
            vectors = client.ledger.num_vectors
            assert vectors == {"generation": len(PROMPTS[0]), "generation.hop2": len(PROMPTS[0])}
            session.truncate(0, 0)
            session.begin_conversation(0)
            session.step([Feed(row=0, tokens=PROMPTS[0])])


@pytest.mark.parametrize("begins_as_chain", [True, False])
def test_a_run_of_a_chain_and_one_of_a_single_server_do_not_continue_each_other(
    model: Path, tmp_path: Path, begins_as_chain: bool
) -> None:
    chain = chain_settings(model, tmp_path, train__steps=1)
    single = chain.model_copy(update={"hops": ()})
    with (
        running_hops(model, tmp_path) as hops,
        running_server(hop_server(model, tmp_path / "single", 1, 5)) as server,
    ):
        begun, other = (chain, hops), (single, [server])
        if not begins_as_chain:
            begun, other = other, begun
        with client_of_hops(begun[1], begun[0]) as client:
            client.train()
        with (
            client_of_hops(other[1], other[0]) as client,
            pytest.raises(ConfigError, match="other hops"),
        ):
            client.train()
