"""The only gate: account, (clip,) noise, encode, in this order. What leaves is a `Released`.

It does not send; `client` sends nothing but `Released`. It knows no text, token or label: rows are
named by identifiers that the caller makes. Which vectors stay is said by the caller's mask.

Shapes: N = vectors of all rows together, M = those that leave, D = values of one vector.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from enum import StrEnum
from typing import Never

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import ConfigError, StorageError
from cutlayer.model.rows import Rows
from cutlayer.privacy.budget import SessionBudget
from cutlayer.privacy.hop_names import without_hop
from cutlayer.privacy.ledger import Ledger, Release
from cutlayer.privacy.mechanism import Mechanism
from cutlayer.privacy.noise import NoiseContext, RowNoise, RunSecret, release_key
from cutlayer.privacy.packed_rows import concatenated, sliced
from cutlayer.privacy.withheld import Leaving, all_leave, leaving
from cutlayer.wire.codec import Codec, Packed

__all__ = ["Boundary", "BoundaryName", "Released", "is_identifier"]

_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


class BoundaryName(StrEnum):
    """Where something leaves the data owner."""

    ACTIVATIONS = "activations"
    """Head output in training and evaluation, at the lower cut."""
    GRADIENTS = "gradients"
    """Gradient of the summed loss, at the upper cut: labels leak here."""
    GENERATION = "generation"
    """Head output of a generation, at the lower cut."""
    UPDATES = "updates"
    """What a round taught head and tail: adapters that leave for the federation."""
    METRICS = "metrics"
    """Numbers such as a loss that the owner chose to publish."""
    ADAPTERS = "adapters"
    """What was learnt for blocks that a re-cut moves to the server."""


class _Gate:
    """Whoever holds the one instance may make a Released."""


_GATE = _Gate()


@dataclass(frozen=True, kw_only=True)
class Released:
    """Vectors that were accounted, noised and encoded. Only this module makes one."""

    packed: Packed = field(repr=False)
    """Wire form, [N, D]."""
    rows: Rows
    """Layout, without tokens."""
    boundary: str
    """Name of the gate it came through."""
    is_replay: bool
    """Whether all of it had left before, byte for byte; then it cost nothing."""
    gate: InitVar[_Gate]

    def __post_init__(self, gate: _Gate) -> None:
        if gate is not _GATE:
            raise TypeError("only Boundary.release makes a Released")
        assert self.rows.tokens_N is None
        assert self.packed.shape[0] == self.rows.num_tokens

    def __init_subclass__(cls) -> None:
        raise TypeError("no subclass of Released: it would go around the gate")

    def __reduce__(self) -> Never:
        raise TypeError("a Released is not copied or serialised; the ledger counts each once")

    def row(self, index: int) -> "Released":
        """One row alone, its bytes copied: what later happens to this memory does not reach it."""
        return self._part(index, 0, self.rows.lengths[index])

    def first(self, num_vectors: int) -> "Released":
        """The first vectors of a single row."""
        assert self.rows.num_rows == 1
        return self._part(0, 0, num_vectors)

    @staticmethod
    def join(rows: Sequence[Sequence["Released"]]) -> "Released":
        """Released vectors again, in another grouping: always a replay.

        Args:
            rows: per row its consecutive pieces, one row each, all of one boundary and codec.
        """
        pieces = [piece for row in rows for piece in row]
        layout = Rows(
            lengths=tuple(sum(p.rows.num_tokens for p in row) for row in rows),
            starts=tuple(row[0].rows.starts[0] for row in rows),
        )
        return Released(
            packed=concatenated([piece.packed for piece in pieces]),
            rows=layout,
            boundary=pieces[0].boundary,
            is_replay=True,
            gate=_GATE,
        )

    def merged(self, num_pieces: Sequence[int]) -> "Released":
        """The same vectors, where some of the rows are pieces of one: the bytes are not touched.

        Args:
            num_pieces: how many consecutive rows make up each row of the result.
        """
        pieces = iter(zip(self.rows.starts, self.rows.lengths, strict=True))
        starts, lengths = [], []
        for number in num_pieces:
            taken = list(itertools.islice(pieces, number))
            starts.append(taken[0][0])
            lengths.append(sum(length for _, length in taken))
        return Released(
            packed=self.packed,
            rows=Rows(lengths=tuple(lengths), starts=tuple(starts)),
            boundary=self.boundary,
            is_replay=self.is_replay,
            gate=_GATE,
        )

    def _part(self, index: int, begin: int, end: int) -> "Released":
        offset = self.rows.offsets[index]
        return Released(
            packed=sliced(self.packed, offset + begin, offset + end),
            rows=Rows(lengths=(end - begin,), starts=(self.rows.starts[index] + begin,)),
            boundary=self.boundary,
            is_replay=self.is_replay,
            gate=_GATE,
        )


def is_identifier(name: str) -> bool:
    """Whether a name may stand in a key or in the ledger: no text can."""
    return _IDENTIFIER.fullmatch(name) is not None


class Boundary:
    """One gate of one run."""

    def __init__(
        self,
        name: str,
        mechanism: Mechanism,
        codec: Codec,
        ledger: Ledger,
        secret: RunSecret,
        max_day_vectors: int | None = None,
        withholds: bool = False,
    ) -> None:
        """
        Args:
            name: which gate, a `BoundaryName` or one of `hop_names`; part of every noise key.
            mechanism: noise rule.
            codec: wire form, from `wire.codec.get_codec`.
            ledger: the run's ledger.
            secret: the run's secret, the same one for as long as the ledger lives.
            max_day_vectors: vectors that may pass in one UTC day; None sets no limit.
            withholds: nothing passes without a mask of what stays.
        """
        self.name, self.mechanism, self.withholds = name, mechanism, withholds
        self._codec, self._ledger = codec, ledger
        self._secret, self._max_day_vectors = secret, max_day_vectors

    @property
    def guarantee(self) -> str:
        """What passing this gate promises, to be printed beside every result."""
        return self.mechanism.guarantee

    def release(
        self,
        x_ND: Tensor,
        rows: Rows,
        row_ids: Sequence[str],
        version: str,
        budgets: Sequence[SessionBudget] = (),
        withheld_N: Tensor | None = None,
    ) -> tuple[Tensor, Released]:
        """Account, noise and encode what is about to leave.

        Args:
            x_ND: vectors of the packed rows, float32 or a 2-byte float type.
            rows: their layout; the starts are part of the noise keys, tokens are ignored.
            row_ids: one identifier per row, unique within the run, never text.
            version: identifier of the weights that made `x_ND`; it changes whenever they do.
            budgets: one per row, the conversation that pays for it; empty where none does.
            withheld_N: bool, vectors that stay here: nothing crosses in their place, and the rows
                that leave are shorter by them. None withholds nothing.

        Returns:
            The noised vectors that leave [M, D], still in the graph, and their wire form, whose
            rows are those that leave.

        Raises:
            ConfigError: values that are not finite, rows, identifiers or a mask that do not fit,
                no mask at a gate that withholds, or a row of which nothing may leave.
            BudgetExceeded: a conversation or the day has no room; no row of the call leaves.
            StorageError: the ledger cannot be written; nothing may leave.
        """
        self._check(x_ND, rows, row_ids, version)
        if budgets and len(budgets) != rows.num_rows:
            raise ConfigError(f"{self.name}: {len(budgets)} budgets for {rows.num_rows} rows")
        going = self._leaving(rows, withheld_N)
        x_MD = going.gather(x_ND)
        keys = list(self._noise_keys(x_MD, going, row_ids, version))
        is_replay = self._account(keys, row_ids, going.rows.lengths, version, budgets)
        noised_MD = self.mechanism.apply(x_MD, RowNoise(keys, going.rows.lengths))
        released = Released(
            packed=self._codec.encode(noised_MD.detach()),
            rows=going.rows,
            boundary=self.name,
            is_replay=is_replay,
            gate=_GATE,
        )
        return noised_MD, released

    def go_ahead(self, num_vectors: int, version: str) -> None:
        """While there is time, see to it that the next release need not wait for the disk.

        Args:
            num_vectors: how many it is likely to have; see `Ledger.go_ahead`.
            version: identifier of the weights that will make them.
        """
        # A disk that fails now fails the next release too, before anything leaves.
        with suppress(StorageError):
            self._ledger.go_ahead(self.name, self.mechanism.event(num_vectors), version)

    def _check(self, x_ND: Tensor, rows: Rows, row_ids: Sequence[str], version: str) -> None:
        if x_ND.ndim != 2 or x_ND.shape[0] != rows.num_tokens or len(row_ids) != rows.num_rows:
            raise ConfigError(
                f"{self.name}: a tensor of shape {list(x_ND.shape)} and {len(row_ids)} row names "
                f"for {rows.num_rows} rows of {rows.num_tokens} tokens"
            )
        if not x_ND.is_floating_point() or x_ND.dtype.itemsize > 4:
            raise ConfigError(f"{self.name}: cannot release {x_ND.dtype}; use float32 or smaller")
        for name in (version, *row_ids):
            if not is_identifier(name):
                # Not shown: what is no identifier may be somebody's text.
                raise ConfigError(
                    f"{self.name}: a row or version name of {len(name)} characters is no "
                    "identifier (letters, digits and ._:/@+-, at most 128); never name rows by text"
                )
        if not bool(torch.isfinite(x_ND.detach()).all()):
            raise ConfigError(
                f"{self.name}: values are NaN or infinite, so training diverged or the model does "
                "not fit its dtype; nothing was sent: lower the learning rate or use float32"
            )

    def _leaving(self, rows: Rows, withheld_N: Tensor | None) -> Leaving:
        if withheld_N is None and self.withholds:
            raise ConfigError(
                f'{self.name}: with privacy.withhold = "private" nothing leaves without a mask of '
                "what is private, and a prompt has none, so such a run does not generate: judge it "
                'by its validation loss, or open a run of its own with withhold = "none"'
            )
        if withheld_N is None:
            return all_leave(rows)
        if withheld_N.dtype != torch.bool or withheld_N.shape != (rows.num_tokens,):
            raise ConfigError(
                f"{self.name}: a mask of {withheld_N.dtype} {list(withheld_N.shape)} for "
                f"{rows.num_tokens} vectors; it has one bool per vector"
            )
        return leaving(rows, withheld_N)

    def _noise_keys(
        self, x_MD: Tensor, going: Leaving, row_ids: Sequence[str], version: str
    ) -> Iterator[bytes]:
        label = self.mechanism.label
        context = NoiseContext(boundary=self.name, mechanism=label, version=version)
        x = np.ascontiguousarray(x_MD.detach().float().cpu().numpy())
        rows = going.rows
        for place, (row_id, start) in enumerate(zip(row_ids, rows.starts, strict=True)):
            h = x[rows.offsets[place] : rows.offsets[place + 1]]
            yield self._secret.noise_key(context, row_id, start, h, going.places[place])

    def _account(
        self,
        keys: Sequence[bytes],
        names: Sequence[str],
        lengths: Sequence[int],
        version: str,
        budgets: Sequence[SessionBudget],
    ) -> bool:
        """Count what leaves, one key, name and length per row of it; whether it is a replay."""
        payers: Sequence[SessionBudget | None] = budgets or [None] * len(keys)
        # In generation all rows have one name: conversations are not told apart.
        is_told_apart = without_hop(self.name) != BoundaryName.GENERATION
        releases = [
            Release(
                key=release_key(key),
                num_vectors=length,
                budget=payer,
                row=self._secret.row_digest(name) if is_told_apart else None,
            )
            for key, name, length, payer in zip(keys, names, lengths, payers, strict=True)
        ]
        event, limit = self.mechanism.event(sum(lengths)), self._max_day_vectors
        return self._ledger.account(self.name, event, version, releases, limit)
