"""A row's activations leave once, whatever the number of epochs, and again only after a loss."""

import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest

from cutlayer.client.run_state import Progress
from cutlayer.client.train import Report
from cutlayer.enclave.owner import EnclaveClient
from cutlayer.enclave.owner_settings import LabelPlace
from cutlayer.enclave.server import EnclaveServer
from cutlayer.errors import CacheFull
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame, frame_bytes
from cutlayer.wire.messages import Kind
from tests.enclave_worlds import (
    enclave_settings,
    loopback_of,
    owner_of,
    owner_settings,
    running_enclave,
)

STEPS_PER_EPOCH = 3


class _Tap:
    """A channel that counts the bytes of every kind of frame that goes up."""

    def __init__(self, channel: Channel, counts: Counter[str]) -> None:
        self._channel, self._counts = channel, counts

    @property
    def bytes_sent(self) -> int:
        return self._channel.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._channel.bytes_received

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        self._counts[frame.kind.name] += frame_bytes(frame)
        if "h" in frame.tensors:
            self._counts["activations"] += frame.tensors["h"].num_bytes
        return self._channel.call(frame, deadline_s)

    def close(self) -> None:
        self._channel.close()


def _losses(progress: Progress) -> list[float]:
    return [record.loss for record in progress.history]


def test_later_epochs_send_no_activations(tmp_path: Path, model: Path) -> None:
    counts: Counter[str] = Counter()
    epochs: list[Counter[str]] = []

    def note(report: Report) -> None:
        if report.record.step % STEPS_PER_EPOCH == 0:
            epochs.append(counts.copy())

    with running_enclave(enclave_settings(model, tmp_path)) as server:
        settings = owner_settings(model, tmp_path / "a", train__steps=2 * STEPS_PER_EPOCH)
        tapped = EnclaveClient(settings, connect=lambda: _Tap(loopback_of(server), counts))
        with tapped as owner:
            owner.train(note)
            num_tokens = sum(len(row.tokens) for row in owner.rows().train)
            assert owner.feeder is not None
            assert owner.feeder.num_sent == len(owner.rows().train)
    first, second = epochs[0], epochs[1] - epochs[0]
    assert first["activations"] == num_tokens * 32 * 4
    assert set(second) == {Kind.SCORE_ROWS.name, Kind.LEARN_LOGITS.name}
    assert counts["activations"] == first["activations"]
    assert second[Kind.SCORE_ROWS.name] < 0.1 * first["activations"]


def test_rows_that_are_never_kept_give_the_same_losses(tmp_path: Path, model: Path) -> None:
    found = []
    for name in ("kept", "lost"):
        with (
            running_enclave(enclave_settings(model, tmp_path / name)) as server,
            owner_of(server, owner_settings(model, tmp_path / name, train__steps=4)) as owner,
        ):
            forget = server.desk.rows.clear if name == "lost" else lambda: None
            found.append(_losses(owner.train(lambda report, forget=forget: forget())))
            assert owner.feeder is not None
            assert (owner.feeder.num_sent > 24) == (name == "lost")
    assert found[0] == found[1]


def test_a_restart_loses_the_rows_and_nothing_else(tmp_path: Path, model: Path) -> None:
    settings = enclave_settings(model, tmp_path)
    with (
        running_enclave(enclave_settings(model, tmp_path / "other")) as server,
        owner_of(server, owner_settings(model, tmp_path / "whole")) as owner,
    ):
        whole = _losses(owner.train())
    servers = [EnclaveServer(settings)]
    mine = owner_settings(model, tmp_path / "a", train__save_every=2)
    with EnclaveClient(mine, connect=lambda: loopback_of(servers[-1])) as owner:

        def restart(report: Report) -> None:
            if report.record.step == 3 and len(servers) == 1:
                servers[0].stop(grace_s=0)
                servers.append(EnclaveServer(settings))
                owner.enclave.close()

        broken = _losses(owner.train(restart))
    servers[-1].stop(grace_s=0)
    assert len(servers) == 2
    assert broken == pytest.approx(whole, rel=1e-6)


def test_a_full_memory_names_what_to_do(tmp_path: Path, model: Path) -> None:
    with (
        running_enclave(enclave_settings(model, tmp_path, rows__max_client_bytes=9000)) as server,
        owner_of(server, owner_settings(model, tmp_path / "a")) as owner,
        pytest.raises(CacheFull, match=r"rows\.max_client_bytes=9000.*raise the limit"),
    ):
        owner.train()


def test_a_smaller_codec_makes_room_in_a_run_that_did_not_fit(tmp_path: Path, model: Path) -> None:
    """As the refusal advises: rows that came in the larger form are not the run's any more."""
    with running_enclave(
        enclave_settings(model, tmp_path, rows__max_client_bytes=60_000)
    ) as server:
        with (
            owner_of(server, owner_settings(model, tmp_path / "a")) as owner,
            pytest.raises(CacheFull, match="bf16"),
        ):
            owner.train()
        # What nobody uses for a minute may go.
        server.desk.clock = lambda: time.monotonic() + 61
        smaller = owner_settings(model, tmp_path / "a", connection__codec="bf16")
        with owner_of(server, smaller) as owner:
            assert owner.train().step == 6


@pytest.mark.parametrize("then", LabelPlace)
def test_labels_may_move_within_a_run(tmp_path: Path, model: Path, then: LabelPlace) -> None:
    first = next(place for place in LabelPlace if place is not then)
    whole = []
    for places in ((first, then), (then, then)):
        folder = tmp_path / places[0]
        with running_enclave(enclave_settings(model, folder)) as server:
            for place, steps in zip(places, (STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH), strict=True):
                settings = owner_settings(model, folder, train__steps=steps)
                # Only proof makes labels leave; here it is not what is tested.
                vars(settings)["labels"] = place
                with owner_of(server, settings) as owner:
                    progress = owner.train()
        whole.append(_losses(progress))
    assert whole[0] == pytest.approx(whole[1], rel=1e-4)


def test_saved_steps_are_sealed(tmp_path: Path, model: Path) -> None:
    with (
        running_enclave(enclave_settings(model, tmp_path)) as server,
        owner_of(server, owner_settings(model, tmp_path / "a", train__steps=1)) as owner,
    ):
        owner.train()
    saved = list((tmp_path / "inside" / "runs").rglob("*.safetensors"))
    assert saved
    assert all(path.read_bytes()[:4] == b"CLV1" for path in saved)


@pytest.mark.parametrize(("codec", "most"), [("bf16", 0.55), ("fp8", 0.35)])
def test_smaller_codecs_send_and_keep_less_and_learn_alike(
    tmp_path: Path, model: Path, codec: str, most: float
) -> None:
    losses, sent, kept = {}, {}, {}
    for name in ("raw", codec):
        counts: Counter[str] = Counter()
        settings = owner_settings(
            model, tmp_path / name, connection__codec=name, train__steps=STEPS_PER_EPOCH
        )
        with running_enclave(enclave_settings(model, tmp_path / name)) as server:
            tapped = EnclaveClient(
                settings,
                connect=lambda s=server, c=counts: _Tap(loopback_of(s), c),  # type: ignore[misc]
            )
            with tapped as owner:
                losses[name] = _losses(owner.train())
            kept[name] = server.desk.rows.used_bytes
        sent[name] = counts["activations"]
    assert sent[codec] < most * sent["raw"]
    assert (kept[codec] < kept["raw"]) == (codec == "bf16")
    assert losses[codec] == pytest.approx(losses["raw"], rel=0.05)
