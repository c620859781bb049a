"""Opens channels to attested servers: their evidence is accepted before a byte is sent to them.

It does not judge evidence (`tee`) nor repeat what a lost connection took (`link`).
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cutlayer.client.attested_channel import AttestedChannel, Own, Terms
from cutlayer.client.run_state import RunState
from cutlayer.client.settings import ClientSettings
from cutlayer.client.tee_settings import ClientTeeSettings
from cutlayer.errors import AttestationError, ConfigError, PermissionRefused
from cutlayer.identity.certificates import identify
from cutlayer.storage.audit_log import AuditEntry, AuditEvent
from cutlayer.storage.files import read_private
from cutlayer.storage.vault import key_from_hex
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.challenge import Challenger, Prover
from cutlayer.tee.endorsement import check_endorsement
from cutlayer.tee.exhibit import Side
from cutlayer.tee.key_release import Accepted
from cutlayer.tee.policy import read_policy
from cutlayer.tee.ra_tls import (
    ATTESTED_NAME,
    AttestedCertificate,
    has_evidence,
    verify_certificate,
)
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.verifier import utc_now
from cutlayer.wire.channel import Channel
from cutlayer.wire.endpoints import ConnectionSettings, TlsFiles, read_tls
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.pinned import Pin, shown_certificate

__all__ = ["Attestation", "attestation_of", "level", "note_in"]

Note = Callable[[Accepted | AttestationError], None]


class Attestation:
    """One owner's: policy, own evidence, and the last verdict.

    Attributes:
        note: told of each proof that is accepted, and of each refusal.
    """

    def __init__(
        self, settings: ClientTeeSettings, tls: TlsFiles, now: Callable[[], datetime] = utc_now
    ) -> None:
        """Read policy, roots and keys; the network is not touched.

        Args:
            settings: the section [tee].
            tls: this side's certificate, and the authority that certifies servers' operators.
            now: time of each verdict, UTC.

        Raises:
            ConfigError: the policy or a root is missing or malformed.
            StorageError: a key file is open to others.
        """
        policy = read_policy(settings.policy)
        policy.read_roots()
        self.note: Note = lambda told: None
        self._settings, self._tls, self._now = settings, tls, now
        self._challenger = Challenger(policy, Side.SERVER, now)
        self._own = _own(settings, tls)
        self._last: Accepted | None = None
        self._least: Assurance | None = None
        self._went_without = False
        self._channel: AttestedChannel | None = None

    @property
    def label(self) -> str:
        """The least that any accepted evidence was worth; "none" where a server showed none."""
        return "none" if self._least is None or self._went_without else self._least.label

    @property
    def line(self) -> str:
        """For people, beside every result."""
        if self._last is None or self._went_without:
            return "attestation: none"
        result = self._last.result
        chip = "" if result.claims.chip is None else f", chip {result.claims.chip}"
        return f"attestation: {self.label}, by policy {result.policy}{chip}"

    def open(self, connection: ConnectionSettings) -> Channel:
        """A channel to a server whose certificate is attested; it proves more at HELLO.

        Raises:
            AttestationError: its evidence is refused; nothing was sent to it.
            PermissionRefused: one side does not accept the other's certificate.
            TransportError: nobody answers.
        """
        try:
            try:
                return self._opened(connection)
            except PermissionRefused:
                # It may have renewed its certificate between the two handshakes; once, not twice.
                return self._opened(connection)
        except AttestationError as error:
            self.note(error)
            raise

    def fetch_key(self, name: str) -> bytes:
        """A key that the server at the other end releases to attested clients.

        Raises:
            AttestationError: there is no attested connection, or it was not released to this side.
            ConfigError: the server has no such key.
        """
        if self._channel is None:
            raise refused(Refusal.NO_EVIDENCE, "no attested server was reached yet")
        return self._channel.fetch_key(name)

    def _opened(self, connection: ConnectionSettings) -> Channel:
        der = shown_certificate(connection)
        if not self._settings.required and not has_evidence(der):
            # A later server's proof says nothing of what this one was given.
            self._went_without, self._channel = True, None
            return GrpcChannel(connection)
        certificate = verify_certificate(der, self._challenger.policy, self._now())
        self._check_operator(certificate, connection)
        pin = Pin(certificate=certificate.pem, name=ATTESTED_NAME)
        self._channel = AttestedChannel(GrpcChannel(connection, pin), self._terms(certificate))
        return self._channel

    def _check_operator(
        self, certificate: AttestedCertificate, connection: ConnectionSettings
    ) -> None:
        host = connection.server_name or connection.address.rpartition(":")[0]
        check_endorsement(
            certificate.pem, certificate.key_sha256, self._tls.authority, host, self._now()
        )

    def _terms(self, certificate: AttestedCertificate) -> Terms:
        return Terms(
            challenger=self._challenger,
            server_key_sha256=certificate.key_sha256,
            reattest_s=self._settings.reattest_s,
            own=self._own,
            note=self._told,
        )

    def _told(self, told: Accepted | AttestationError) -> None:
        if isinstance(told, Accepted):
            self._last, level = told, told.result.assurance
            self._least = level if self._least is None else min(self._least, level)
        self.note(told)


def attestation_of(settings: ClientSettings) -> Attestation | None:
    """As the settings say; None where they have no section [tee].

    Raises:
        ConfigError: no TLS, a policy or root that is missing, or settings that exclude each other.
        StorageError: a key file is open to others.
    """
    if settings.tee is None:
        return None
    if settings.connection.tls is None:
        raise ConfigError("[tee] needs TLS: evidence vouches for a TLS key; set connection.tls")
    if settings.tee.adapter_key_file is not None and settings.federation is not None:
        raise ConfigError(
            "tee.adapter_key_file does not work in a federation: its rounds' adapters are all "
            "members'; remove it"
        )
    return Attestation(settings.tee, settings.connection.tls)


def level(attestation: Attestation | None) -> str:
    """What stands beside every result: the least accepted evidence's worth, or "none"."""
    return "none" if attestation is None else attestation.label


def note_in(state: RunState, attestation: Attestation | None) -> None:
    """Have verdicts written to the audit log of a run; a refusal is on disk at once."""
    if attestation is None:
        return

    def note(told: Accepted | AttestationError) -> None:
        state.audit.record(_entry(told, state.run_id))
        if isinstance(told, AttestationError):
            state.audit.flush()

    attestation.note = note


def _entry(told: Accepted | AttestationError, run_id: str) -> AuditEntry:
    if isinstance(told, AttestationError):
        error = type(told).__name__
        return AuditEntry(event=AuditEvent.REFUSED, who="server", run=run_id, error=error)
    return AuditEntry(
        event=AuditEvent.ATTESTED,
        who="server",
        run=run_id,
        assurance=told.result.assurance.label,
        policy=told.result.policy_digest,
    )


def _own(settings: ClientTeeSettings, tls: TlsFiles) -> Own:
    _, certificate, _ = read_tls(tls)
    holder = identify(certificate)
    attester, key_file = settings.attester, settings.adapter_key_file
    return Own(
        tls_key_sha256=holder.tls_key_sha256,
        name=holder.name,
        prover=None if attester is None else Prover(attester, Side.CLIENT),
        adapter_key=None if key_file is None else _read_key(key_file),
    )


def _read_key(path: Path) -> bytes:
    try:
        return bytes(key_from_hex(read_private(path)))
    except ValueError as error:
        raise ConfigError(f"{path} {error}") from error
