"""Both ends of a challenge: evidence for a nonce, and the verdict over it. Each nonce is used once.

It sends nothing (`client.attested_channel`, `server.attestation`) and keeps no clock of its own.
"""

import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from hashlib import sha256

from cutlayer.tee.attest import attest
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.binding import Binding
from cutlayer.tee.evidence import Evidence
from cutlayer.tee.exhibit import Exhibit, Side, session_digest
from cutlayer.tee.key_release import Accepted, SealingKey
from cutlayer.tee.policy import Policy
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.verifier import utc_now
from cutlayer.tee.verify import verify

__all__ = ["Challenger", "Prover", "read_nonce"]

Spec = Mapping[str, str | int]
_NONCE_BYTES = 32
_NUM_REMEMBERED = 4096
_NUM_OPEN = 64
"""Answered at once by a server; by a client at its next call, on a connection of its own."""


class Prover:
    """Makes evidence about this process. Thread-safe: platforms quote one at a time."""

    def __init__(self, settings: AttesterSettings, side: Side) -> None:
        """Nothing is asked of the platform yet.

        Raises:
            ConfigError: no source has that name.
        """
        ATTESTERS.get(settings.source)
        self._settings, self._side = settings, side
        self.sealing_key = SealingKey()
        self._lock = threading.Lock()

    def attest(self, report_data: bytes) -> Evidence:
        """Evidence that binds 32 bytes.

        Raises:
            ConfigError: this machine is no such platform.
        """
        with self._lock:
            return attest(self._settings, report_data)

    def prove(self, nonce: bytes, tls_key_sha256: bytes, spec: Spec) -> bytes:
        """The packed answer to a challenge.

        Args:
            nonce: the challenger's.
            tls_key_sha256: of this side's TLS key on that connection.
            spec: agreed on it.

        Raises:
            ConfigError: this machine is no such platform.
        """
        digest = session_digest(spec, self._side, self.sealing_key.public)
        binding = Binding(tls_key_sha256=tls_key_sha256, nonce=nonce, spec_digest=digest)
        evidence = self.attest(binding.report_data())
        return Exhibit(evidence=evidence, sealing_key=self.sealing_key.public).pack()


class Challenger:
    """Draws nonces and judges what comes back. Thread-safe."""

    def __init__(self, policy: Policy, side: Side, now: Callable[[], datetime] = utc_now) -> None:
        """
        Args:
            policy: what is accepted.
            side: of those who are challenged.
            now: time of each verdict, UTC.
        """
        self.policy, self.now = policy, now
        self._side = side
        self._lock = threading.Lock()
        self._open: deque[bytes] = deque(maxlen=_NUM_OPEN)
        self._seen: deque[bytes] = deque(maxlen=_NUM_REMEMBERED)

    def for_connection(self) -> "Challenger":
        """One whose open nonces no other connection pushes out; evidence is shown once to all."""
        made = Challenger(self.policy, self._side, self.now)
        made._lock, made._seen = self._lock, self._seen
        return made

    def draw(self) -> bytes:
        """A nonce, to be answered once."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        with self._lock:
            self._open.append(nonce)
        return nonce

    def judge(self, proof: bytes, nonce: bytes, tls_key_sha256: bytes, spec: Spec) -> Accepted:
        """The verdict over an answer; whatever it is, the nonce is used up.

        Args:
            proof: packed by the peer's `Prover`.
            nonce: drawn here for it.
            tls_key_sha256: of the peer's TLS key, as this side sees it.
            spec: agreed with the peer.

        Raises:
            AttestationError: refused; `refusal` names the reason.
            ConfigError: a root of the policy cannot be read.
        """
        self._redeem(nonce)
        exhibit = Exhibit.unpack(proof)
        self._refuse_repeated(proof)
        digest = session_digest(spec, self._side, exhibit.sealing_key)
        binding = Binding(tls_key_sha256=tls_key_sha256, nonce=nonce, spec_digest=digest)
        result = verify(exhibit.evidence, self.policy, self.now(), binding.report_data())
        return Accepted(result=result, side=self._side, sealing_key=exhibit.sealing_key)

    def _redeem(self, nonce: bytes) -> None:
        with self._lock:
            if nonce not in self._open:
                raise refused(Refusal.REPLAYED, "this nonce was used already, or never asked for")
            self._open.remove(nonce)

    def _refuse_repeated(self, proof: bytes) -> None:
        # All of it: Azure's body alone is the same from one boot to the next. A proof in other
        # words than before fails at its nonce; this gives the plain case its name.
        mark = sha256(proof).digest()
        with self._lock:
            if mark in self._seen:
                raise refused(Refusal.REPLAYED, "the peer shows evidence that it showed before")
            self._seen.append(mark)


def read_nonce(text: str) -> bytes:
    """A peer's nonce.

    Raises:
        AttestationError: not 32 bytes in hex.
    """
    try:
        nonce = bytes.fromhex(text)
    except ValueError:
        nonce = b""
    if len(nonce) != _NONCE_BYTES:
        raise refused(Refusal.MALFORMED, f"a nonce has {_NONCE_BYTES} bytes in hex")
    return nonce
