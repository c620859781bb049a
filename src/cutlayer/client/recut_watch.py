"""Who wants the cut of a run to move while it trains: a command that waits, or a policy.

It moves nothing (`recut`): between two steps it says that somebody wants it, and then tells them
what came of it. A refusal never ends a training.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from cutlayer.client.recut import RecutReport
from cutlayer.client.recut_desk import Desk
from cutlayer.errors import CutlayerError
from cutlayer.model.partition import Cut

__all__ = ["Policy", "RecutWatch", "RecutWish"]


@dataclass(frozen=True, kw_only=True)
class RecutWish:
    """Where somebody wants the cut."""

    lower: int | None
    """None leaves it where it is."""
    upper: int | None
    shares: bool = False
    """The owner accepts, with this wish, that adapters of blocks that leave become visible."""


class Policy(Protocol):
    """Whoever may want a re-cut by itself, such as `recut_policy.RecutPolicy`."""

    def wanted(self, now_s: float) -> Cut | None:
        """Where the run should go now; None where it is to stay."""

    def moved(self, cut: Cut, now_s: float) -> None:
        """The run has been cut elsewhere."""

    def refused(self, why: str) -> None:
        """What was wanted last cannot be."""


class RecutWatch(AbstractContextManager["RecutWatch"]):
    """Listens while it is open; used from the thread that trains."""

    def __init__(
        self, desk: Desk, policy: Policy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            desk: where commands come to.
            policy: asked between steps.
            clock: seconds, monotonic.
        """
        self._desk = desk
        self._policy = policy
        self._clock = clock
        self._wish: Cut | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._desk.close()

    def is_wanted(self) -> bool:
        """Whether the cut should move before the next step."""
        if not self._desk.has_request:
            self._wish = self._policy.wanted(self._clock())
        return self.has_wish

    @property
    def has_wish(self) -> bool:
        """Whether somebody still waits for `serve`."""
        return self._desk.has_request or self._wish is not None

    def serve(self, move: Callable[[RecutWish], RecutReport]) -> RecutReport | None:
        """Have what is wanted done.

        Args:
            move: does it, or refuses with an error of ours and leaves the run as it was.

        Returns:
            What was done; None where it was refused, or nothing is wanted.
        """
        if self._desk.has_request:
            return self._serve_command(move)
        wish, self._wish = self._wish, None
        if wish is None:
            return None
        try:
            report = move(RecutWish(lower=wish.lower, upper=wish.upper))
        except CutlayerError as error:
            self._policy.refused(str(error))
            return None
        return self._done(report)

    def _serve_command(self, move: Callable[[RecutWish], RecutReport]) -> RecutReport | None:
        request = self._desk.request()
        if request is None:
            return None
        shares = request.share_adapter
        try:
            report = move(RecutWish(lower=request.lower, upper=request.upper, shares=shares))
        except CutlayerError as error:
            self._desk.refused(request, error)
            return None
        self._desk.done(request, report)
        return self._done(report)

    def _done(self, report: RecutReport) -> RecutReport:
        self._policy.moved(Cut(*report.new), self._clock())
        return report
