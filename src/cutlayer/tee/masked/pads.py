"""One-time pads: uniform residues from AES-256-CTR, under seeds that are used once, never stored.

It masks nothing (`online`) and knows no layers. A seed is drawn for one call and is a hash of the
operating system's randomness, of clocks, of the process and of a counter, under a key that a fork
replaces; so two copies of a process, forked or from a snapshot, draw different ones. What was drawn
ahead cannot be told apart in two copies: `Seeds.epoch` says when it has to be thrown away.
"""

import hashlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from cutlayer.tee.masked.field import PRIME, Words, words

__all__ = [
    "SEED_BYTES",
    "Forked",
    "PadStream",
    "Place",
    "Seeds",
    "expand",
    "here",
    "replace_excess",
    "watch_forks",
]

SEED_BYTES = 32
_ZEROS = memoryview(bytes(1 << 18))
_P = np.uint32(PRIME)
_MAIN, _INSTEAD = 0, 1
_MAX_CLOCK_STEP_S = 1.0

Place = tuple[str, float, float]
"""Boot of the kernel; wall clock and sleep-counting clock, each less the monotonic one."""


class PadStream:
    """The residues that a seed stands for, in order; at most 2^36 of them."""

    def __init__(self, seed: bytes) -> None:
        """
        Args:
            seed: 32 bytes that were never used before.
        """
        assert len(seed) == SEED_BYTES
        self._seed = seed
        self._main = _cipher(seed, _MAIN)
        self._instead: Callable[[Words], None] | None = None

    def fill(self, out: Words) -> None:
        """Overwrite contiguous words with the next residues of the stream."""
        flat = out.reshape(-1)
        for start in range(0, flat.size, len(_ZEROS) // 4):
            piece = flat[start : start + len(_ZEROS) // 4]
            self._main(piece)
            np.bitwise_and(piece, _P, out=piece)
            if int(piece.max(initial=0)) == PRIME:
                replace_excess(piece, self._more)

    def _more(self, count: int) -> Words:
        # Once in 2^31 residues: it is not made ready for each call.
        self._instead = self._instead or _cipher(self._seed, _INSTEAD)
        found = np.empty(count, dtype=np.uint32)
        self._instead(found)
        masked: Words = found & _P
        return masked


def expand(seed: bytes, num_tokens: int, width: int) -> Tensor:
    """All residues of a seed at once, int32 [num_tokens, width]."""
    pad = torch.empty(num_tokens, width, dtype=torch.int32)
    PadStream(seed).fill(words(pad))
    return pad


def replace_excess(piece: Words, more: Callable[[int], Words]) -> None:
    """Rejection: 31 bits have one value more than the field; it is drawn anew, place by place.

    Args:
        piece: words of 31 bits, changed in place.
        more: gives so many further words of 31 bits.
    """
    places = np.flatnonzero(piece == _P)
    while len(places):
        piece[places] = more(len(places))
        places = places[piece[places] == _P]


def _cipher(seed: bytes, domain: int) -> Callable[[Words], None]:
    counter = domain.to_bytes(4, "big") + bytes(12)
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(counter)).encryptor()

    def fill(out: Words) -> None:
        encryptor.update_into(_ZEROS[: out.nbytes], out.data.cast("B"))

    return fill


class Seeds:
    """Draws seeds, each once.

    Attributes:
        epoch: goes up when this process is not the one, or not where and when, it was: whatever
            was drawn in an earlier epoch and is not used yet must never be.
    """

    def __init__(self, place: Callable[[], Place] | None = None) -> None:
        """
        Args:
            place: tells where and when this process runs; None asks the kernel.
        """
        self.epoch = 0
        self._number = 0
        self._where = place or here
        self._place = self._where()
        self._lock = threading.Lock()
        self._renew()
        watch_forks(self)

    def draw(self) -> bytes:
        """A fresh seed. It is nobody's before and after: do not keep it."""
        with self._lock:
            self._look_around()
            self._number += 1
            told = f"{self._number}|{os.getpid()}|{time.time_ns()}|{time.monotonic_ns()}"
            salt = os.urandom(SEED_BYTES) + told.encode()
            return hashlib.blake2b(salt, key=self._key, digest_size=SEED_BYTES).digest()

    def current_epoch(self) -> int:
        """The epoch, after a look at the clocks."""
        with self._lock:
            self._look_around()
            return self.epoch

    def renew(self) -> None:
        """Start a new epoch: call it wherever a snapshot of this process may have been taken."""
        with self._lock:
            self._renew()

    def after_fork(self) -> None:
        """In the child: the lock may be held by a thread that does not exist here."""
        self._lock = threading.Lock()
        self._renew()

    def _renew(self) -> None:
        self._key = os.urandom(64)
        self.epoch += 1

    def _look_around(self) -> None:
        place = self._where()
        before, self._place = self._place, place
        steps = (abs(new - old) for new, old in zip(place[1:], before[1:], strict=True))
        if place[0] != before[0] or any(step > _MAX_CLOCK_STEP_S for step in steps):
            self._renew()


def here() -> Place:
    """Where and when this process runs. A wall clock that is set looks like a snapshot: harmless.

    A kernel that is resumed from a snapshot of a virtual machine shows in its clocks once the
    host sets them; until then only the seeds' own salt tells two copies apart.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        boot = ""
    monotonic_s = time.monotonic()
    asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - monotonic_s
    return boot, time.time() - monotonic_s, asleep_s


class Forked(Protocol):
    """What must know that it woke up in another process."""

    def after_fork(self) -> None:
        """In the child, before anything else: make locks anew, share nothing with the parent."""


def watch_forks(thing: Forked) -> None:
    """Tell it in every child; it is not kept alive."""
    _FORKED.add(thing)


_FORKED: "weakref.WeakSet[Forked]" = weakref.WeakSet()


def _after_fork() -> None:
    for thing in list(_FORKED):
        thing.after_fork()


os.register_at_fork(after_in_child=_after_fork)
