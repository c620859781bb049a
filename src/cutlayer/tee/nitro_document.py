"""AWS Nitro's attestation document: COSE_Sign1 around a CBOR map, both ways with `/dev/nsm`.

It parses and encodes; signature and chain are checked in `verifiers.nitro`.

Source: AWS, aws-nitro-enclaves-nsm-api, `docs/attestation_process.md`; RFC 9052, section 4.2.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO

import cbor2

from cutlayer.errors import ConfigError
from cutlayer.tee.refusal import Refusal, refused

__all__ = ["NitroDocument", "decode_reply", "encode_request", "parse_nitro_document"]

_MAX_BYTES = 64 << 10
_COSE_SIGN1_TAG = 18
_ALGORITHM, _ES384 = 1, -35
_SIGNATURE_BYTES = 96
_MAX_PCRS = 32
_PCR_BYTES = 48
_MAX_AUTHORITIES = 15
_MAX_FIELD_BYTES = 1024
_CBOR_ERRORS = (cbor2.CBORDecodeError, ValueError, TypeError, RecursionError, ArithmeticError)


@dataclass(frozen=True, kw_only=True)
class NitroDocument:
    """What the hypervisor's security module says about an enclave."""

    module_id: str
    made_at: datetime
    pcrs: dict[int, bytes]
    """SHA-384 values by index; 0 is the image, all zeros in debug mode."""
    certificate: bytes
    """DER of the module's key."""
    authorities: list[bytes]
    """DER, the root first, as the document has them."""
    public_key: bytes
    """Empty where the enclave gave none; so are the next two."""
    user_data: bytes
    nonce: bytes
    signed: bytes
    """What the signature is over (Sig_structure of COSE)."""
    signature: tuple[int, int]
    """r and s."""


def parse_nitro_document(data: bytes) -> NitroDocument:
    """A document as the security module wrote it.

    Args:
        data: COSE_Sign1, with or without its CBOR tag.

    Raises:
        AttestationError: malformed.
    """
    if len(data) > _MAX_BYTES:
        raise refused(Refusal.MALFORMED, f"a Nitro document of {len(data)} bytes")
    envelope = _decode(data, "envelope")
    if isinstance(envelope, cbor2.CBORTag) and envelope.tag == _COSE_SIGN1_TAG:
        envelope = envelope.value
    if not isinstance(envelope, list | tuple) or len(envelope) != 4:
        raise refused(Refusal.MALFORMED, "this is no COSE_Sign1; of another platform?")
    protected, _, payload, signature = envelope
    if not (isinstance(protected, bytes) and isinstance(payload, bytes)):
        raise refused(Refusal.MALFORMED, "COSE_Sign1 without header or payload")
    if not isinstance(signature, bytes) or len(signature) != _SIGNATURE_BYTES:
        raise refused(Refusal.MALFORMED, "COSE_Sign1 without a signature of 96 bytes")
    if _decode(protected, "header") != {_ALGORITHM: _ES384}:
        raise refused(Refusal.MALFORMED, "a Nitro document is signed with ES384 and nothing else")
    half = _SIGNATURE_BYTES // 2
    return _document(
        _decode(payload, "payload"),
        signed=cbor2.dumps(["Signature1", protected, b"", payload]),
        signature=(int.from_bytes(signature[:half]), int.from_bytes(signature[half:])),
    )


def encode_request(user_data: bytes) -> bytes:
    """The request for a document that binds `user_data`, as `/dev/nsm` reads it."""
    fields = {"user_data": user_data, "nonce": None, "public_key": None}
    return cbor2.dumps({"Attestation": fields})


def decode_reply(data: bytes) -> bytes:
    """The document in the security module's reply.

    Raises:
        ConfigError: the module refused, or its answer is not of its protocol.
    """
    try:
        reply = cbor2.loads(data)
    except _CBOR_ERRORS as error:
        raise ConfigError(f"the Nitro security module's answer is no CBOR: {error}") from error
    if isinstance(reply, dict) and isinstance(reply.get("Error"), str):
        raise ConfigError(f"the Nitro security module refused: {reply['Error']}")
    attestation = reply.get("Attestation") if isinstance(reply, dict) else None
    document = attestation.get("document") if isinstance(attestation, dict) else None
    if not isinstance(document, bytes):
        raise ConfigError("the Nitro security module answered without a document")
    return document


def _decode(data: bytes, what: str) -> object:
    """One CBOR item without bytes after it."""
    stream = BytesIO(data)
    try:
        decoder = cbor2.CBORDecoder(stream)
        value: object = decoder.decode()
    except _CBOR_ERRORS as error:
        raise refused(Refusal.MALFORMED, f"Nitro {what} is no CBOR: {error}") from error
    if stream.read(1):
        raise refused(Refusal.MALFORMED, f"bytes after the Nitro {what}")
    return value


def _document(payload: object, signed: bytes, signature: tuple[int, int]) -> NitroDocument:
    if not isinstance(payload, dict):
        raise refused(Refusal.MALFORMED, "a Nitro document's payload is a map")
    if payload.get("digest") != "SHA384":
        raise refused(Refusal.MALFORMED, "Nitro PCRs of another digest than SHA384")
    module_id = payload.get("module_id")
    if not isinstance(module_id, str) or not module_id or len(module_id) > _MAX_FIELD_BYTES:
        raise refused(Refusal.MALFORMED, "a Nitro document without module_id")
    return NitroDocument(
        module_id=module_id,
        made_at=_made_at(payload.get("timestamp")),
        pcrs=_pcrs(payload.get("pcrs")),
        certificate=_bytes(payload.get("certificate"), "certificate"),
        authorities=_authorities(payload.get("cabundle")),
        public_key=_optional(payload.get("public_key"), "public_key"),
        user_data=_optional(payload.get("user_data"), "user_data"),
        nonce=_optional(payload.get("nonce"), "nonce"),
        signed=signed,
        signature=signature,
    )


def _made_at(value: object) -> datetime:
    try:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("not a whole number")
        return datetime.fromtimestamp(value / 1000, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise refused(Refusal.MALFORMED, f"a Nitro document's timestamp: {error}") from error


def _pcrs(value: object) -> dict[int, bytes]:
    if not isinstance(value, dict) or not 1 <= len(value) <= _MAX_PCRS:
        raise refused(Refusal.MALFORMED, "a Nitro document without PCRs")
    for index, pcr in value.items():
        is_index = isinstance(index, int) and 0 <= index < _MAX_PCRS
        if not is_index or not isinstance(pcr, bytes) or len(pcr) != _PCR_BYTES:
            raise refused(Refusal.MALFORMED, "a Nitro PCR that is no SHA-384 value")
    if 0 not in value:
        raise refused(Refusal.MALFORMED, "a Nitro document without PCR 0")
    return value


def _authorities(value: object) -> list[bytes]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= _MAX_AUTHORITIES:
        raise refused(Refusal.MALFORMED, "a Nitro document without its cabundle")
    return [_bytes(item, "cabundle") for item in value]


def _bytes(value: object, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise refused(Refusal.MALFORMED, f"a Nitro document whose {what} is no byte string")
    return value


def _optional(value: object, what: str) -> bytes:
    return b"" if value is None else _bytes(value, what)
