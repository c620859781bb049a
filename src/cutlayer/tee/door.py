"""A TLS key that exists in this process alone, and its attested certificate, renewed in time.

It listens to nobody (`wire.grpc_listener` asks it for the certificate to show).
"""

import logging
import threading
from collections.abc import Callable
from datetime import datetime

from cryptography import x509

from cutlayer.errors import CutlayerError
from cutlayer.identity.keys import new_key
from cutlayer.tee.binding import Binding
from cutlayer.tee.evidence import Evidence
from cutlayer.tee.ra_tls import LIFETIME, key_digest, key_pem, make_certificate
from cutlayer.tee.verifier import utc_now

__all__ = ["AttestedDoor"]

_log = logging.getLogger(__name__)
_RENEW_AFTER = LIFETIME / 2
_RETRY_AFTER = LIFETIME / 48


class AttestedDoor:
    """The key stays for the life of the process: evidence on open connections binds it. The
    certificate and the evidence in it are made anew at half their life. Thread-safe.

    Attributes:
        key_sha256: digest of the TLS key.
        evidence: that the certificate of now carries.
    """

    def __init__(
        self,
        attest: Callable[[bytes], Evidence],
        endorse: Callable[[bytes], x509.UnrecognizedExtension],
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """Make the key and the first certificate.

        Args:
            attest: evidence that binds what it is given.
            endorse: the operator's extension for a key's digest.
            now: the clock, UTC.

        Raises:
            ConfigError: this machine cannot attest.
        """
        self._attest, self._endorse, self.now = attest, endorse, now
        self._key = new_key()
        self.key_sha256 = key_digest(self._key.public_key())
        self._lock = threading.Lock()
        self._pem = self._made()
        self._renew_at = now() + _RENEW_AFTER

    def __repr__(self) -> str:
        return f"AttestedDoor(key_sha256={self.key_sha256.hex()})"

    def shown(self) -> tuple[bytes, bytes]:
        """Key and certificate, PEM, for the TLS library; never raises once it is open."""
        with self._lock:
            now = self.now()
            if now >= self._renew_at:
                self._renew(now)
            return key_pem(self._key), self._pem

    def _renew(self, now: datetime) -> None:
        try:
            self._pem = self._made()
        except CutlayerError as error:
            # Clients refuse the old one when it ends; until then it is as good as it was.
            _log.warning("keeping the attested certificate: %s", error)
            self._renew_at = now + _RETRY_AFTER
            return
        _log.info("renewed the attested certificate")
        self._renew_at = now + _RENEW_AFTER

    def _made(self) -> bytes:
        binding = Binding(tls_key_sha256=self.key_sha256, nonce=b"", spec_digest=b"")
        self.evidence = self._attest(binding.report_data())
        extensions = (self._endorse(self.key_sha256),)
        return make_certificate(self._key, self.evidence, self.now(), extensions)
