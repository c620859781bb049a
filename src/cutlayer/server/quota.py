"""How many bytes and vectors each client may send in a day. It knows no frames or connections.

The limit of vectors bounds how many equations a client gets about weights that are not its own
(docs/private-models.md).
"""

import threading
import time
from collections.abc import Callable

from cutlayer.errors import PermissionRefused

__all__ = ["DailyQuota"]

_DAY_S = 86_400


class DailyQuota:
    """Counts per client and UTC day; None is no limit. The count starts anew with the process."""

    def __init__(
        self,
        max_bytes: int | None,
        max_vectors: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_bytes, self._max_vectors = max_bytes, max_vectors
        self._clock = clock
        self._day = -1
        self._used: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def charge(self, client: str, num_bytes: int, num_vectors: int = 0) -> None:
        """Count a call before it runs; a refused one counts nothing.

        Args:
            client: its name.
            num_bytes: of the call's tensors.
            num_vectors: hidden states and gradients in it.

        Raises:
            PermissionRefused: they do not fit in what is left of the day.
        """
        with self._lock:
            self._start_new_day()
            bytes_, vectors = self._used.get(client, (0, 0))
            bytes_, vectors = bytes_ + num_bytes, vectors + num_vectors
            _check(client, bytes_, self._max_bytes, "bytes")
            _check(client, vectors, self._max_vectors, "vectors")
            self._used[client] = bytes_, vectors

    def used_bytes(self, client: str) -> int:
        """Bytes of today."""
        with self._lock:
            self._start_new_day()
            return self._used.get(client, (0, 0))[0]

    def used_vectors(self, client: str) -> int:
        """Vectors of today."""
        with self._lock:
            self._start_new_day()
            return self._used.get(client, (0, 0))[1]

    def _start_new_day(self) -> None:
        day = int(self._clock() // _DAY_S)
        if day != self._day:
            self._day = day
            self._used.clear()


def _check(client: str, used: int, most: int | None, unit: str) -> None:
    if most is not None and used > most:
        raise PermissionRefused(
            f"{client} has used its {most} {unit} of today; it starts anew at 00:00 UTC, or ask "
            f"the operator to raise limits.max_client_{unit}_per_day"
        )
