"""The only gate: account, (clip,) noise, encode, in this order. What leaves is a `Released`.

It does not send; `client` sends nothing but `Released`. It knows no text, token or label: rows are
named by identifiers that the caller makes.

Shapes: N = vectors of all rows together, D = values of one vector.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import StrEnum
from typing import Never

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.model.rows import Rows
from cutlayer.privacy.budget import SessionBudget
from cutlayer.privacy.ledger import Ledger, Release
from cutlayer.privacy.mechanism import Mechanism, PrivacyEvent
from cutlayer.privacy.noise import NoiseContext, RowNoise, RunSecret, release_key
from cutlayer.privacy.packed_rows import concatenated, sliced
from cutlayer.wire.codec import Codec, Packed, get_codec
from cutlayer.wire.ring import pack_ring, words_of

__all__ = ["Boundary", "BoundaryName", "Released", "ReleasedUpdate", "UpdateGate"]

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
    boundary: BoundaryName
    """The gate it came through."""
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


class Boundary:
    """One gate of one run."""

    def __init__(
        self,
        name: BoundaryName,
        mechanism: Mechanism,
        codec: Codec,
        ledger: Ledger,
        secret: RunSecret,
        max_day_vectors: int | None = None,
    ) -> None:
        """
        Args:
            name: which gate; part of every noise key.
            mechanism: noise rule.
            codec: wire form, from `wire.codec.get_codec`.
            ledger: the run's ledger.
            secret: the run's secret, the same one for as long as the ledger lives.
            max_day_vectors: vectors that may pass in one UTC day; None sets no limit.
        """
        self.name = name
        self.mechanism = mechanism
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
    ) -> tuple[Tensor, Released]:
        """Account, noise and encode what is about to leave.

        Args:
            x_ND: vectors of the packed rows, float32 or a 2-byte float type.
            rows: their layout; the starts are part of the noise keys, tokens are ignored.
            row_ids: one identifier per row, unique within the run, never text.
            version: identifier of the weights that made `x_ND`; it changes whenever they do.
            budgets: one per row, the conversation that pays for it; empty where none does.

        Returns:
            The noised vectors, still in the graph, and their wire form.

        Raises:
            ConfigError: values that are not finite, or rows and identifiers that do not fit.
            BudgetExceeded: a conversation or the day has no room; no row of the call leaves.
            StorageError: the ledger cannot be written; nothing may leave.
        """
        self._check(x_ND, rows, row_ids, version)
        keys = list(self._noise_keys(x_ND, rows, row_ids, version))
        is_replay = self._account(keys, rows, version, budgets)
        noised_ND = self.mechanism.apply(x_ND, RowNoise(keys, rows.lengths))
        released = Released(
            packed=self._codec.encode(noised_ND.detach()),
            rows=rows.without_tokens(),
            boundary=self.name,
            is_replay=is_replay,
            gate=_GATE,
        )
        return noised_ND, released

    def _check(self, x_ND: Tensor, rows: Rows, row_ids: Sequence[str], version: str) -> None:
        if x_ND.ndim != 2 or x_ND.shape[0] != rows.num_tokens or len(row_ids) != rows.num_rows:
            raise ConfigError(
                f"{self.name}: a tensor of shape {list(x_ND.shape)} and {len(row_ids)} row names "
                f"for {rows.num_rows} rows of {rows.num_tokens} tokens"
            )
        if not x_ND.is_floating_point() or x_ND.dtype.itemsize > 4:
            raise ConfigError(f"{self.name}: cannot release {x_ND.dtype}; use float32 or smaller")
        for name in (version, *row_ids):
            if not _IDENTIFIER.fullmatch(name):
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

    def _noise_keys(
        self, x_ND: Tensor, rows: Rows, row_ids: Sequence[str], version: str
    ) -> Iterator[bytes]:
        label = self.mechanism.label
        context = NoiseContext(boundary=self.name, mechanism=label, version=version)
        x = np.ascontiguousarray(x_ND.detach().float().cpu().numpy())
        for row_id, start, begin, end in zip(
            row_ids, rows.starts, rows.offsets, rows.offsets[1:], strict=False
        ):
            yield self._secret.noise_key(context, row_id, start, x[begin:end])

    def _account(
        self, keys: Sequence[bytes], rows: Rows, version: str, budgets: Sequence[SessionBudget]
    ) -> bool:
        if budgets and len(budgets) != rows.num_rows:
            raise ConfigError(f"{self.name}: {len(budgets)} budgets for {rows.num_rows} rows")
        payers: Sequence[SessionBudget | None] = budgets or [None] * rows.num_rows
        releases = [
            Release(key=release_key(key), num_vectors=length, budget=payer)
            for key, length, payer in zip(keys, rows.lengths, payers, strict=True)
        ]
        event, limit = self.mechanism.event(rows.num_tokens), self._max_day_vectors
        return self._ledger.account(self.name, event, version, releases, limit)


@dataclass(frozen=True, kw_only=True)
class ReleasedUpdate:
    """Tensors of an update that may go to the federation. Only this module makes one."""

    tensors: Mapping[str, Packed] = field(repr=False)
    gate: InitVar[_Gate]

    def __post_init__(self, gate: _Gate) -> None:
        if gate is not _GATE:
            raise TypeError("only UpdateGate makes a ReleasedUpdate")


class UpdateGate:
    """The gate of a federation: adapter updates, and numbers that the owner publishes."""

    def __init__(self, ledger: Ledger, allows_plain: bool, publishes: bool) -> None:
        """
        Args:
            ledger: the run's ledger.
            allows_plain: the owner accepts that the server sees its update by itself.
            publishes: the owner shows its losses to the federation.
        """
        self._ledger = ledger
        self._allows_plain = allows_plain
        self._publishes = publishes

    def masked(self, masked_M: Tensor, name: str, sealed: bytes | None = None) -> ReleasedUpdate:
        """An update under secure aggregation: int64 ring elements, uniform to whoever sees them.

        Args:
            masked_M: values and weight, masked.
            name: identifier of federation, round and attempt.
            sealed: adapters encrypted under the members' key, for newcomers.
        """
        tensors = {"masked": pack_ring(masked_M)}
        if sealed is not None:
            tensors["sealed"] = pack_ring(words_of(sealed))
        self._account(BoundaryName.UPDATES, "masked_sum", name, _digest(tensors))
        return ReleasedUpdate(tensors=tensors, gate=_GATE)

    def plain(self, update: Mapping[str, Tensor], name: str) -> ReleasedUpdate:
        """An update that the server sees by itself.

        Raises:
            ConfigError: the owner has not accepted that.
        """
        self.require_plain_accepted()
        raw = get_codec("raw")
        tensors = {key: raw.encode(x) for key, x in update.items()}
        self._account(BoundaryName.UPDATES, "none", name, _digest(tensors))
        return ReleasedUpdate(tensors=tensors, gate=_GATE)

    def require_plain_accepted(self) -> None:
        """Refuse before any work what `plain` would refuse after it.

        Raises:
            ConfigError: the owner has not accepted that the server sees its updates.
        """
        if not self._allows_plain:
            raise ConfigError(
                "this federation aggregates without secure aggregation: the server would see your "
                "adapter update, from which text can be rebuilt; ask its operator for "
                "secure.enabled=true, or accept it with federation.share_plain_updates=true"
            )

    def metrics(self, values: Mapping[str, float], name: str) -> dict[str, float] | None:
        """What of these numbers may be shown; None where the owner shows none."""
        if not self._publishes:
            return None
        self._account(BoundaryName.METRICS, "none", name, repr(sorted(values.items())))
        return dict(values)

    def _account(self, boundary: BoundaryName, mechanism: str, name: str, content: str) -> None:
        if not _IDENTIFIER.fullmatch(name):
            raise ConfigError(f"{boundary}: {name!r:.80} is no identifier of a round")
        # A coordinator that was set back uses a round's name twice; other content is no replay.
        key = hashlib.sha256(f"{boundary}|{name}|{content}".encode()).hexdigest()[:32]
        event = PrivacyEvent(mechanism=mechanism, scale=None, num_vectors=1)
        self._ledger.account(boundary, event, name, [Release(key=key, num_vectors=1)])


def _digest(tensors: Mapping[str, Packed]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        for buffer in tensors[name].buffers:
            digest.update(buffer)
    return digest.hexdigest()
