"""What a server proves of itself on each connection, and what it wants proved by the client.

It listens to nobody (`doors`), computes nothing and makes no evidence (`tee`).
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import msgspec

from cutlayer.errors import AttestationError, ConfigError, CutlayerError, ProtocolError
from cutlayer.server.audit import Audit
from cutlayer.server.owner_vaults import OwnerVaults
from cutlayer.server.tee_settings import ServerTeeSettings
from cutlayer.storage.audit_log import AuditEvent
from cutlayer.storage.files import read_private
from cutlayer.storage.vault import key_from_hex
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.challenge import Challenger, Prover, read_nonce
from cutlayer.tee.door import AttestedDoor
from cutlayer.tee.endorsement import Endorser
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.exhibit import Side
from cutlayer.tee.key_release import Accepted, adapter_job, named_job, release
from cutlayer.tee.policy import read_policy
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from cutlayer.wire.attest_messages import Challenge, Key, KeyRequest, Proof
from cutlayer.wire.channel import Peer
from cutlayer.wire.endpoints import ListenSettings
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Hello, Kind, Welcome

__all__ = ["PeerAttestation", "ServerAttestation", "attestation_of", "peer_attestation"]

_log = logging.getLogger(__name__)
_KINDS = frozenset({Kind.CHALLENGE, Kind.EVIDENCE, Kind.KEY_REQUEST, Kind.KEY})
_FREE = frozenset({Kind.CLOSE_SESSION})
"""Gives back what was lent; needs no fresh evidence."""
_KEY_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_KEY_LIFETIME = timedelta(minutes=10)
_LABEL_LIFETIME = timedelta(minutes=10)
"""Evidence does not change, but what it is worth ends with its chains and lists."""


@dataclass(frozen=True, kw_only=True)
class _Label:
    """What some evidence was worth when it was looked at."""

    text: str
    evidence: Evidence
    until: datetime


class ServerAttestation:
    """Of the whole server: its TLS key, its evidence, its policy for clients. Thread-safe."""

    def __init__(
        self,
        settings: ServerTeeSettings,
        listen: ListenSettings,
        audit: Audit,
        vaults: OwnerVaults | None = None,
    ) -> None:
        """Make the attested certificate.

        Args:
            settings: the section [tee].
            listen: for the provisioned certificate, which stands behind the attested one.
            audit: where clients' evidence is noted.
            vaults: what takes owners' keys; None takes none.

        Raises:
            ConfigError: this machine cannot attest, or a policy is missing or malformed.
        """
        if listen.tls is None:
            raise ConfigError("[tee] needs TLS: evidence vouches for a TLS key; set listen.tls")
        self.settings, self.audit, self.vaults = settings, audit, vaults
        self.challenger = _challenger(settings)
        self.prover = Prover(settings.attester, Side.SERVER)
        endorser = Endorser(listen.tls.certificate, listen.tls.key)
        self.door = AttestedDoor(self.prover.attest, endorser.extension)
        self._label: _Label | None = None

    @property
    def label(self) -> str:
        """What the evidence in the certificate is worth to a stranger without a policy."""
        known, evidence, now = self._label, self.door.evidence, self.door.now()
        if known is None or known.evidence is not evidence or now >= known.until:
            # Chains of certificates take long, and every status asks.
            known = _Label(
                text=_worth(evidence, now), evidence=evidence, until=now + _LABEL_LIFETIME
            )
            self._label = known
        return known.text

    def own_certificate(self) -> tuple[bytes, bytes]:
        """Key and certificate, PEM, for the listener."""
        return self.door.shown()

    def prove(self, nonce: str, spec: dict[str, str | int]) -> bytes:
        """Evidence for a client's nonce.

        Raises:
            AttestationError: a nonce of the wrong form, or this machine cannot attest now.
        """
        try:
            return self.prover.prove(read_nonce(nonce), self.door.key_sha256, spec)
        except AttestationError:
            raise
        except CutlayerError as error:
            _log.error("cannot attest: %s", error)
            raise refused(
                Refusal.NO_EVIDENCE, "the server cannot attest now; its log says why"
            ) from error

    def named_key(self, name: str) -> bytes:
        """A key of the folder.

        Raises:
            ConfigError: there is none of this name.
            StorageError: its file is open to others.
        """
        folder = self.settings.key_folder
        if folder is None or not _KEY_NAME.fullmatch(name) or not (folder / f"{name}.key").exists():
            raise ConfigError(f"this server releases no key {name!r:.80} (tee.key_folder)")
        try:
            return bytes(key_from_hex(read_private(folder / f"{name}.key")))
        except ValueError as error:
            raise ConfigError(f"key {name!r} of this server is malformed") from error


class PeerAttestation:
    """Of one connection: what was proved on it, in both directions."""

    def __init__(
        self, server: ServerAttestation | None, peer: Peer, now_s: Callable[[], float]
    ) -> None:
        self._server, self._peer, self._now_s = server, peer, now_s
        shared = None if server is None else server.challenger
        self._challenger = None if shared is None else shared.for_connection()
        self._spec: dict[str, str | int] = {}
        self._nonce = b""
        self._accepted: Accepted | None = None
        self._accepted_s = 0.0

    def welcome(self, hello: Hello, welcome: Welcome) -> Welcome:
        """The same with evidence for the client's nonce, and a nonce for the client's own.

        Raises:
            AttestationError: a malformed nonce, or this machine cannot attest now.
        """
        if self._server is None:
            return welcome
        self._spec, self._accepted = dict(hello.spec), None
        proof = self._server.prove(hello.nonce, self._spec)
        return msgspec.structs.replace(welcome, proof=proof, challenge=self._next_nonce())

    def answer(self, frame: Frame) -> Frame | None:
        """The answer to a call of attestation; None for every other call that may go on.

        Raises:
            AttestationError: the client has to prove something first, or did not.
            ProtocolError: tensors where none belong.
        """
        if frame.kind not in _KINDS:
            if frame.kind not in _FREE:
                self._require()
            return None
        if self._server is None:
            raise refused(
                Refusal.NO_EVIDENCE, "this server has no [tee] section: it proves nothing"
            )
        if frame.tensors:
            raise ProtocolError(f"{frame.kind.name} carries tensors, expected none")
        header = frame.header
        if isinstance(header, Challenge):
            proof = self._server.prove(header.nonce, self._spec)
            return Frame(Kind.EVIDENCE, Proof(proof=proof))
        if isinstance(header, Proof):
            return Frame(Kind.CHALLENGE, Challenge(nonce=self._judged(self._server, header)))
        if isinstance(header, KeyRequest):
            return Frame(Kind.KEY, Key(sealed=self._released(self._server, header)))
        assert isinstance(header, Key)
        self._take(self._server, header)
        return Frame(Kind.KEY, Key(sealed=b""))

    def _next_nonce(self) -> str:
        self._nonce = b"" if self._challenger is None else self._challenger.draw()
        return self._nonce.hex()

    def _require(self) -> None:
        if self._server is None or self._challenger is None:
            return
        if self._accepted is None:
            raise refused(
                Refusal.NO_EVIDENCE, "this server takes calls of attested clients alone; set [tee]"
            )
        limit_s = self._server.settings.client_reattest_s
        if self._now_s() - self._accepted_s > limit_s:
            raise refused(
                Refusal.STALE,
                f"the client's evidence is older than {limit_s:g} s; attest again, "
                "or set tee.reattest_s below that",
            )

    def _judged(self, server: ServerAttestation, shown: Proof) -> str:
        """The client's next nonce."""
        if self._challenger is None:
            return ""
        try:
            self._accepted = self._challenger.judge(
                shown.proof, self._nonce, self._peer.tls_key_sha256, self._spec
            )
        except AttestationError as error:
            self._accepted = None
            _log.warning("evidence of %s (%s): %s", self._peer.name, self._peer.address, error)
            server.audit.record(AuditEvent.REFUSED, self._peer, error=type(error).__name__)
            raise
        self._accepted_s = self._now_s()
        label = self._accepted.result.assurance.label
        server.audit.record(AuditEvent.ATTESTED, self._peer, assurance=label)
        return self._next_nonce()

    def _released(self, server: ServerAttestation, asked: KeyRequest) -> bytes:
        self._require()
        if self._accepted is None:
            raise refused(
                Refusal.NO_EVIDENCE, "keys are for attested clients; set tee.client_policy here"
            )
        key, until = server.named_key(asked.name), self._accepted.result.at + _KEY_LIFETIME
        until += timedelta(seconds=self._now_s() - self._accepted_s)
        return release(key, self._accepted, named_job(asked.name), until)

    def _take(self, server: ServerAttestation, given: Key) -> None:
        self._require()
        if server.vaults is None:
            raise refused(Refusal.WRONG_BINDING, "this front keeps no runs; give keys to replicas")
        job = adapter_job(self._peer.name)
        key = server.prover.sealing_key.open(given.sealed, Side.SERVER, job, server.door.now())
        server.vaults.keep(self._peer.name, key)
        server.audit.record(AuditEvent.KEY_TAKEN, self._peer)


def attestation_of(
    settings: ServerTeeSettings | None,
    listen: ListenSettings,
    audit: Audit,
    vaults: OwnerVaults | None = None,
) -> ServerAttestation | None:
    """As the settings say; None where they have no section [tee].

    Raises:
        ConfigError: as `ServerAttestation`.
    """
    return None if settings is None else ServerAttestation(settings, listen, audit, vaults)


def peer_attestation(
    server: ServerAttestation | None, peer: Peer, now_s: Callable[[], float] = time.monotonic
) -> PeerAttestation:
    """Of a new connection."""
    return PeerAttestation(server, peer, now_s)


def _worth(evidence: Evidence, now: datetime) -> str:
    if evidence.platform is Platform.SIMULATED:
        return Assurance.SIMULATED.label
    try:
        claims = claims_of(evidence, Trust(at=now))
    except AttestationError as error:
        return f"unverified ({error.refusal})"
    # No policy has looked at it, and every policy refuses this.
    return "debug, worth nothing" if claims.is_debug else claims.assurance.label


def _challenger(settings: ServerTeeSettings) -> Challenger | None:
    if settings.client_policy is None:
        return None
    policy = read_policy(settings.client_policy)
    policy.read_roots()
    return Challenger(policy, Side.CLIENT)
