"""What an enclave refuses, and how: a named error, nothing learnt, other owners undisturbed."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from cutlayer.enclave.owner import EnclaveClient
from cutlayer.enclave.server import EnclaveServer
from cutlayer.errors import (
    ConfigError,
    CutlayerError,
    PermissionRefused,
    ProtocolError,
    SessionLost,
    SpecMismatch,
    StepExpired,
)
from cutlayer.wire.channel import Channel
from cutlayer.wire.codec import Packed, encode
from cutlayer.wire.enclave_messages import (
    AskRows,
    DecodeLogits,
    LearnLogits,
    PutRows,
    RowsScored,
    ScoreRows,
)
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import Forward, Hello, Kind, OpenRun, OpenSession, RunOpened, Step
from tests.enclave_worlds import (
    enclave_settings,
    loopback_of,
    owner_of,
    owner_settings,
    running_enclave,
)
from tests.tiny_models import tiny_model
from tests.worlds import client_of, client_settings, running_server, server_settings

WIDTH, VOCABULARY = 32, 264
FRONT = "0" * 64
H = {"h": encode(torch.linspace(-1, 1, 5 * WIDTH).reshape(5, WIDTH))}
PUT = PutRows(
    row_set="mine",
    front=FRONT,
    row_ids=[3, 4],
    lengths=[3, 2],
    places=[[0, 1], [0]],
    targets=[[65, 66], [67]],
)
SCORE = ScoreRows(run_id="mine", step=1, micro=0, row_set="mine", front=FRONT, row_ids=[3, 4])
LEARN = LearnLogits(run_id="mine", step=1, micro=0, is_last=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[EnclaveServer]:
    with running_enclave(enclave_settings(model, tmp_path_factory.mktemp("enclave"))) as running:
        yield running


@pytest.fixture
def channel(server: EnclaveServer) -> Iterator[Channel]:
    """A greeted channel of a new owner, whose run is open at step 0."""
    opened = _greeted(server, f"clinic-{secrets.token_hex(4)}")
    _call(opened, Kind.OPEN_RUN, _run("mine"))
    yield opened
    opened.close()
    server.desk.rows.clear()


def _greeted(server: EnclaveServer, name: str) -> Channel:
    channel = loopback_of(server, name)
    served = server.model
    hello = Hello(
        nonce=secrets.token_hex(32),
        spec=served.spec.to_table(),
        leaves=dict(served.manifest.leaves),
    )
    _call(channel, Kind.HELLO, hello)
    return channel


def _run(run_id: str) -> OpenRun:
    return OpenRun(
        run_id=run_id,
        adapter={"rank": 2, "parts": ["tail"]},
        optimizer={},
        clip_norm=1.0,
        wants_input_grad=False,
        seed=0,
        saved_steps=[0],
    )


def _call(
    channel: Channel, kind: Kind, header: Header, tensors: dict[str, Packed] | None = None
) -> Frame:
    return channel.call(Frame(kind=kind, header=header, tensors=tensors or {})).result(60)


def _raw(x: torch.Tensor) -> Packed:
    """As a peer could write it: the codec itself refuses what is not finite."""
    data = (x.numpy().tobytes(),)
    return Packed(codec="raw", dtype="float32", shape=tuple(x.shape), buffers=data)


def _grad(value: float, num_places: int = 3) -> dict[str, Packed]:
    x = torch.full((num_places, VOCABULARY), value)
    return {"grad": _raw(x)}


def test_a_step_by_hand_counts_once(server: EnclaveServer, channel: Channel) -> None:
    _call(channel, Kind.PUT_ROWS, PUT, H)
    scored = _call(channel, Kind.SCORE_ROWS, SCORE)
    assert scored.tensors["logits"].shape == (3, VOCABULARY)
    first = _call(channel, Kind.LEARN_LOGITS, LEARN, _grad(0.1))
    again = _call(channel, Kind.LEARN_LOGITS, LEARN, _grad(0.1))
    assert first.header == again.header
    commit = Step(step=1, client_sq_norm=0.0, num_tokens=3, lr=0.1)
    second = msgspec.structs.replace(SCORE, step=2, commit=commit)
    one = _call(channel, Kind.SCORE_ROWS, second).tensors["logits"]
    two = _call(channel, Kind.SCORE_ROWS, second).tensors["logits"]
    assert bytes(one.buffers[0]) == bytes(two.buffers[0])
    assert bytes(one.buffers[0]) != bytes(scored.tensors["logits"].buffers[0])


def test_missing_rows_are_named(channel: Channel) -> None:
    _call(channel, Kind.PUT_ROWS, PUT, H)
    ask = AskRows(row_set="mine", front=FRONT, row_ids=[3, 9, 4, 11])
    assert _call(channel, Kind.ASK_ROWS, ask).header.row_ids == [9, 11]  # type: ignore[attr-defined]
    wrong = msgspec.structs.replace(SCORE, row_ids=[3, 9, 11])
    with pytest.raises(SessionLost, match="put them again") as caught:
        _call(channel, Kind.SCORE_ROWS, wrong)
    assert caught.value.lost_rows == (9, 11)


@pytest.mark.parametrize("change", [{"front": "1" * 64}, {"row_set": "other"}])
def test_rows_of_another_front_or_run_are_not_these(
    channel: Channel, change: dict[str, str]
) -> None:
    _call(channel, Kind.PUT_ROWS, PUT, H)
    with pytest.raises(SessionLost):
        _call(channel, Kind.SCORE_ROWS, msgspec.structs.replace(SCORE, **change))


def test_rows_of_one_owner_are_not_there_for_another(
    server: EnclaveServer, channel: Channel
) -> None:
    _call(channel, Kind.PUT_ROWS, PUT, H)
    other = _greeted(server, "another")
    _call(other, Kind.OPEN_RUN, _run("mine"))
    with pytest.raises(SessionLost):
        _call(other, Kind.SCORE_ROWS, SCORE)
    other.close()


def test_a_run_that_is_not_open_is_not_trained(channel: Channel) -> None:
    _call(channel, Kind.PUT_ROWS, PUT, H)
    with pytest.raises(StepExpired, match="not open here"):
        _call(channel, Kind.SCORE_ROWS, msgspec.structs.replace(SCORE, run_id="none"))


def test_a_gradient_without_its_rows_expires(channel: Channel) -> None:
    with pytest.raises(StepExpired, match="no micro-batch 7"):
        _call(channel, Kind.LEARN_LOGITS, msgspec.structs.replace(LEARN, micro=7), _grad(0.1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(channel: Channel, value: float) -> None:
    _call(channel, Kind.PUT_ROWS, PUT, H)
    _call(channel, Kind.SCORE_ROWS, SCORE)
    with pytest.raises(ProtocolError, match="NaN or infinite"):
        _call(channel, Kind.LEARN_LOGITS, LEARN, _grad(value))
    learnt = _call(channel, Kind.LEARN_LOGITS, LEARN, _grad(0.1)).header
    assert learnt.sq_norm > 0  # type: ignore[attr-defined]


def test_activations_that_are_not_finite_are_refused(channel: Channel) -> None:
    x = torch.full((5, WIDTH), float("nan"))
    h = {"h": _raw(x)}
    with pytest.raises(ProtocolError, match="NaN"):
        _call(channel, Kind.PUT_ROWS, PUT, h)


@pytest.mark.parametrize("num_places", [2, 4])
def test_a_gradient_of_another_shape_is_refused(channel: Channel, num_places: int) -> None:
    _call(channel, Kind.PUT_ROWS, PUT, H)
    _call(channel, Kind.SCORE_ROWS, SCORE)
    with pytest.raises(ProtocolError, match="gradient of shape"):
        _call(channel, Kind.LEARN_LOGITS, LEARN, _grad(0.1, num_places))
    with pytest.raises(ProtocolError, match="gradient of shape None"):
        _call(channel, Kind.LEARN_LOGITS, LEARN)


@pytest.mark.parametrize(
    "change",
    [
        {"row_ids": [3]},
        {"row_ids": [3, 3]},
        {"row_ids": [-1, 4]},
        {"lengths": [3, 1]},
        {"lengths": [5, 0]},
        {"places": [[1, 0], [0]]},
        {"places": [[0, 2], [0]]},
        {"places": [[-1, 1], [0]]},
        {"targets": [[65], [67]]},
        {"targets": [[65, 66]]},
        {"targets": [[65, 66], [VOCABULARY]]},
        {"targets": [[65, -1], [67]]},
        {"row_set": "../up"},
        {"front": "abc"},
    ],
    ids=str,
)
def test_rows_that_contradict_themselves_are_refused(
    channel: Channel, change: dict[str, object]
) -> None:
    with pytest.raises(ProtocolError):
        _call(channel, Kind.PUT_ROWS, msgspec.structs.replace(PUT, **change), H)
    with pytest.raises(SessionLost):
        _call(channel, Kind.SCORE_ROWS, SCORE)


def test_a_loss_without_labels_is_refused(channel: Channel) -> None:
    _call(channel, Kind.PUT_ROWS, msgspec.structs.replace(PUT, targets=[]), H)
    with pytest.raises(ProtocolError, match="the labels did not come"):
        _call(channel, Kind.SCORE_ROWS, msgspec.structs.replace(SCORE, has_loss_inside=True))


def test_a_loss_inside_counts_once(channel: Channel) -> None:
    _call(channel, Kind.PUT_ROWS, PUT, H)
    score = msgspec.structs.replace(SCORE, has_loss_inside=True, is_last=True)
    first, again = (_call(channel, Kind.SCORE_ROWS, score) for _ in range(2))
    assert first.header == again.header
    assert isinstance(first.header, RowsScored)
    assert first.header.loss_sum is not None
    assert not first.tensors


def test_a_micro_batch_without_scored_places_is_a_step_too(channel: Channel) -> None:
    put = msgspec.structs.replace(PUT, places=[[], []], targets=[])
    _call(channel, Kind.PUT_ROWS, put, H)
    assert not _call(channel, Kind.SCORE_ROWS, SCORE).tensors
    with pytest.raises(ProtocolError, match="gradient of shape"):
        _call(channel, Kind.LEARN_LOGITS, LEARN, _grad(0.1, 1))
    assert _call(channel, Kind.LEARN_LOGITS, LEARN).header.sq_norm == 0  # type: ignore[attr-defined]


def test_an_owner_that_stops_amid_a_step_may_come_back(server: EnclaveServer) -> None:
    run = _run("stops")
    score = msgspec.structs.replace(SCORE, run_id="stops")
    channel = _greeted(server, "stopper")
    _call(channel, Kind.OPEN_RUN, run)
    _call(channel, Kind.PUT_ROWS, PUT, H)
    whole = _call(channel, Kind.SCORE_ROWS, score).tensors["logits"]
    channel.close()
    channel = _greeted(server, "stopper")
    opened = _call(channel, Kind.OPEN_RUN, run).header
    assert isinstance(opened, RunOpened)
    assert opened.step == 0
    learn = msgspec.structs.replace(LEARN, run_id="stops")
    with pytest.raises((StepExpired, ProtocolError)):
        _call(channel, Kind.LEARN_LOGITS, learn, _grad(0.1))
    again = _call(channel, Kind.SCORE_ROWS, score).tensors["logits"]
    assert bytes(whole.buffers[0]) == bytes(again.buffers[0])
    assert _call(channel, Kind.LEARN_LOGITS, learn, _grad(0.1)).kind is Kind.LOGITS_LEARNT
    channel.close()


def test_a_trunks_calls_are_refused(channel: Channel) -> None:
    forward = Forward(run_id="mine", step=1, micro=0, lengths=[3, 2])
    with pytest.raises(ProtocolError, match="this is an enclave"):
        _call(channel, Kind.FORWARD, forward, H)


@pytest.mark.parametrize("wanted", [[1, 0], [1], [4, 0], [-1, 0]])
def test_logits_are_wanted_of_new_tokens_only(channel: Channel, wanted: list[int]) -> None:
    opened = _call(channel, Kind.OPEN_SESSION, OpenSession(max_lengths=[9, 9], run_id=None)).header
    decode = DecodeLogits(
        session_id=opened.session_id,  # type: ignore[attr-defined]
        rows=[0, 1],
        lengths=[3, 2],
        positions=[0, 0],
        max_lengths=[],
        num_logits=wanted,
    )
    if wanted == [1, 0]:
        assert _call(channel, Kind.DECODE_LOGITS, decode, H).tensors["logits"].shape[0] == 1
        return
    with pytest.raises(ProtocolError, match="num_logits"):
        _call(channel, Kind.DECODE_LOGITS, decode, H)


def test_logits_that_no_frame_could_hold_are_not_computed(tmp_path: Path, model: Path) -> None:
    listen = {"address": "127.0.0.1:0", "plaintext": True, "max_frame_bytes": 4096}
    with running_enclave(enclave_settings(model, tmp_path, listen=listen)) as server:
        channel = _greeted(server, "greedy")
        _call(channel, Kind.OPEN_RUN, _run("mine"))
        _call(channel, Kind.PUT_ROWS, PUT, H)
        many = msgspec.structs.replace(SCORE, row_ids=[3] * 8)
        with pytest.raises(ProtocolError, match=r"16 places are 4224 values.*frames hold 4096"):
            _call(channel, Kind.SCORE_ROWS, many)
        inside = msgspec.structs.replace(many, has_loss_inside=True, is_last=True)
        assert _call(channel, Kind.SCORE_ROWS, inside).kind is Kind.ROWS_SCORED
        long = {"h": encode(torch.linspace(-1, 1, 16 * WIDTH).reshape(16, WIDTH))}
        opened = _call(channel, Kind.OPEN_SESSION, OpenSession(max_lengths=[20], run_id=None))
        decode = DecodeLogits(
            session_id=opened.header.session_id,  # type: ignore[attr-defined]
            rows=[0],
            lengths=[16],
            positions=[0],
            max_lengths=[],
            num_logits=[16],
        )
        with pytest.raises(ProtocolError, match="16 places"):
            _call(channel, Kind.DECODE_LOGITS, decode, long)
        channel.close()


def test_a_loss_inside_is_the_same_in_pieces(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _call(channel, Kind.PUT_ROWS, PUT, H)
    score = msgspec.structs.replace(SCORE, has_loss_inside=True, is_last=True)
    evaluation = msgspec.structs.replace(score, step=0, is_evaluation=True)
    found = []
    for most in (1 << 26, 2 * VOCABULARY, 1):
        monkeypatch.setattr("cutlayer.enclave.desk._PIECE_VALUES", most)
        _call(channel, Kind.OPEN_RUN, _run("mine"))
        learnt, seen = (_call(channel, Kind.SCORE_ROWS, c).header for c in (score, evaluation))
        assert isinstance(learnt, RowsScored)
        assert isinstance(seen, RowsScored)
        assert learnt.loss_sum == pytest.approx(seen.loss_sum)
        found += [(learnt.loss_sum, learnt.sq_norm)]
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])


def test_calls_need_a_greeting_and_the_role(server: EnclaveServer) -> None:
    channel = loopback_of(server, "new")
    with pytest.raises(ProtocolError, match="before HELLO"):
        _call(channel, Kind.PUT_ROWS, PUT, H)
    channel.close()
    reader = loopback_of(server, "reader", frozenset({"generate"}))
    served = server.model
    hello = Hello(nonce="0" * 64, spec=served.spec.to_table(), leaves=dict(served.manifest.leaves))
    _call(reader, Kind.HELLO, hello)
    with pytest.raises(PermissionRefused, match="not train"):
        _call(reader, Kind.PUT_ROWS, PUT, H)
    reader.close()


def test_a_days_vectors_are_counted_where_they_tell_of_the_weights(
    tmp_path: Path, model: Path
) -> None:
    limited = enclave_settings(model, tmp_path, limits__max_client_vectors_per_day=12)
    with running_enclave(limited) as server:
        channel = _greeted(server, "thief")
        _call(channel, Kind.OPEN_RUN, _run("mine"))
        _call(channel, Kind.PUT_ROWS, PUT, H)
        for _ in range(2):
            _call(channel, Kind.SCORE_ROWS, SCORE)
        with pytest.raises(PermissionRefused, match="vectors"):
            _call(channel, Kind.SCORE_ROWS, SCORE)
        channel.close()


def test_another_cut_and_another_model_are_refused_in_the_handshake(
    tmp_path: Path, model: Path, server: EnclaveServer
) -> None:
    deeper = owner_settings(model, tmp_path / "a", model__lower=2)
    with owner_of(server, deeper) as owner, pytest.raises(SpecMismatch, match="lower"):
        owner.train()
    other, _ = tiny_model("llama", tmp_path / "other", seed=5)
    with (
        owner_of(server, owner_settings(other, tmp_path / "b")) as owner,
        pytest.raises(SpecMismatch),
    ):
        owner.train()


def test_an_ordinary_trunk_server_gets_neither_rows_nor_labels(tmp_path: Path, model: Path) -> None:
    table = server_settings(model, tmp_path).model_dump(mode="json")
    table["model"] = {**table["model"], "upper": 4}
    trunk = type(server_settings(model, tmp_path)).model_validate(table)
    with (
        running_server(trunk) as ordinary,
        EnclaveClient(
            owner_settings(model, tmp_path / "a"),
            connect=lambda: loopback_of(ordinary),  # type: ignore[arg-type]
        ) as owner,
    ):
        with pytest.raises(ProtocolError, match="ASK_ROWS is not for a server"):
            owner.train()
        assert owner.feeder is not None
        assert owner.feeder.num_sent == 0


def test_a_client_of_a_trunk_is_told_where_it_is(tmp_path: Path, model: Path) -> None:
    settings = client_settings(model, tmp_path, model__upper=4)
    with (
        running_enclave(enclave_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
        pytest.raises(CutlayerError, match="this is an enclave"),
    ):
        client.train()


def test_guessing_with_a_tail_that_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the LM head"):
        owner_settings(tmp_path, tmp_path, generation={"speculation": {"kind": "self"}})
