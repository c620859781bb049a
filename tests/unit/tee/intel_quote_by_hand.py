"""The signatures of a TDX quote of version 4 without Intel's collateral, which some samples lack.

Half a verdict only: nothing here looks at revocation or firmware. Source: Intel, TDX DCAP Quoting
Library API, appendix A.3 (quote format).
"""

import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

_SIGNED_BYTES = 48 + 584
_AUTH_DATA = _SIGNED_BYTES + 4
_QE_REPORT = _AUTH_DATA + 64 + 64 + 6
_QE_SIGNATURE = _QE_REPORT + 384
_QE_AUTH = _QE_SIGNATURE + 64


def check_quote_signatures(quote: bytes, pck: x509.Certificate) -> None:
    """The machine's key signed the quoting enclave, which holds the key that signed the quote.

    Raises:
        InvalidSignature: one of them does not hold.
    """
    raw_key = quote[_AUTH_DATA + 64 : _AUTH_DATA + 128]
    point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\4" + raw_key)
    _check(point, quote[_AUTH_DATA : _AUTH_DATA + 64], quote[:_SIGNED_BYTES])
    report = quote[_QE_REPORT:_QE_SIGNATURE]
    machine = pck.public_key()
    assert isinstance(machine, ec.EllipticCurvePublicKey)
    _check(machine, quote[_QE_SIGNATURE:_QE_AUTH], report)
    num_auth = int.from_bytes(quote[_QE_AUTH : _QE_AUTH + 2], "little")
    auth = quote[_QE_AUTH + 2 : _QE_AUTH + 2 + num_auth]
    assert report[320:352] == hashlib.sha256(raw_key + auth).digest()


def _check(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> None:
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
