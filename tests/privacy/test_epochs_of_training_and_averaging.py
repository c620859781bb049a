"""What the server can average over the epochs of a real run: nothing where the head is frozen, and
what the ledger says where it trains.
"""

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer import Client
from cutlayer.privacy.ledger import LedgerSummary
from cutlayer.wire.channel import Channel
from cutlayer.wire.codec import decode
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Forward
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_settings, loopback, running_server, server_settings, write_rows

EPOCHS, NUM_ROWS, SIGMA = 4, 8, 5.0
RULES: dict[str, dict[str, object]] = {
    "gaussian": {"privacy__scale": SIGMA * (2 / torch.pi) ** 0.5},
    "clipped_gaussian": {"privacy__scale": SIGMA / 100, "privacy__clip": 100.0},
    "matrix_gaussian": {"privacy__scale": SIGMA / 1000, "privacy__clip": 1000.0},
    # The length of the noise is 32 / eta, that of a normal one about sigma * sqrt(32).
    "metric_dp": {"privacy__scale": 32**0.5 / SIGMA, "privacy__clip": 100.0},
}
"""Noise that drowns the tiny model's activations, and clips that do not bind."""


class _Listening:
    """A channel whose server keeps every row of every forward that it is sent."""

    def __init__(self, inner: Channel, heard: list[Tensor]) -> None:
        self._inner, self._heard = inner, heard

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        if isinstance(frame.header, Forward):
            (packed,) = frame.tensors.values()
            self._heard += decode(packed).split(frame.header.lengths)
        return self._inner.call(frame, deadline_s)


def _train(
    folder: Path, mechanism: str, rule: Mapping[str, object], parts: list[str]
) -> tuple[list[Tensor], LedgerSummary]:
    """What the server heard over all epochs, and the owner's ledger."""
    model, heard = tiny_llama_folder(folder), []
    settings = client_settings(
        model,
        folder,
        data__train=str(write_rows(folder / "own.jsonl", NUM_ROWS)),
        privacy__mechanism=mechanism,
        adapter__parts=parts,
        train__steps=EPOCHS * 2,
        train__rows_per_step=NUM_ROWS // 2,
        **rule,
    )
    with (
        running_server(server_settings(model, folder)) as server,
        Client(settings, connect=lambda: _Listening(loopback(server), heard)) as client,
    ):
        client.train()
        return heard, client.ledger


def _by_length(heard: list[Tensor]) -> dict[int, list[Tensor]]:
    """The rows of the data set differ in length but for one pair."""
    rows = defaultdict(list)
    for row_LD in heard:
        rows[len(row_LD)].append(row_LD)
    return rows


@pytest.mark.parametrize("mechanism", sorted(RULES))
def test_epochs_of_a_frozen_head_replay_their_noise(tmp_path: Path, mechanism: str) -> None:
    heard, ledger = _train(tmp_path, mechanism, RULES[mechanism], ["trunk", "tail"])
    assert len(heard) == EPOCHS * NUM_ROWS
    distinct = {row_LD.numpy().tobytes() for row_LD in heard}
    assert len(distinct) == NUM_ROWS
    # Counted once, however many epochs it was seen.
    num_vectors = sum(len(row_LD) for row_LD in heard)
    assert ledger.num_vectors["activations"] == num_vectors // EPOCHS
    assert ledger.num_replayed_vectors >= num_vectors - num_vectors // EPOCHS


@pytest.mark.parametrize("mechanism", sorted(RULES))
def test_epochs_of_a_training_head_are_new_releases_and_all_are_counted(
    tmp_path: Path, mechanism: str
) -> None:
    heard, ledger = _train(tmp_path, mechanism, RULES[mechanism], ["head", "trunk", "tail"])
    distinct = {row_LD.numpy().tobytes() for row_LD in heard}
    assert len(distinct) == EPOCHS * NUM_ROWS
    assert ledger.num_vectors["activations"] == sum(len(row_LD) for row_LD in heard)
    # Independent noise: no two releases of one row have a difference smaller than theirs.
    for rows in _by_length(heard).values():
        stacked = torch.stack(rows).flatten(1)
        spread = torch.cdist(stacked, stacked)[~torch.eye(len(rows), dtype=torch.bool)]
        expected = SIGMA * (2 * stacked.shape[1]) ** 0.5
        assert float(spread.min()) > 0.5 * expected
