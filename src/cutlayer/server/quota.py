"""How many bytes each client may send in a day. It does not know frames or connections."""

import threading
import time
from collections.abc import Callable

from cutlayer.errors import PermissionRefused

__all__ = ["DailyQuota"]

_DAY_S = 86_400


class DailyQuota:
    """Counts per client and UTC day; None is no limit. The count starts anew with the process."""

    def __init__(self, max_bytes: int | None, clock: Callable[[], float] = time.time) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._day = -1
        self._used: dict[str, int] = {}
        self._lock = threading.Lock()

    def charge(self, client: str, num_bytes: int) -> None:
        """Count bytes of a call before it runs.

        Raises:
            PermissionRefused: they do not fit in what is left of the day.
        """
        with self._lock:
            self._start_new_day()
            used = self._used.get(client, 0) + num_bytes
            if self._max_bytes is not None and used > self._max_bytes:
                raise PermissionRefused(
                    f"{client} has used its {self._max_bytes} bytes of today; it starts anew at "
                    "00:00 UTC, or ask the operator to raise limits.max_client_bytes_per_day"
                )
            self._used[client] = used

    def used_bytes(self, client: str) -> int:
        """Bytes of today."""
        with self._lock:
            self._start_new_day()
            return self._used.get(client, 0)

    def _start_new_day(self) -> None:
        day = int(self._clock() // _DAY_S)
        if day != self._day:
            self._day = day
            self._used.clear()
