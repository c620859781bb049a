"""Does this attestation key live in the TPM of that endorsement key? The challenge that shows it.

The owner's side is Python alone: a secret is wrapped so that only a TPM that holds both keys gives
it back (`TpmDevice.activate`). What passes is a line for the policy's file `roots.tpm`; it writes
no policy and opens no connection. Endorsement keys are RSA.

Source: TCG, TPM Library part 1, section 24 (credential protection) and 11.4.10.2 (KDFa); the file
is what `tpm2_activatecredential` reads.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from datetime import datetime

import msgspec
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.tpm_attest import HASHES
from cutlayer.tee.tpm_device import TpmDevice
from cutlayer.tee.tpm_keys import TpmPublic, key_digest, parse_public
from cutlayer.tee.tpm_reader import sized
from cutlayer.tee.tpm_trust import ENDORSEMENT_USAGE, check_key_certificate, key_pem, pinned_keys

__all__ = [
    "ActivationChallenge",
    "ActivationRequest",
    "begin_activation",
    "finish_activation",
    "make_credential",
    "request_activation",
]

_FILE_MAGIC, _FILE_VERSION = 0xBADCC0DE, 1
_SECRET_BYTES = 32
_AES_BITS = (128, 192, 256)


class ActivationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the machine with the TPM sends to the owner."""

    ek: bytes
    """TPM2B_PUBLIC of the endorsement key."""
    ak: bytes
    """TPM2B_PUBLIC of the attestation key."""
    ek_certificate: bytes = b""
    """PEM: the endorsement key's certificate first, its maker's root last; empty where the owner
    knows the endorsement key itself."""


@dataclass(frozen=True, kw_only=True)
class ActivationChallenge:
    """The owner sends `credential` and keeps the rest to himself."""

    credential: bytes
    ak: bytes
    """TPM2B_PUBLIC."""
    secret: bytes = field(repr=False)


def request_activation(device: TpmDevice, ek_certificate: bytes = b"") -> ActivationRequest:
    """The machine's side: both public keys.

    Args:
        device: its TPM.
        ek_certificate: PEM chain, as the TPM's maker gives it.

    Raises:
        ConfigError: the TPM does not answer.
    """
    return ActivationRequest(
        ek=device.endorsement_key(), ak=device.attestation_key(), ek_certificate=ek_certificate
    )


def begin_activation(request: ActivationRequest, roots: bytes, at: datetime) -> ActivationChallenge:
    """The owner's side: check the endorsement key, and challenge.

    Args:
        request: the machine's.
        roots: PEM of TPM makers' roots, or of endorsement keys (public) that the owner knows.
        at: time of the verdict.

    Raises:
        AttestationError: a TPM that nobody vouches for, or keys of the wrong kind.
    """
    ek, ak = parse_public(request.ek), parse_public(request.ak)
    if not ek.is_storage_key:
        raise refused(Refusal.MALFORMED, "the endorsement key is no storage key")
    if not ak.is_attestation_key:
        raise refused(
            Refusal.MALFORMED, "the attestation key may sign anything, or can leave its TPM"
        )
    _check_known(ek, request.ek_certificate, roots, at)
    secret = secrets.token_bytes(_SECRET_BYTES)
    credential = make_credential(ek, ak.name, secret)
    return ActivationChallenge(credential=credential, ak=request.ak, secret=secret)


def _check_known(ek: TpmPublic, chain: bytes, roots: bytes, at: datetime) -> None:
    digest = key_digest(ek.key)
    if digest in pinned_keys(roots):
        return
    if not chain:
        raise refused(
            Refusal.WRONG_ROOT,
            f"endorsement key {digest} came without its maker's certificate and is not known",
        )
    check_key_certificate(ek.key, chain, roots, at, ENDORSEMENT_USAGE)


def finish_activation(challenge: ActivationChallenge, answer: bytes) -> bytes:
    """The owner's side: the attestation key as a PEM block for the policy's file `roots.tpm`.

    Args:
        challenge: what was asked.
        answer: of `TpmDevice.activate`.

    Raises:
        AttestationError: another secret.
    """
    if not hmac.compare_digest(challenge.secret, answer):
        raise refused(Refusal.WRONG_BINDING, "the machine does not know what was sent to its TPM")
    return key_pem(parse_public(challenge.ak).key)


def make_credential(ek: TpmPublic, ak_name: bytes, secret: bytes) -> bytes:
    """TPM2_MakeCredential without a TPM.

    Args:
        ek: RSA storage key.
        ak_name: name of the key that must be beside it.
        secret: at most the size of the endorsement key's hash.

    Raises:
        AttestationError: no RSA storage key.
    """
    # The size is the machine's word: a certificate vouches for the key alone.
    if not isinstance(ek.key, rsa.RSAPublicKey) or ek.symmetric_bits not in _AES_BITS:
        raise refused(Refusal.MALFORMED, "activation wants an RSA endorsement key with AES beside")
    seed = secrets.token_bytes(hashlib.new(ek.hash_name).digest_size)
    algorithm = HASHES[ek.hash_name]()
    oaep = padding.OAEP(padding.MGF1(algorithm), algorithm, label=b"IDENTITY\0")
    inner = _encrypt(_kdfa(ek.hash_name, seed, b"STORAGE", ak_name, ek.symmetric_bits), secret)
    mac_key = _kdfa(ek.hash_name, seed, b"INTEGRITY", b"", 8 * len(seed))
    outer_mac = hmac.digest(mac_key, inner + ak_name, ek.hash_name)
    header = _FILE_MAGIC.to_bytes(4, "big") + _FILE_VERSION.to_bytes(4, "big")
    return header + sized(sized(outer_mac) + inner) + sized(ek.key.encrypt(seed, oaep))


def _encrypt(key: bytes, secret: bytes) -> bytes:
    # A fresh key for one message: TCG sets the first block to zeros.
    encryptor = Cipher(algorithms.AES(key), CFB(bytes(16))).encryptor()
    return encryptor.update(sized(secret)) + encryptor.finalize()


def _kdfa(hash_name: str, key: bytes, label: bytes, context: bytes, num_bits: int) -> bytes:
    """KDFa: SP 800-108 in counter mode with HMAC."""
    fixed = label + b"\0" + context + num_bits.to_bytes(4, "big")
    num_bytes, found, counter = num_bits // 8, b"", 1
    while len(found) < num_bytes:
        found += hmac.digest(key, counter.to_bytes(4, "big") + fixed, hash_name)
        counter += 1
    return found[:num_bytes]
