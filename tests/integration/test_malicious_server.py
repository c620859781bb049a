"""A server that does not compute what it should is found out, and then gets nothing more."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cutlayer import Client, TrunkServer
from cutlayer.client.session import Feed
from cutlayer.client.settings import SamplingSettings
from cutlayer.errors import EXIT_CODES, ConfigError, PeerMisbehaved
from cutlayer.model.checkpoint import load_part
from cutlayer.model.partition import Cut, Part
from cutlayer.wire.messages import Kind
from tests.hostile_trunks import LIES, Answer, Lie, LyingChannel, features, quiet_features
from tests.tiny_models import tiny_llama_folder, tiny_model
from tests.worlds import client_settings, loopback, running_server, server_settings, write_rows

FORWARDS = frozenset({Kind.FORWARD})
BACKWARDS = frozenset({Kind.BACKWARD})
DECODES = frozenset({Kind.DECODE})
STEPS = 10
"""Three calls each: past the warm-up of the profile."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@contextmanager
def lied_to(
    model: Path,
    folder: Path,
    lie: Lie,
    kinds: frozenset[Kind],
    begin: int = 0,
    **changes: object,
) -> Iterator[tuple[Client, LyingChannel, TrunkServer]]:
    changes = {"train__steps": STEPS, "train__lr": 0.005, **changes}
    settings = client_settings(model, folder, **changes)
    with running_server(server_settings(model, folder)) as server:
        channel = LyingChannel(loopback(server), lie, kinds, begin)
        with Client(settings, connect=lambda: channel) as client:
            yield client, channel, server


def honest(answer: Answer) -> torch.Tensor:
    return answer.honest_ND


@pytest.mark.parametrize("name", LIES)
def test_a_crafted_output_in_training_is_found(model: Path, tmp_path: Path, name: str) -> None:
    with (
        lied_to(model, tmp_path, LIES[name](), FORWARDS, begin=20) as (client, _, _),
        pytest.raises(PeerMisbehaved, match=r"output of step [78], micro-batch"),
    ):
        client.train()


@pytest.mark.parametrize("name", ["zeros", "constant"])
def test_nonsense_is_found_in_the_first_reply_without_any_profile(
    model: Path, tmp_path: Path, name: str
) -> None:
    with (
        lied_to(model, tmp_path, LIES[name](), FORWARDS) as (client, _, _),
        pytest.raises(PeerMisbehaved, match="step 1, micro-batch 0"),
    ):
        client.train()


def test_a_hijacker_of_features_is_found_at_its_first_gradient(model: Path, tmp_path: Path) -> None:
    with (
        lied_to(model, tmp_path, features, BACKWARDS) as (client, _, _),
        pytest.raises(PeerMisbehaved, match="not the gradient of that loss"),
    ):
        client.train()


def test_a_hijacker_that_begins_late_and_quietly_loses_the_likeness(
    model: Path, tmp_path: Path
) -> None:
    with (
        lied_to(model, tmp_path, quiet_features, BACKWARDS, 32, train__steps=18) as world,
        pytest.raises(PeerMisbehaved, match="likeness to the gradient that was sent fell"),
    ):
        world[0].train()


def test_a_hijacker_that_is_quiet_from_the_start_is_found_by_recomputing(
    model: Path, tmp_path: Path
) -> None:
    with (
        lied_to(model, tmp_path, quiet_features, BACKWARDS, checks__spot_check_every=1) as world,
        pytest.raises(PeerMisbehaved, match="the gradient of step 1, micro-batch"),
    ):
        world[0].train()


def test_an_output_that_is_off_by_a_twentieth_is_found_by_recomputing(
    model: Path, tmp_path: Path
) -> None:
    def nudged(answer: Answer) -> torch.Tensor:
        return answer.honest_ND * 1.05

    with (
        lied_to(model, tmp_path, nudged, FORWARDS, 9, checks__spot_check_every=1) as world,
        pytest.raises(PeerMisbehaved, match="the output of step 4, micro-batch"),
    ):
        world[0].train()


