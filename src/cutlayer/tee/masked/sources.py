"""Where pads come from: dealt by somebody who must not know the accelerator, or made ahead.

It masks nothing. `Dealer` is the mode that scales: the product of each pad is computed at a second
worker, which learns the pad and never the masked numbers. `Pool` multiplies on this machine while
it is idle: that only moves the work, so it is for rare calls.

Shapes: N = tokens, K = inputs and M = products of a direction.
"""

import atexit
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import CacheFull
from cutlayer.tee.masked.field import Words
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.offload import Pad
from cutlayer.tee.masked.pads import PadStream, Seeds, expand, watch_forks
from cutlayer.tee.masked.quantise import FieldWeight

__all__ = ["Dealer", "Dealing", "Pool", "PoolLimits"]

_SLICE = 32


class Dealing(Protocol):
    """Whoever multiplies pads; it is told seeds, over a link that nobody else can read."""

    name: str

    def hold(self, name: str, weight: FieldWeight) -> None: ...

    def ask(self, name: str, seed: bytes, num_tokens: int, transpose: bool) -> int:
        """Begin; the number of the question."""

    def answer(self, number: int) -> Tensor:
        """`Multiplier.unmask_NM` of that question; those before it are forgotten."""

    def close(self) -> None: ...


class Dealer:
    """Pads whose products a dealer computes, while the accelerator works on what they mask."""

    def __init__(self, dealing: Dealing, seeds: Seeds | None = None) -> None:
        """
        Args:
            dealing: the second worker; it and the accelerator must not be one.
            seeds: None draws from the operating system.
        """
        self.name = dealing.name
        self._dealing = dealing
        self._seeds = seeds or Seeds()

    def hold(self, name: str, weight: FieldWeight) -> None:
        """Tell the dealer."""
        self._dealing.hold(name, weight)

    def take(self, name: str, num_tokens: int, transpose: bool) -> Pad:
        """A fresh seed; the dealer starts on it at once."""
        seed = self._seeds.draw()
        return _DealtPad(seed, self._dealing, self._dealing.ask(name, seed, num_tokens, transpose))

    def close(self) -> None:
        """Let go of the dealer."""
        self._dealing.close()


class _DealtPad:
    def __init__(self, seed: bytes, dealing: Dealing, number: int) -> None:
        self._stream = PadStream(seed)
        self._dealing, self._number = dealing, number

    def fill(self, out: Words) -> None:
        self._stream.fill(out)

    def unmask_NM(self) -> Tensor:
        return self._dealing.answer(self._number)


@dataclass(frozen=True, kw_only=True)
class PoolLimits:
    """How much is made ahead."""

    num_tokens: int
    """Per layer and direction."""
    waits: bool
    """Make a missing pad while the call waits; else the call fails."""
    idle_s: float = 0.05
    """Nothing is made ahead until no call came for so long."""


