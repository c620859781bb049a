"""The trunk as the client sees it: one method per call, over a link that repeats what is open.

Only `Released` tensors can be sent. It does not compute, save or decide what to do when the
server has lost a step or a session: those errors reach the caller.

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from cutlayer.client.far_rows import FarRows, SessionRows
from cutlayer.client.link import Link, PendingCall, header_of
from cutlayer.client.returned import DecodeCall, ReturnChecks
from cutlayer.client.settings import CheckSettings
from cutlayer.errors import ProtocolError, SessionLost, TransportError
from cutlayer.model.adapters import AdapterState
from cutlayer.privacy.boundary import Released
from cutlayer.privacy.history import ReleasedHistory
from cutlayer.wire.codec import decode
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import (
    Backward,
    BackwardDone,
    CloseSession,
    Commit,
    Committed,
    Decode,
    Forward,
    Kind,
    OpenRun,
    OpenSession,
    PullAdapter,
    RunOpened,
    SessionOpened,
    Step,
    Welcome,
)

__all__ = ["CallNames", "RemoteTrunk", "required_sq_norm", "trunk_sq_norm"]

_CLOSE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class CallNames:
    """How gates name what is in a call of training."""

    rows: Sequence[str]
    """One identifier per row."""
    weights: str
    """Identifier of the weights, unique in the owner's run."""
    below: str
    """The same of all weights before the upper cut, which may be frozen where others learn."""


