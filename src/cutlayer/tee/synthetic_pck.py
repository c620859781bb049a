"""Intel's extension of a PCK certificate, in DER, for the simulated chip.

Source: Intel SGX PCK Certificate and CRL Profile Specification, section 1.3.5.
"""

from cryptography.x509 import ObjectIdentifier

from cutlayer.tee.synthetic_quote import TCB_SVN

__all__ = ["FMSPC", "PCE_SVN", "SGX_EXTENSION", "pck_extension"]

SGX_EXTENSION = ObjectIdentifier("1.2.840.113741.1.13.1")
FMSPC = bytes.fromhex("00c07a000000")
"""Family and model of the simulated chip; its TCB info names the same."""
PCE_SVN = 11

# 1.2.840.113741.1.13.1 as DER writes it.
_PREFIX = bytes.fromhex("2a864886f84d010d01")
_INTEGER, _OCTETS, _OID, _ENUMERATED, _SEQUENCE = 0x02, 0x04, 0x06, 0x0A, 0x30


def pck_extension(ppid: bytes) -> bytes:
    """The extension's value.

    Args:
        ppid: 16 bytes that name the chip.
    """
    components = [_entry((2, n), _integer(svn)) for n, svn in enumerate(TCB_SVN, start=1)]
    tcb = [*components, _entry((2, 17), _integer(PCE_SVN)), _entry((2, 18), _tlv(_OCTETS, TCB_SVN))]
    entries = [
        _entry((1,), _tlv(_OCTETS, ppid)),
        _entry((2,), _tlv(_SEQUENCE, b"".join(tcb))),
        _entry((3,), _tlv(_OCTETS, bytes(2))),
        _entry((4,), _tlv(_OCTETS, FMSPC)),
        _entry((5,), _tlv(_ENUMERATED, b"\0")),
    ]
    return _tlv(_SEQUENCE, b"".join(entries))


def _entry(arcs: tuple[int, ...], value: bytes) -> bytes:
    return _tlv(_SEQUENCE, _tlv(_OID, _PREFIX + bytes(arcs)) + value)


def _integer(value: int) -> bytes:
    assert 0 <= value < 128, "one byte of DER"
    return _tlv(_INTEGER, bytes([value]))


def _tlv(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 128:
        return bytes([tag, size]) + value
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + value
