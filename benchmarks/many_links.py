"""One emulated link for each of several clients to the same server.

It does not know what travels.
"""

from contextlib import ExitStack
from types import TracebackType

from benchmarks.link import Counters, DelayingProxy, LinkProfile

__all__ = ["Links"]


class Links:
    """One emulated link for each client to the same server; a context manager."""

    def __init__(self, target_port: int, profile: LinkProfile, count: int) -> None:
        with ExitStack() as stack:
            self._proxies = [
                stack.enter_context(DelayingProxy(target_port, profile)) for _ in range(count)
            ]
            self._stack = stack.pop_all()

    @property
    def ports(self) -> list[int]:
        """Where the clients connect, in order."""
        return [proxy.port for proxy in self._proxies]

    def set_link(self, profile: LinkProfile) -> None:
        """Change all links."""
        for proxy in self._proxies:
            proxy.set_link(profile)

    def counters(self) -> Counters:
        """Bytes of all links together since they were opened."""
        counted = [proxy.counters() for proxy in self._proxies]
        return Counters(
            bytes_up=sum(one.bytes_up for one in counted),
            bytes_down=sum(one.bytes_down for one in counted),
            connections=sum(one.connections for one in counted),
        )

    def __enter__(self) -> "Links":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