class Pool:
    """Pads that this machine made while it was idle; each is taken out once."""

    def __init__(self, limits: PoolLimits, seeds: Seeds | None = None) -> None:
        """
        Args:
            limits: how much.
            seeds: None draws from the operating system.
        """
        self.name = "the own pool"
        self._limits = limits
        self._seeds = seeds or Seeds()
        self._epoch = self._seeds.current_epoch()
        self._multiplier = Multiplier()
        self._rows: dict[tuple[str, bool], _Rows] = {}
        self._lock = threading.Lock()
        self._last_taken_s = time.monotonic()
        self._filler: _Filler | None = None
        watch_forks(self)

    def hold(self, name: str, weight: FieldWeight) -> None:
        """Make room for a layer's pads, both ways."""
        self._multiplier.hold(name, weight)
        with self._lock:
            self._rows |= {(name, transpose): _Rows() for transpose in (False, True)}

    def take(self, name: str, num_tokens: int, transpose: bool) -> Pad:
        """Pads from the pool; what it lacks is made now if the limits say so.

        Raises:
            CacheFull: pad pool exhausted.
        """
        self._last_taken_s = time.monotonic()
        with self._lock:
            self._drop_old()
            rows = self._rows[name, transpose]
            missing = max(0, num_tokens - rows.num_tokens)
            if missing and not self._limits.waits:
                error = CacheFull(
                    f"pad pool exhausted: {rows.num_tokens} of {num_tokens} tokens for {name}; ask "
                    'again later, raise masked.pool_tokens or set masked.when_exhausted = "wait"'
                )
                error.retry_after_s = max(1.0, self._limits.idle_s)
                raise error
            pads = rows.take(num_tokens - missing)
        # Outside of the lock, and made for this call alone: not stored in between.
        return _join([*pads, *([self._make(name, missing, transpose)] if missing else [])])

    def fill(self) -> int:
        """Make pads until all is full; the number of token rows made."""
        made = 0
        while step := self.fill_some():
            made += step
        return made

    def fill_some(self) -> int:
        """Make a few pads where most are missing; the number of token rows, 0 if all is full."""
        place = self._emptiest()
        return 0 if place is None else self._add(*place)

    def start(self) -> None:
        """Fill from a thread whenever nothing else goes on."""
        self._filler = self._filler or _Filler(self, self._limits.idle_s)

    def idle_for_s(self) -> float:
        """Since the last pad was taken."""
        return time.monotonic() - self._last_taken_s

    def num_ready(self, name: str, transpose: bool) -> int:
        """Tokens that a call could have at once."""
        with self._lock:
            self._drop_old()
            return self._rows[name, transpose].num_tokens

    def close(self) -> None:
        """Forget all pads."""
        if self._filler is not None:
            self._filler.close()
        with self._lock:
            self._rows.clear()
        self._multiplier.close()

    def after_fork(self) -> None:
        """In the child: the lock may be held by a thread that does not exist here."""
        self._lock = threading.Lock()
        self._filler = None

    def _make(self, name: str, num_tokens: int, transpose: bool) -> "_StoredPad":
        seed, width = self._seeds.draw(), self._multiplier.width(name, transpose)
        pad_NK = expand(seed, num_tokens, width)
        return _StoredPad(pad_NK, self._multiplier.unmask_of(name, pad_NK, transpose))

    def _add(self, name: str, transpose: bool) -> int:
        epoch = self._seeds.current_epoch()
        pad = self._make(name, min(_SLICE, self._limits.num_tokens), transpose)
        with self._lock:
            self._drop_old()
            if epoch == self._epoch and (name, transpose) in self._rows:
                self._rows[name, transpose].put(pad)
        return len(pad)

    def _emptiest(self) -> tuple[str, bool] | None:
        with self._lock:
            self._drop_old()
            if not self._rows:
                return None
            place = min(self._rows, key=lambda key: self._rows[key].num_tokens)
            is_full = self._rows[place].num_tokens >= self._limits.num_tokens
            return None if is_full else place

    def _drop_old(self) -> None:
        """What was made before a fork or a snapshot may be used by the other copy: it must go."""
        epoch = self._seeds.current_epoch()
        if epoch != self._epoch:
            self._epoch = epoch
            for rows in self._rows.values():
                rows.clear()


class _StoredPad:
    """Rows of a pad with their products."""

    def __init__(self, pad_NK: Tensor, unmask_NM: Tensor) -> None:
        self._pad_NK, self._unmask_NM = pad_NK, unmask_NM
        self._filled = 0

    def __len__(self) -> int:
        return len(self._pad_NK)

    def fill(self, out: Words) -> None:
        end = self._filled + len(out)
        assert end <= len(self._pad_NK), "a pad is used once"
        np.copyto(out, self._pad_NK[self._filled : end].numpy().view(np.uint32))
        self._filled = end

    def unmask_NM(self) -> Tensor:
        return self._unmask_NM

    def split(self, num_tokens: int) -> "tuple[_StoredPad, _StoredPad]":
        """The first rows and the rest."""
        first = _StoredPad(self._pad_NK[:num_tokens], self._unmask_NM[:num_tokens])
        return first, _StoredPad(self._pad_NK[num_tokens:], self._unmask_NM[num_tokens:])


def _join(pads: list[_StoredPad]) -> _StoredPad:
    if len(pads) == 1:
        return pads[0]
    return _StoredPad(
        torch.cat([pad._pad_NK for pad in pads]), torch.cat([pad._unmask_NM for pad in pads])
    )


class _Rows:
    """Ready pads of one layer and direction, first in, first out."""

    def __init__(self) -> None:
        self._pads: deque[_StoredPad] = deque()
        self.num_tokens = 0

    def put(self, pad: _StoredPad) -> None:
        self._pads.append(pad)
        self.num_tokens += len(pad)

    def take(self, num_tokens: int) -> list[_StoredPad]:
        self.num_tokens -= num_tokens
        taken = []
        while num_tokens:
            pad = self._pads.popleft()
            if len(pad) > num_tokens:
                pad, rest = pad.split(num_tokens)
                self._pads.appendleft(rest)
            taken.append(pad)
            num_tokens -= len(pad)
        return taken

    def clear(self) -> None:
        self._pads.clear()
        self.num_tokens = 0


class _Filler:
    """The thread that fills a pool while it is idle."""

    def __init__(self, pool: Pool, idle_s: float) -> None:
        self._pool, self._idle_s = weakref.ref(pool), idle_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pads", daemon=True)
        self._thread.start()
        # A thread that is killed in the middle of a product aborts the process.
        atexit.register(self.close)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._idle_s):
            while not self._stopped.is_set() and self._makes_some():
                pass

    def _makes_some(self) -> bool:
        pool = self._pool()
        if pool is None:
            self._stopped.set()
            return False
        return pool.idle_for_s() >= self._idle_s and pool.fill_some() > 0
