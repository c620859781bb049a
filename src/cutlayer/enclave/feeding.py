"""Which of an owner's rows the enclave has, and sending those that it has not: each once.

It does not train. Activations are computed when they are sent and not kept here; sent again after a
loss, the same row has the same bits.

Shapes: N = tokens of all rows, L = tokens of one row, D = hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.client.link import PendingCall
from cutlayer.client.parts import head_output
from cutlayer.data.batches import Batch
from cutlayer.enclave.front import FrontHops
from cutlayer.enclave.remote import RemoteEnclave
from cutlayer.model.loss import scored_places
from cutlayer.model.partition import Head
from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Boundary
from cutlayer.wire.enclave_messages import AskRows, PutRows

__all__ = ["RowFeeder", "RowsName", "num_places", "row_names"]

_VERSION = "frozen"
"""The front does not learn: its releases are of one version."""


@dataclass(frozen=True, kw_only=True)
class RowsName:
    """How this owner's rows are called at the enclave."""

    row_set: str
    """The owner's run, and in which form rows are sent."""
    front: str
    """Digest of the front's weights, hex."""


class RowFeeder:
    """Used from one thread."""

    def __init__(
        self,
        front: Head,
        enclave: RemoteEnclave,
        gate: Boundary,
        name: RowsName,
        sends_labels: bool,
        passage: FrontHops | None = None,
    ) -> None:
        """
        Args:
            front: the owner's blocks, frozen.
            enclave: where rows go.
            gate: what leaves goes through here.
            name: of the rows there.
            sends_labels: whether labels go along.
            passage: servers in the middle, through which rows go first; None where there are none.
        """
        self._front, self._enclave, self._gate = front, enclave, gate
        self.name = name
        self.sends_labels = sends_labels
        self._passage = passage
        self._there: set[int] = set()
        self.num_sent = 0
        """Rows that were sent so far, repeats counted."""

    def ensure(self, batches: Sequence[Batch]) -> None:
        """Send the rows of these batches that the enclave does not have, several at once.

        Raises:
            CacheFull: the enclave has no room for them.
        """
        unknown = [r for chosen in batches for r in chosen.row_ids if r not in self._there]
        if not unknown:
            return
        name = self.name
        call = AskRows(row_set=name.row_set, front=name.front, row_ids=unknown)
        missing = set(self._enclave.missing(call))
        on_their_way = []
        for chosen in batches:
            indices = [n for n, row in enumerate(chosen.row_ids) if row in missing]
            if indices:
                on_their_way.append(self._put(chosen, indices))
        try:
            for sent in on_their_way:
                self._enclave.require_put(sent)
        finally:
            for sent in on_their_way:
                sent.forget()
        self._there.update(unknown)

    def forget_all(self) -> None:
        """The enclave lost some: it is asked anew, which costs next to nothing."""
        self._there.clear()

    def _put(self, chosen: Batch, indices: Sequence[int]) -> PendingCall:
        rows, places, targets = _chosen(chosen, indices)
        row_ids = [chosen.row_ids[index] for index in indices]
        with torch.no_grad():
            h_ND = head_output(self._front, rows)
        names = row_names(row_ids)
        if self._passage is not None:
            h_ND = self._passage.through(h_ND, rows, names, _VERSION)
        _, released = self._gate.release(h_ND, rows, names, _VERSION)
        call = PutRows(
            row_set=self.name.row_set,
            front=self.name.front,
            row_ids=row_ids,
            lengths=list(rows.lengths),
            places=places,
            targets=targets if self.sends_labels else [],
        )
        self.num_sent += len(row_ids)
        return self._enclave.put(released, call)


def row_names(row_ids: Iterable[int]) -> list[str]:
    """Names of rows for the ledger."""
    return [f"row{row_id}" for row_id in row_ids]


def num_places(chosen: Batch) -> list[int]:
    """Scored places of each row."""
    places_S, _ = scored_places(chosen.rows, chosen.labels_N)
    ends = torch.tensor(chosen.rows.offsets)
    counts = torch.bincount(torch.bucketize(places_S, ends, right=True), minlength=len(ends))
    return [int(count) for count in counts[1 : len(ends)]]


def _chosen(chosen: Batch, indices: Sequence[int]) -> tuple[Rows, list[list[int]], list[list[int]]]:
    """Some rows of a batch: packed, with the scored places and their labels of each."""
    assert chosen.rows.tokens_N is not None
    tokens = chosen.rows.tokens_N.split(chosen.rows.lengths)
    labels = chosen.labels_N.split(chosen.rows.lengths)
    rows = Rows(
        lengths=tuple(len(tokens[index]) for index in indices),
        tokens_N=torch.cat([tokens[index] for index in indices]),
    )
    places, targets = [], []
    for index in indices:
        alone = Rows(lengths=(len(tokens[index]),))
        places_S, targets_S = scored_places(alone, labels[index])
        places.append(_listed(places_S))
        targets.append(_listed(targets_S))
    return rows, places, targets


def _listed(values_S: Tensor) -> list[int]:
    return [int(value) for value in values_S.tolist()]
