"""The attestation report of AMD SEV-SNP, versions 2 to 5, and its TCB version numbers.

It parses; signatures and chain are checked in `verifiers.sev_snp`.
"""

import struct
from dataclasses import dataclass

from cutlayer.tee.refusal import Refusal, refused

__all__ = ["REPORT_BYTES", "SnpReport", "Tcb", "parse_snp_report", "parse_tcb"]

REPORT_BYTES = 1184
_SIGNED_BYTES = 0x2A0
_VERSIONS = range(2, 6)
_ECDSA_P384_SHA384 = 1
_POLICY_SMT, _POLICY_MIGRATION_AGENT, _POLICY_DEBUG, _POLICY_SINGLE_SOCKET = 16, 18, 19, 20
_PLATFORM_BITS = {
    0: "smt",
    1: "tsme",
    2: "ecc",
    3: "rapl-disabled",
    4: "ciphertext-hiding",
    5: "alias-check-complete",
    7: "tio",
}


@dataclass(frozen=True, kw_only=True)
class Tcb:
    """Security version numbers of the chip's firmware, by name."""

    boot_loader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None
    """Of the first mutable code; Turin alone has it."""

    def __str__(self) -> str:
        fmc = "" if self.fmc is None else f"fmc {self.fmc}, "
        return (
            f"{fmc}boot loader {self.boot_loader}, tee {self.tee}, snp {self.snp}, "
            f"microcode {self.microcode}"
        )


@dataclass(frozen=True, kw_only=True)
class SnpReport:
    """Fields under the names of AMD's SEV-SNP ABI (document 56860, table ATTESTATION_REPORT)."""

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: bytes
    """Eight bytes; `parse_tcb` names them by product."""
    platform_info: int
    signing_key: int
    """0 the chip's own key (VCEK), 1 the provider's (VLEK)."""
    is_chip_key_masked: bool
    is_author_key_present: bool
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    """What the signing key is derived from: the host may lower it, never raise it."""
    cpuid: tuple[int, int, int] | None
    """Family, model, stepping; from version 3 on."""
    chip_id: bytes
    """64 bytes; zeros where the platform's owner hides it."""
    committed_tcb: bytes
    """What firmware can no longer fall back behind."""
    current_firmware: tuple[int, int, int]
    """Major, minor, build."""
    committed_firmware: tuple[int, int, int]
    launch_tcb: bytes
    launch_mitigations: int | None
    """Bit vector; from version 5 on."""
    current_mitigations: int | None
    signed: bytes
    """What the signature is over."""
    signature: tuple[int, int]
    """r and s."""

    @property
    def is_debug(self) -> bool:
        """The host may read and write this guest's memory."""
        return bool(self.policy >> _POLICY_DEBUG & 1)

    @property
    def is_migratable(self) -> bool:
        """A migration agent, another guest, may hold this guest's memory keys."""
        return bool(self.policy >> _POLICY_MIGRATION_AGENT & 1)

    @property
    def is_smt_allowed(self) -> bool:
        """Its cores may share hardware threads."""
        return bool(self.policy >> _POLICY_SMT & 1)

    @property
    def is_single_socket(self) -> bool:
        """It may run on one socket alone."""
        return bool(self.policy >> _POLICY_SINGLE_SOCKET & 1)

    @property
    def platform_flags(self) -> tuple[str, ...]:
        """Names of the bits that are set in `platform_info`."""
        return tuple(name for bit, name in _PLATFORM_BITS.items() if self.platform_info >> bit & 1)


def parse_snp_report(data: bytes) -> SnpReport:
    """A report as firmware wrote it.

    Args:
        data: 1184 bytes.

    Raises:
        AttestationError: malformed, or of a version that nobody here knows.

    Source: AMD document 56860, SEV Secure Nested Paging Firmware ABI, ATTESTATION_REPORT.
    """
    if len(data) != REPORT_BYTES:
        raise refused(
            Refusal.MALFORMED,
            f"{len(data)} bytes are no SEV-SNP report ({REPORT_BYTES}); of another platform?",
        )
    version = _u32(data, 0)
    if version not in _VERSIONS:
        raise refused(Refusal.MALFORMED, f"SEV-SNP report of version {version}; known: 2 to 5")
    if _u32(data, 0x34) != _ECDSA_P384_SHA384:
        raise refused(Refusal.MALFORMED, f"SEV-SNP signature algorithm {_u32(data, 0x34)}")
    flags = _u32(data, 0x48)
    return SnpReport(
        version=version,
        guest_svn=_u32(data, 0x04),
        policy=_u64(data, 0x08),
        family_id=data[0x10:0x20],
        image_id=data[0x20:0x30],
        vmpl=_u32(data, 0x30),
        current_tcb=data[0x38:0x40],
        platform_info=_u64(data, 0x40),
        signing_key=flags >> 2 & 0b111,
        is_chip_key_masked=bool(flags >> 1 & 1),
        is_author_key_present=bool(flags & 1),
        report_data=data[0x50:0x90],
        measurement=data[0x90:0xC0],
        host_data=data[0xC0:0xE0],
        id_key_digest=data[0xE0:0x110],
        author_key_digest=data[0x110:0x140],
        report_id=data[0x140:0x160],
        report_id_ma=data[0x160:0x180],
        reported_tcb=data[0x180:0x188],
        cpuid=(data[0x188], data[0x189], data[0x18A]) if version >= 3 else None,
        chip_id=data[0x1A0:0x1E0],
        committed_tcb=data[0x1E0:0x1E8],
        current_firmware=(data[0x1EA], data[0x1E9], data[0x1E8]),
        committed_firmware=(data[0x1EE], data[0x1ED], data[0x1EC]),
        launch_tcb=data[0x1F0:0x1F8],
        launch_mitigations=_u64(data, 0x1F8) if version >= 5 else None,
        current_mitigations=_u64(data, 0x200) if version >= 5 else None,
        signed=data[:_SIGNED_BYTES],
        signature=_signature(data[_SIGNED_BYTES:]),
    )


def parse_tcb(data: bytes, product: str) -> Tcb:
    """Names for the eight bytes of a TCB version.

    Args:
        data: of the report.
        product: of the chip's certificate, such as "Milan-B0"; Turin orders the bytes otherwise.
    """
    if product.startswith("Turin"):
        return Tcb(fmc=data[0], boot_loader=data[1], tee=data[2], snp=data[3], microcode=data[7])
    return Tcb(boot_loader=data[0], tee=data[1], snp=data[6], microcode=data[7])


def _signature(data: bytes) -> tuple[int, int]:
    # r and s little-endian in 72 bytes each, then zeros: nothing unsigned may differ.
    if any(data[144:]):
        raise refused(Refusal.MALFORMED, "SEV-SNP report with bytes after its signature")
    return int.from_bytes(data[:72], "little"), int.from_bytes(data[72:144], "little")


def _u32(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", data, offset)[0])


def _u64(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<Q", data, offset)[0])