class RemoteTrunk:
    """The trunk's calls over one link; used from one thread."""

    def __init__(self, link: Link, checks: ReturnChecks | None = None) -> None:
        """All calls go over this link.

        Args:
            link: to the server.
            checks: of what it returns, for whoever uses that; None takes the defaults.
        """
        self._link = link
        self.checks = checks or ReturnChecks(CheckSettings())

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent, over all connections."""
        return self._link.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes of frames received, over all connections."""
        return self._link.bytes_received

    def hello(self) -> Welcome:
        """Connect and compare specs.

        Raises:
            SpecMismatch: the sides describe different models, cuts or formats.
            TransportError: no server within `reconnect_s`.
        """
        return self._link.hello()

    def open_run(self, call: OpenRun) -> int:
        """The newest step that both sides have, where the run now stands."""
        self.checks.require_trust()
        self._link.forget_calls()
        return header_of(self._link.send(Kind.OPEN_RUN, call).result(), RunOpened).step

    def forward(
        self, released: Released, call: Forward, names: CallNames | None = None
    ) -> PendingCall:
        """Send a micro-batch up; the reply's tensor `y` is [N, D].

        Args:
            released: what the trunk is given.
            call: what it is told.
            names: for gates further on, where the trunk is a chain; they do not leave.
        """
        self.checks.require_trust()
        return self._link.send(Kind.FORWARD, call, {"h": released.packed})

    def backward(
        self, released: Released, call: Backward, names: CallNames | None = None
    ) -> PendingCall:
        """Send a gradient up; the reply's tensor `grad` is [N, D] where the head trains."""
        self.checks.require_trust()
        return self._link.send(Kind.BACKWARD, call, {"grad": released.packed})

    def save(self, run_id: str, step: int, finished: Step | None, pin: bool) -> None:
        """Have the server finish `step`, if that is pending, and make it durable."""
        call = Commit(run_id=run_id, commit=finished, save=True, step=step, pin=pin)
        saved = header_of(self._link.send(Kind.COMMIT, call).result(), Committed).step
        if saved != step:
            raise ProtocolError(f"{self.checks.peer} saved step {saved} where {step} was asked for")

    def finish(self, run_id: str, step: int, finished: Step | None) -> None:
        """Have the server finish `step`, the last one, without saving it."""
        call = Commit(run_id=run_id, commit=finished, save=False, step=step)
        reached = header_of(self._link.send(Kind.COMMIT, call).result(), Committed).step
        if reached != step:
            raise ProtocolError(
                f"{self.checks.peer} stands at step {reached} where {step} was finished"
            )

    def pull_adapter(self, run_id: str, step: int) -> AdapterState:
        """The trunk adapter of a saved step of one's own run."""
        reply = self._link.send(Kind.PULL_ADAPTER, PullAdapter(run_id=run_id, step=step)).result()
        return {name: decode(packed).clone() for name, packed in reply.tensors.items()}

    def session_rows(self, run_id: str | None, step: int | None, version: str) -> SessionRows:
        """Rows of a new session, which opens with their first vectors.

        Args:
            run_id: whose trunk adapter is used; None is the base model.
            step: which saved step of that run.
            version: identifier of the weights, for gates further on.
        """
        return FarRows(self, run_id, step)

    def open_session(self, max_lengths: Sequence[int], run_id: str | None, step: int | None) -> str:
        """Open a session with rows of at most `max_lengths` tokens, if any; the session's name."""
        call = OpenSession(max_lengths=list(max_lengths), run_id=run_id, step=step)
        return header_of(
            self._link.send(Kind.OPEN_SESSION, call).result(), SessionOpened
        ).session_id

    def decode(
        self,
        released: Released,
        session_id: str,
        rows: Sequence[int],
        max_lengths: Sequence[int] = (),
    ) -> PendingCall:
        """Send released vectors of some rows; the reply's tensor `y` is [N, D].

        Args:
            released: what follows the rows' cached vectors.
            session_id: from `open_session`.
            rows: numbers of the rows, ascending.
            max_lengths: token limits of rows that are to be opened, 0 for others; none for none.
        """
        self.checks.require_trust()
        call = Decode(
            session_id=session_id,
            rows=list(rows),
            lengths=list(released.rows.lengths),
            positions=list(released.rows.starts),
            max_lengths=list(max_lengths),
        )
        return self._link.send(Kind.DECODE, call, {"h": released.packed})

    def check(
        self,
        released: Released,
        y_ND: Tensor,
        past: Sequence[ReleasedHistory],
        run_id: str | None,
        step: int | None,
    ) -> None:
        """Check what `decode` returned.

        Args:
            released: what was sent.
            y_ND: the reply.
            past: all that each row has released, in the order of the call.
            run_id: whose adapter answers; None is the base model.
            step: which saved step of it.

        Raises:
            PeerMisbehaved: an honest trunk would not have returned it.
        """

        def declare() -> AdapterState | None:
            return None if run_id is None or step is None else self.pull_adapter(run_id, step)

        asked = DecodeCall(released=released, past=past, weights=f"{run_id}:{step}")
        self.checks.decoded(asked, y_ND, declare)

    def close_rows(self, session_id: str, rows: Sequence[int]) -> None:
        """Give the cache of some rows back, if the server is there; nobody waits for its answer."""
        if self._link.is_connected:
            header = CloseSession(session_id=session_id, rows=list(rows))
            self._link.call_once(Frame(kind=Kind.CLOSE_SESSION, header=header), _CLOSE_S)

    def close_session(self, session_id: str) -> None:
        """Give the cache back, if the server is there; else its time to live does."""
        if not self._link.is_connected:
            return
        frame = Frame(kind=Kind.CLOSE_SESSION, header=CloseSession(session_id=session_id))
        with suppress(TransportError, SessionLost):
            self._link.call_once(frame, _CLOSE_S).result()

    def interrupt(self) -> None:
        """Whoever waits for the server fails with TransportError now; any thread may call it."""
        self._link.interrupt()

    def resume(self) -> None:
        """Wait for the server again after an interruption."""
        self._link.resume()

    def close(self) -> None:
        """End the connection."""
        self._link.close()


def trunk_sq_norm(reply: Frame, sender: str = "the server") -> float:
    """The trunk's squared gradient norm from the reply to a step's last BACKWARD."""
    return required_sq_norm(header_of(reply, BackwardDone).trunk_sq_norm, sender)


def required_sq_norm(sent: float | None, sender: str) -> float:
    """The squared gradient norm that a peer sent.

    Raises:
        ProtocolError: it sent none, or one that no gradient has.
    """
    if sent is None or not 0 <= sent < float("inf"):
        raise ProtocolError(f"{sender} sent the squared norm {sent}; a finite one is needed")
    return sent