def test_other_weights_at_the_server_are_found_at_the_first_step(
    model: Path, tmp_path: Path
) -> None:
    with lied_to(model, tmp_path, honest, FORWARDS, checks__spot_check_every=50) as world:
        client, _, server = world
        with torch.no_grad():
            for parameter in server._trunk.parameters():
                if not parameter.requires_grad:
                    parameter.mul_(1.03)
        with pytest.raises(PeerMisbehaved, match="the output of step 1, micro-batch"):
            client.train()


def test_an_output_of_older_weights_is_found_by_recomputing(model: Path, tmp_path: Path) -> None:
    trunk = load_part(model, Cut(1, 3), Part.TRUNK)

    @torch.no_grad()
    def of_step_0(answer: Answer) -> torch.Tensor:
        y_ND: torch.Tensor = trunk(answer.sent_ND, answer.rows)
        return y_ND

    changes = {"checks__spot_check_every": 1, "train__lr": 0.05}
    with (
        lied_to(model, tmp_path, of_step_0, FORWARDS, **changes) as (client, _, _),
        pytest.raises(PeerMisbehaved, match="the output of step 2, micro-batch"),
    ):
        client.train()


def test_an_adapter_that_leapt_is_found(model: Path, tmp_path: Path) -> None:
    with lied_to(model, tmp_path, honest, FORWARDS, checks__spot_check_every=1) as world:
        client = world[0]
        pull = client.trunk.pull_adapter

        def leapt(run_id: str, step: int) -> dict[str, torch.Tensor]:
            return {key: x + (0.5 if step == 3 else 0) for key, x in pull(run_id, step).items()}

        client.trunk.pull_adapter = leapt  # type: ignore[method-assign]
        with pytest.raises(PeerMisbehaved, match="more than AdamW can"):
            client.train()


def test_an_adapter_that_never_learns_is_found(model: Path, tmp_path: Path) -> None:
    with lied_to(model, tmp_path, honest, FORWARDS, checks__spot_check_every=1) as world:
        client = world[0]
        pull = client.trunk.pull_adapter
        client.trunk.pull_adapter = lambda run_id, step: pull(run_id, 0)  # type: ignore[method-assign]
        with pytest.raises(PeerMisbehaved, match="has not moved in 1 steps"):
            client.train()


@pytest.mark.parametrize("trains", [False, True])
def test_a_crafted_output_in_generation_is_found_by_recomputing(
    model: Path, tmp_path: Path, trains: bool
) -> None:
    def nudged(answer: Answer) -> torch.Tensor:
        return answer.honest_ND * 1.05

    settings = {"checks__spot_check_every": 1}
    with lied_to(model, tmp_path, nudged, DECODES, begin=3, **settings) as (client, _, _):
        if trains:
            client.train()
        session = client.session([64])
        for number in range(3):
            session.step([Feed(row=0, tokens=[65, 66, 67 + number])])
        with pytest.raises(PeerMisbehaved, match="a generation, row 0 from token 9"):
            session.step([Feed(row=0, tokens=[70, 71])])
        assert client.trunk.checks.num_spot_checks >= 3


def test_an_answer_that_was_given_before_is_found(model: Path, tmp_path: Path) -> None:
    first: list[torch.Tensor] = []

    def replayed(answer: Answer) -> torch.Tensor:
        first.append(answer.honest_ND)
        return first[0]

    with lied_to(model, tmp_path, replayed, DECODES) as (client, _, _):
        session = client.session([64])
        session.step([Feed(row=0, tokens=[65, 66])])
        with pytest.raises(PeerMisbehaved, match="a replay"):
            session.step([Feed(row=0, tokens=[67, 68])])


def test_nothing_is_sent_after_a_server_misbehaved(model: Path, tmp_path: Path) -> None:
    with lied_to(model, tmp_path, LIES["zeros"](), DECODES) as (client, channel, _):
        with pytest.raises(PeerMisbehaved) as caught:
            client.generate_ids([[65, 66, 67]], SamplingSettings(max_new_tokens=3))
        sent, lines = channel.bytes_sent, client.ledger.num_lines
        assert channel.is_closed
        for attempt in (
            client.train,
            lambda: client.generate_ids([[65, 66]], SamplingSettings(max_new_tokens=3)),
        ):
            with pytest.raises(PeerMisbehaved, match="nothing is sent"):
                attempt()
        assert channel.num_tensors == 1
        assert (channel.bytes_sent, client.ledger.num_lines) == (sent, lines)
    assert EXIT_CODES[type(caught.value)] == 15
    assert "docs/malicious-server.md" in str(caught.value)


