"""Evidence and truth from recordings of real runs over loopback."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cutlayer import Client
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.observations import Recorded, check_model, read_evidence
from cutlayer.audit.truth import hidden_rows
from cutlayer.client.settings import ClientSettings, SamplingSettings
from cutlayer.client.truth_file import read_truth
from cutlayer.client.witness import truth_path
from cutlayer.data.template import Example
from cutlayer.errors import ConfigError, DataError, ProtocolError, SpecMismatch, StorageError
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Cut
from cutlayer.model.rows import pack
from cutlayer.privacy.mechanism import NoNoise
from cutlayer.wire import codec
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Forward, Kind
from cutlayer.wire.recorder import Recorder
from cutlayer.wire.recording import Direction, RecordingHeader, open_recording
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings, write_rows

PROMPTS = ["hello there", "hello where", "good day to you"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that trained, evaluated and generated."""

    model: Path
    recording: Path
    rows: dict[str, Example]
    replies: list[str]

    def read(self) -> Recorded:
        return read_evidence(open_recording(self.recording))

    def knowledge(self, cut: Cut = Cut(1, 3)) -> Knowledge:  # noqa: B008 - frozen
        rule = NoNoise()
        return Knowledge(folder=ModelFolder(self.model), cut=cut, rule=rule, gradient_rule=rule)


def settings_of(model: Path, folder: Path, **changes: object) -> ClientSettings:
    write_rows(folder / "validation.jsonl", 5)
    return client_settings(
        model,
        folder,
        run__record_file=str(folder / "r"),
        run__record_truth=True,
        data__validation=str(folder / "validation.jsonl"),
        train__micro_batch_rows=2,
        **changes,
    )


