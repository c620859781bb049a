"""A channel that sends nothing but HELLO until the other side has proved what it runs.

It opens no connection (`attested`) and judges no evidence itself (`tee`). The nonce of HELLO asks
for the first proof; later ones are asked for by CHALLENGE, on a timer and at each round.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from cutlayer.client.link import header_of
from cutlayer.errors import AttestationError, CutlayerError, TransportError
from cutlayer.tee.challenge import Challenger, Prover, read_nonce
from cutlayer.tee.exhibit import Side
from cutlayer.tee.key_release import Accepted, adapter_job, named_job, release
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.wire.attest_messages import Challenge, Key, KeyRequest, Proof
from cutlayer.wire.channel import Channel
from cutlayer.wire.federation_messages import SendUpdate
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import CloseSession, Hello, Kind, OpenRun, Welcome
from cutlayer.wire.wrapped import WrappedChannel

__all__ = ["AttestedChannel", "Own", "Terms"]

H = TypeVar("H", bound=Header)
_KEY_LIFETIME = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Own:
    """What this side proves and gives."""

    tls_key_sha256: bytes
    """Of its certificate."""
    name: str
    """In its certificate."""
    prover: Prover | None
    adapter_key: bytes | None

    def __repr__(self) -> str:
        return f"Own(name={self.name!r})"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a channel needs to know to attest."""

    challenger: Challenger
    server_key_sha256: bytes
    """Of the certificate that this connection is pinned to."""
    reattest_s: float
    own: Own
    note: Callable[[Accepted | AttestationError], None]
    """Told of each proof that is accepted, and of each refusal."""
    now_s: Callable[[], float] = time.monotonic


class AttestedChannel(WrappedChannel):
    """Implements `wire.channel.Channel` over one that is pinned to an attested certificate."""

    def __init__(self, inner: Channel, terms: Terms) -> None:
        """Nothing is sent yet."""
        super().__init__(inner)
        self._terms = terms
        self._lock = threading.Lock()
        self._spec: dict[str, str | int] = {}
        self._nonce = ""
        self._accepted: Accepted | None = None
        self._accepted_s = 0.0
        self._is_fresh = False

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        """Send a frame, once the other side has proved itself recently enough.

        Raises:
            AttestationError: it did not; the channel is closed, and the frame has not left.
            TransportError: it went away while it was asked.
        """
        try:
            with self._lock:
                if isinstance(frame.header, Hello):
                    return self._greet(frame, frame.header)
                self._ensure(frame)
                self._is_fresh = False
        except AttestationError as error:
            self._accepted = None
            self._inner.close()
            self._terms.note(error)
            raise
        return self._inner.call(frame, deadline_s)

    def fetch_key(self, name: str) -> bytes:
        """A key that the server releases to attested clients.

        Raises:
            AttestationError: it was not released to this place.
            ConfigError: the server has no such key.
        """
        prover = self._terms.own.prover
        if prover is None:
            raise refused(Refusal.NO_EVIDENCE, "keys are for attested clients; set tee.attester")
        sealed = self._ask(Kind.KEY_REQUEST, KeyRequest(name=name), Key).sealed
        now = self._terms.challenger.now()
        return prover.sealing_key.open(sealed, Side.CLIENT, named_job(name), now)

    def _greet(self, frame: Frame, hello: Hello) -> "Future[Frame]":
        # The nonce is drawn here: it counts once, and for this connection alone.
        nonce = self._terms.challenger.draw()
        self._spec, self._accepted = dict(hello.spec), None
        hello = Hello(nonce=nonce.hex(), spec=hello.spec, leaves=hello.leaves)
        answered: Future[Frame] = Future()
        try:
            reply = self._inner.call(Frame(Kind.HELLO, hello)).result()
        except CutlayerError as error:
            answered.set_exception(error)
            return answered
        welcome = header_of(reply, Welcome)
        self._judge(welcome.proof, nonce)
        self._nonce = welcome.challenge
        self._show_own()
        if not welcome.place:
            self._give_key()
        answered.set_result(reply)
        return answered

    def _ensure(self, frame: Frame) -> None:
        if isinstance(frame.header, CloseSession):
            # Gives back what was lent; it is no reason to ask, and no failure of its own.
            if self._accepted is None:
                raise TransportError("the server is not attested; its session ends by itself")
            return
        if self._accepted is None:
            raise refused(Refusal.NO_EVIDENCE, "the server has proved nothing yet; say HELLO first")
        is_late = self._terms.now_s() - self._accepted_s > self._terms.reattest_s
        if is_late or (_begins_round(frame) and not self._is_fresh):
            self._challenge()

    def _challenge(self) -> None:
        nonce = self._terms.challenger.draw()
        shown = self._ask(Kind.CHALLENGE, Challenge(nonce=nonce.hex()), Proof)
        self._judge(shown.proof, nonce)
        self._show_own()

    def _judge(self, proof: bytes, nonce: bytes) -> None:
        terms = self._terms
        accepted = terms.challenger.judge(proof, nonce, terms.server_key_sha256, self._spec)
        self._accepted, self._accepted_s, self._is_fresh = accepted, terms.now_s(), True
        terms.note(accepted)

    def _show_own(self) -> None:
        if not self._nonce:
            return
        own = self._terms.own
        if own.prover is None:
            raise refused(
                Refusal.NO_EVIDENCE, "the server wants this side's evidence too; set tee.attester"
            )
        proof = own.prover.prove(read_nonce(self._nonce), own.tls_key_sha256, self._spec)
        self._nonce = self._ask(Kind.EVIDENCE, Proof(proof=proof), Challenge).nonce

    def _give_key(self) -> None:
        own, accepted = self._terms.own, self._accepted
        if own.adapter_key is None or accepted is None:
            return
        until = self._terms.challenger.now() + _KEY_LIFETIME
        sealed = release(own.adapter_key, accepted, adapter_job(own.name), until)
        self._ask(Kind.KEY, Key(sealed=sealed), Key)

    def _ask(self, kind: Kind, header: Header, answer: type[H]) -> H:
        return header_of(self._inner.call(Frame(kind, header)).result(), answer)


def _begins_round(frame: Frame) -> bool:
    """A round's run, or an update that goes to the coordinator (a repeated call brings none)."""
    header = frame.header
    is_run = isinstance(header, OpenRun) and header.federation is not None
    return is_run or (isinstance(header, SendUpdate) and bool(frame.tensors))
