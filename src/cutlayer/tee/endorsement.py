"""Who operates an attested place: its provisioned certificate signs for its attested TLS key.

Evidence says what runs, not whose machine runs it: anybody may start the same software. The
authority's word stays necessary, as with plain mutual TLS. It judges no evidence (`ra_tls`).
"""

import ipaddress
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cutlayer.errors import ConfigError, PermissionRefused
from cutlayer.identity.certificates import MALFORMED, load_certificates
from cutlayer.identity.keys import check_key, load_key

__all__ = ["Endorser", "check_endorsement"]

_OID = x509.ObjectIdentifier("2.25.124376811262931713412405741396112409")
"""Below the arc of UUIDs, which needs no registration."""
_LABEL = b"cutlayer attested key 1\0"
_PSS = padding.PSS(mgf=padding.MGF1(SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)
_MAX_CHAIN = 4


class _Endorsement(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    chain: list[bytes]
    """DER; the operator's own first."""
    signature: bytes


_DECODER = msgspec.msgpack.Decoder(_Endorsement)


class Endorser:
    """Signs with the server's provisioned key."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read both files.

        Raises:
            StorageError: a file cannot be read.
            ConfigError: the key is not the certificate's.
        """
        self._chain, self._key = load_certificates(certificate), load_key(key)
        if self._chain[0].public_key() != self._key.public_key():
            raise ConfigError(f"{key} is not the private key of {certificate}")

    def extension(self, key_sha256: bytes) -> x509.UnrecognizedExtension:
        """For the certificate of the TLS key with this digest."""
        data = _LABEL + key_sha256
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            signature = self._key.sign(data, ec.ECDSA(SHA256()))
        else:
            signature = self._key.sign(data, _PSS, SHA256())
        chain = [certificate.public_bytes(Encoding.DER) for certificate in self._chain]
        value = msgspec.msgpack.encode(_Endorsement(chain[:_MAX_CHAIN], signature))
        return x509.UnrecognizedExtension(_OID, value)


def check_endorsement(
    pem: bytes, key_sha256: bytes, authority: Path, host: str, at: datetime
) -> None:
    """Check that a server of the authority, of this name, stands behind an attested certificate.

    Args:
        pem: the attested certificate.
        key_sha256: of its key.
        authority: PEM file of the federation's authority.
        host: name or address under which the server was called.
        at: time of the verdict, UTC.

    Raises:
        PermissionRefused: nobody does, or somebody whom the authority did not certify for it.
        StorageError: the authority's file cannot be read.
    """
    endorsement = _endorsement_in(pem)
    operator = _operator(endorsement, authority, host, at)
    data = _LABEL + key_sha256
    try:
        key = check_key(operator.public_key(), "the operator's certificate")
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(endorsement.signature, data, ec.ECDSA(SHA256()))
        else:
            key.verify(endorsement.signature, data, _PSS, SHA256())
    except (InvalidSignature, ConfigError, *MALFORMED) as error:
        raise PermissionRefused(
            f"{host}: the operator's signature is for another TLS key than the attested one"
        ) from error


def _endorsement_in(pem: bytes) -> _Endorsement:
    try:
        extensions = x509.load_pem_x509_certificate(pem).extensions
        value = extensions.get_extension_for_oid(_OID).value
        assert isinstance(value, x509.UnrecognizedExtension)
        found = _DECODER.decode(value.value)
    except (*MALFORMED, RecursionError) as error:
        raise PermissionRefused(
            "the attested certificate does not say which server of the authority stands behind it"
        ) from error
    if not 1 <= len(found.chain) <= _MAX_CHAIN:
        raise PermissionRefused(f"the operator shows {len(found.chain)} certificates")
    return found


def _operator(
    endorsement: _Endorsement, authority: Path, host: str, at: datetime
) -> x509.Certificate:
    store = Store(load_certificates(authority))
    try:
        own, *intermediates = map(x509.load_der_x509_certificate, endorsement.chain)
        verifier = PolicyBuilder().store(store).time(at).build_server_verifier(_subject(host))
        return verifier.verify(own, intermediates)[0]
    except (VerificationError, *MALFORMED) as error:
        raise PermissionRefused(
            f"{host}: this side refuses the attested server's operator: {error}; "
            "check tls.authority, its dates and its name (connection.server_name)"
        ) from error


def _subject(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)