@pytest.fixture(scope="module", params=["raw", "int8"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    model = tiny_llama_folder(folder)
    settings = settings_of(model, folder, connection__codec=request.param)
    with running_server(server_settings(model, folder)) as server:
        with client_of(server, settings) as client:
            data = client.rows()
            client.train()
            replies = client.generate(PROMPTS, SamplingSettings(max_new_tokens=12))
        rows = {f"row{one.row_id}": one for one in [*data.train, *data.validation]}
        yield Run(model=model, recording=folder / "r", rows=rows, replies=replies)


def test_each_row_of_each_step_is_an_observation_with_all_that_followed(run: Run) -> None:
    seen = [one for one in run.read().evidence.observations if one.phase == "training"]
    assert len(seen) == 6 * 8
    assert {one.step for one in seen} == set(range(1, 7))
    for one in seen:
        shapes = {tuple(x.shape) for x in (one.h_LD, one.y_LD, one.gradient_LD) if x is not None}
        assert shapes == {tuple(one.h_LD.shape)}
        assert one.gradient_LD is not None
        assert one.input_gradient_LD is not None
        assert one.h_LD.dtype == torch.float32


def test_truth_finds_the_tokens_labels_and_private_places_of_each_row(run: Run) -> None:
    recorded = run.read()
    hidden = hidden_rows(recorded, read_truth(truth_path(run.recording)))
    assert sorted(hidden) == [one.number for one in recorded.evidence.observations]
    for seen in recorded.evidence.observations:
        truth = hidden[seen.number]
        assert len(truth.tokens) == len(seen.h_LD)
        if seen.phase != "generation":
            row = run.rows[truth.row_id]
            assert truth.tokens == tuple(row.tokens)
            assert truth.labels == tuple(row.labels)
            assert truth.private == tuple(row.is_private)
            assert truth.label_places()


def test_what_left_at_the_first_step_is_the_public_head_of_the_true_tokens(run: Run) -> None:
    recorded = run.read()
    hidden = hidden_rows(recorded, read_truth(truth_path(run.recording)))
    head, _ = run.knowledge().parts
    first = [one for one in recorded.evidence.observations if one.step == 1]
    for seen in first[:8]:
        with torch.no_grad():
            expected_LD = head(pack([hidden[seen.number].tokens]))
        assert torch.allclose(seen.h_LD, expected_LD, atol=0.05)


def test_evaluation_rows_have_no_gradient(run: Run) -> None:
    seen = [one for one in run.read().evidence.observations if one.phase == "evaluation"]
    assert len(seen) == 5
    assert all(one.gradient_LD is None and one.y_LD is not None for one in seen)


def test_a_row_of_generation_is_joined_over_its_calls(run: Run) -> None:
    recorded = run.read()
    hidden = hidden_rows(recorded, read_truth(truth_path(run.recording)))
    tokenizer = ModelFolder(run.model).tokenizer()
    seen = [one for one in recorded.evidence.observations if one.phase == "generation"]
    texts = [tokenizer.decode(hidden[one.number].tokens) for one in seen]
    for prompt, reply in zip(PROMPTS, run.replies, strict=True):
        # The last token was chosen and never fed.
        assert any(len(t) >= len(prompt) and (prompt + reply).startswith(t) for t in texts), prompt
    assert all(one.step == 0 and one.start == 0 for one in seen)


def test_a_recording_of_its_own_model_and_cut_is_accepted(run: Run) -> None:
    check_model(run.read(), run.knowledge())


def test_a_recording_of_another_model_or_cut_is_refused(run: Run, tmp_path: Path) -> None:
    recorded = run.read()
    with pytest.raises(SpecMismatch, match="cut 1:3, the attacker's is 1:2"):
        check_model(recorded, run.knowledge(Cut(1, 2)))
    other = replace(run.knowledge(), folder=ModelFolder(tiny_llama_folder(tmp_path, seed=9)))
    with pytest.raises(SpecMismatch, match=r"another model than tiny-llama.*block\.0"):
        check_model(recorded, other)


def test_the_truth_of_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    start = truth_path(run.recording).read_text().splitlines()[0]
    (tmp_path / "other").write_text(start + "\n")
    with pytest.raises(DataError, match="knows nothing"):
        hidden_rows(run.read(), read_truth(tmp_path / "other"))


def test_half_a_last_line_of_truth_is_passed_over_and_damage_is_named(
    run: Run, tmp_path: Path
) -> None:
    lines = truth_path(run.recording).read_bytes().splitlines(keepends=True)
    (tmp_path / "t").write_bytes(b"".join(lines)[:-9])
    assert len(list(read_truth(tmp_path / "t"))) == len(lines) - 2
    (tmp_path / "t").write_bytes(lines[0] + b'{"row": 7}\n')
    with pytest.raises(StorageError, match="line 2 is damaged"):
        list(read_truth(tmp_path / "t"))
    (tmp_path / "t").write_bytes(b"dear diary\n")
    with pytest.raises(StorageError, match="no truth file"):
        list(read_truth(tmp_path / "t"))


def test_noise_is_in_the_evidence_and_the_rules_are_told(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    noise = {"privacy__mechanism": "gaussian", "privacy__scale": 0.5}
    settings = settings_of(model, tmp_path, **noise)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        client.train()
    recorded = read_evidence(open_recording(tmp_path / "r"))
    assert recorded.header.rules["mechanism"] == "gaussian"
    assert recorded.header.rules["scale"] == 0.5
    hidden = hidden_rows(recorded, read_truth(tmp_path / "r.truth"))
    folder, rule = ModelFolder(model), NoNoise()
    known = Knowledge(folder=folder, cut=Cut(1, 3), rule=rule, gradient_rule=rule)
    seen = recorded.evidence.observations[0]
    with torch.no_grad():
        noise_LD = seen.h_LD - known.parts[0](pack([hidden[0].tokens]))
    assert float(noise_LD.abs().mean()) == pytest.approx(0.5, rel=0.15)


def test_speculation_leaves_no_guess_in_the_evidence(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = settings_of(
        model, tmp_path, generation__speculation={"kind": "lookup", "min_match": 1}
    )
    sampling = SamplingSettings(max_new_tokens=40)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        (tokens,) = client.generate_ids([[5, 6, 5, 6, 5, 6, 5]], sampling)
    recorded = read_evidence(open_recording(tmp_path / "r"))
    hidden = hidden_rows(recorded, read_truth(tmp_path / "r.truth"))
    (only,) = hidden.values()
    whole = (5, 6, 5, 6, 5, 6, 5, *tokens)
    assert only.tokens == whole[: len(only.tokens)]
    assert len(only.tokens) >= len(whole) - 1


def test_truth_without_a_recording_is_an_error(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"record_truth needs run\.record_file"):
        Client(client_settings(model, tmp_path, run__record_truth=True))


def made(tmp_path: Path, *frames: Frame) -> Path:
    header = RecordingHeader(software="test", spec={}, leaves={}, rules={})
    recorder = Recorder(tmp_path / "made", header)
    for frame in frames:
        recorder.write(Direction.SENT, 1, frame)
    recorder.close()
    return tmp_path / "made"


def test_a_recording_without_a_frame_of_use_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of its 0 frames"):
        read_evidence(open_recording(made(tmp_path)))


@pytest.mark.parametrize("lengths", [[2], [3, 3], []])
def test_tensors_that_do_not_fit_their_header_are_refused(
    tmp_path: Path, lengths: list[int]
) -> None:
    header = Forward(run_id="r", step=1, micro=0, lengths=lengths)
    frame = Frame(Kind.FORWARD, header, {"h": codec.encode(torch.ones(3, 4))})
    with pytest.raises(ProtocolError, match=r"shape \[3, 4\]"):
        read_evidence(open_recording(made(tmp_path, frame)))


def test_a_call_that_was_repeated_counts_once(tmp_path: Path) -> None:
    header = Forward(run_id="r", step=1, micro=0, lengths=[3])
    frame = Frame(Kind.FORWARD, header, {"h": codec.encode(torch.ones(3, 4))})
    other = Frame(Kind.FORWARD, header, {"h": codec.encode(torch.zeros(3, 4))})
    recorded = read_evidence(open_recording(made(tmp_path, frame, frame, other)))
    assert len(recorded.evidence.observations) == 2