def test_a_fault_is_on_disk_in_the_audit_log_at_once(model: Path, tmp_path: Path) -> None:
    with lied_to(model, tmp_path, LIES["constant"](), FORWARDS) as (client, _, _):
        with pytest.raises(PeerMisbehaved):
            client.train()
        lines = (tmp_path / "run" / "audit.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert any("PeerMisbehaved" in json.dumps(e) and '"step": 1' in json.dumps(e) for e in entries)


def test_an_honest_run_passes_every_check_and_learns_the_same(model: Path, tmp_path: Path) -> None:
    losses = []
    for number, every in enumerate((None, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        changes: dict[str, object] = {"checks__profile": every is not None}
        if every is not None:
            changes["checks__spot_check_every"] = every
        with lied_to(model, folder, honest, frozenset(), **changes) as (client, _, _):
            progress = client.train()
            losses.append([record.loss for record in progress.history])
            assert (client.trunk.checks.num_spot_checks > 0) == (every is not None)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("keep_share", [0.0, 0.5])
def test_an_honest_run_on_shorter_rows_passes_every_check(
    tmp_path: Path, keep_share: float
) -> None:
    model = tiny_llama_folder(tmp_path)
    rows = [
        {"text": word * (1 + index % 5), "topic": "XY"[index % 2]}
        for index, word in zip(range(24), itertools.cycle(["ab ", "cd "]), strict=False)
    ]
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes: dict[str, object] = {
        "data__train": str(path),
        "data__validation": str(path),
        "data__prompt": None,
        "data__prompt_template": "Text: {text}\nTopic: ",
        "data__append_eos": False,
        "privacy__withhold": "private",
        "privacy__keep_share": keep_share,
        "train__eval_every": 9,
        "checks__spot_check_every": 4,
    }
    with lied_to(model, tmp_path, honest, frozenset(), **changes) as (client, _, _):
        assert client.train().step == STEPS
        assert client.trunk.checks.num_spot_checks > 0


def test_a_run_that_is_checked_can_be_resumed(model: Path, tmp_path: Path) -> None:
    for steps in (5, 9):
        changes = {"train__steps": steps, "checks__spot_check_every": 1}
        with lied_to(model, tmp_path, honest, frozenset(), **changes) as (client, _, _):
            assert client.train().step == steps
            assert client.trunk.checks.num_spot_checks > 0


def test_steps_that_cannot_be_recomputed_are_refused_before_any_work(
    model: Path, tmp_path: Path
) -> None:
    changes = {"checks__spot_check_every": 1, "adapter__dropout": 0.1}
    settings = client_settings(model, tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"adapter\.dropout=0.1"):
        Client(settings)


@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8"])
def test_recomputing_allows_for_what_a_codec_rounds(tmp_path: Path, codec: str) -> None:
    folder, _ = tiny_model("qwen2", tmp_path)
    changes = {"checks__spot_check_every": 1, "connection__codec": codec, "train__steps": 4}
    with lied_to(folder, tmp_path, honest, frozenset(), **changes) as (client, _, _):
        assert client.train().step == 4
        assert len(client.generate_ids([[65, 66]], SamplingSettings(max_new_tokens=4))[0]) == 4


def test_rows_that_are_evaluated_and_then_trained_on_are_no_replay(
    model: Path, tmp_path: Path
) -> None:
    changes = {"connection__codec": "bf16", "train__eval_every": 1, "train__steps": 3}
    changes |= {"train__rows_per_step": 24, "train__micro_batch_rows": 1}
    (tmp_path / "same").mkdir()
    rows = str(write_rows(tmp_path / "same" / "rows.jsonl", num_rows=3))
    changes |= {"data__train": rows, "data__validation": rows}
    with lied_to(model, tmp_path, honest, frozenset(), **changes) as (client, _, _):
        assert client.train().step == 3
