"""A SEV-SNP chip of the tests' own: ARK, ASK, VCEK or VLEK, and reports in every version."""

import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cutlayer.tee.evidence import Evidence, Platform
from tests.unit.tee.authorities import Authority, Wish, ec_key, issue, rsa_key

AMD = "1.3.6.1.4.1.3704.1"
CHIP = bytes(range(64))
GUIDS = {
    "vcek": "63da758d-e664-4564-adc5-f4b93be8accd",
    "vlek": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
}


@dataclass(frozen=True, kw_only=True)
class Wished:
    """What a report says; the defaults are a good one of version 3."""

    version: int = 3
    policy: int = 0x30000
    report_data: bytes = bytes(64)
    measurement: bytes = b"\x5a" * 48
    tcb: bytes = bytes([4, 0, 0, 0, 0, 0, 22, 213])
    committed_tcb: bytes | None = None
    """None: as `tcb`."""
    flags: int = 0
    """Bits of the signing key."""
    chip: bytes = CHIP
    vmpl: int = 0


@dataclass(frozen=True, kw_only=True)
class SnpChip:
    """Keys and certificates of one chip."""

    ark: Authority
    ask: Authority
    leaf: Authority
    name: str = "vcek"

    @property
    def collateral(self) -> dict[str, bytes]:
        return {self.name: self.leaf.der, "chain": self.ask.pem + self.ark.pem}

    def evidence(
        self, wished: Wished | None = None, collateral: Mapping[str, bytes] | None = None
    ) -> Evidence:
        body = self.report(wished or Wished())
        given = self.collateral if collateral is None else collateral
        return Evidence(platform=Platform.SEV_SNP, body=body, collateral=dict(given))

    def report(self, wished: Wished) -> bytes:
        """Signed, 1184 bytes."""
        signed = report_body(wished)
        assert isinstance(self.leaf.key, ec.EllipticCurvePrivateKey)
        r, s = decode_dss_signature(self.leaf.key.sign(signed, ec.ECDSA(hashes.SHA384())))
        signature = r.to_bytes(72, "little") + s.to_bytes(72, "little")
        return signed + signature.ljust(512, b"\0")

    def table(self) -> bytes:
        """As a host hands it to a guest (`auxblob`)."""
        ders = {self.name: self.leaf.der, "ask": self.ask.der, "ark": self.ark.der}
        entries, place = b"", b""
        start = 24 * (len(ders) + 1)
        for name, der in ders.items():
            guid = uuid.UUID(GUIDS[name]).bytes_le
            entries += guid + struct.pack("<II", start + len(place), len(der))
            place += der
        return entries + bytes(24) + place


@dataclass(frozen=True, kw_only=True)
class LeafWish:
    """How AMD's extensions of the signing key's certificate are."""

    product: str = "Milan-B0"
    tcb: Mapping[int, int] = field(default_factory=lambda: {1: 4, 2: 0, 3: 22, 8: 213})
    """Version by the last number of its OID."""
    chip: bytes | None = CHIP
    provider: str | None = None
    wish: Wish = field(default_factory=Wish)


def make_chip(leaf: LeafWish | None = None, name: str = "vcek") -> SnpChip:
    """A chip under a root of its own."""
    ark = issue("ARK-Test", rsa_key())
    ask = issue("SEV-Test", rsa_key(), ark, Wish(path_length=0))
    return with_leaf(SnpChip(ark=ark, ask=ask, leaf=ask), leaf or LeafWish(), name)


def with_leaf(chip: SnpChip, leaf: LeafWish, name: str = "vcek") -> SnpChip:
    """The same authorities, another signing key."""
    extensions = {f"{AMD}.2": _text(leaf.product)}
    extensions |= {f"{AMD}.3.{i}": _number(value) for i, value in leaf.tcb.items()}
    if leaf.chip is not None:
        extensions[f"{AMD}.4"] = leaf.chip
    if leaf.provider is not None:
        extensions[f"{AMD}.5"] = _text(leaf.provider)
    all_of_them = dict(leaf.wish.extensions or {}) | extensions
    made = replace(leaf.wish, is_authority=False, extensions=all_of_them)
    key = issue("SEV-VCEK", ec_key(), chip.ask, made)
    return SnpChip(ark=chip.ark, ask=chip.ask, leaf=key, name=name)


def report_body(wished: Wished) -> bytes:
    """The 672 bytes that are signed."""
    data = bytearray(0x2A0)
    struct.pack_into("<IIQ", data, 0, wished.version, 7, wished.policy)
    data[0x10:0x20], data[0x20:0x30] = b"F" * 16, b"I" * 16
    struct.pack_into("<II", data, 0x30, wished.vmpl, 1)
    data[0x38:0x40] = wished.tcb
    struct.pack_into("<QI", data, 0x40, 0b100101, wished.flags)
    data[0x50:0x90] = wished.report_data.ljust(64, b"\0")
    data[0x90:0xC0] = wished.measurement
    data[0xC0:0xE0], data[0xE0:0x110], data[0x110:0x140] = b"h" * 32, b"i" * 48, b"a" * 48
    data[0x140:0x160], data[0x160:0x180] = b"r" * 32, b"m" * 32
    data[0x180:0x188] = wished.tcb
    data[0x188:0x18B] = bytes([0x19, 0x01, 0x01])
    data[0x1A0:0x1E0] = wished.chip
    data[0x1E0:0x1E8] = wished.tcb if wished.committed_tcb is None else wished.committed_tcb
    data[0x1E8:0x1EF] = bytes([3, 55, 1, 0, 3, 55, 1])
    data[0x1F0:0x1F8] = wished.tcb
    struct.pack_into("<QQ", data, 0x1F8, 0b1, 0b11)
    return bytes(data)


def _text(value: str) -> bytes:
    return b"\x16" + bytes([len(value)]) + value.encode()


def _number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1)
    return b"\x02" + bytes([len(content)]) + content
