"""TPMs for tests: a real one in software (swtpm), and quotes that Python makes without any."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.tpm_attest import TpmKey
from cutlayer.tee.tpm_device import TpmDevice, TpmQuoteFiles
from cutlayer.tee.tpm_reader import sized

AK_ATTRIBUTES = 0x50072
"""fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign."""


@contextmanager
def software_tpm() -> Iterator[TpmDevice]:
    """A TPM of its own, empty and switched on; gone at the end."""
    if shutil.which("swtpm") is None or shutil.which("tpm2_quote") is None:
        pytest.skip("swtpm and tpm2-tools are not installed")
    # Not pytest's folder: a socket's path holds 107 bytes.
    with tempfile.TemporaryDirectory(prefix="swtpm-") as folder:
        socket = Path(folder, "tpm")
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}"]
        command += ["--flags", "not-need-init,startup-clear"]
        command += ["--server", f"type=unixio,path={socket}"]
        command += ["--ctrl", f"type=unixio,path={socket}.ctrl"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            _wait_for(socket)
            yield TpmDevice(f"swtpm:path={socket}")
        finally:
            process.terminate()
            process.wait(timeout=10)


def _wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline_s, "swtpm did not start"
        time.sleep(0.01)


def extend(device: TpmDevice, index: int) -> None:
    """Measure something else into a PCR, as another kernel would."""
    command = ["tpm2_pcrextend", "-T", device.tcti, f"{index}:sha256={'ab' * 32}"]
    subprocess.run(command, check=True)


def quote_with(device: TpmDevice, folder: Path, scheme: str, bank: str) -> TpmQuoteFiles:
    """A quote over PCRs 0 and 7 with the nonce 0, 1 .. 31 by a key of any scheme: `ak.pub` beside.

    Args:
        device: a TPM of a test.
        folder: an empty one.
        scheme: as `tpm2_createprimary -G` has it.
        bank: of the PCRs; also the signature's hash.
    """
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
    key = ["-C", "e", "-G", scheme, "-a", attributes, "-c", "ak.ctx"]
    nonce = bytes(range(32)).hex()
    files = ["-m", "message", "-s", "signature", "-o", "pcrs", "-F", "values"]
    kind = ["-g", bank, "--scheme", scheme.split(":")[1].split("-")[0]]
    for command in (
        ["tpm2_createprimary", *key],
        ["tpm2_flushcontext", "-t"],
        ["tpm2_readpublic", "-c", "ak.ctx", "-f", "tss", "-o", "ak.pub"],
        ["tpm2_flushcontext", "-t"],
        ["tpm2_quote", "-c", "ak.ctx", "-l", f"{bank}:0,7", *kind, "-q", nonce, *files],
    ):
        with_device = [*command, "-T", device.tcti]
        subprocess.run(with_device, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return TpmQuoteFiles(
        message=(folder / "message").read_bytes(),
        signature=(folder / "signature").read_bytes(),
        pcrs=(folder / "pcrs").read_bytes(),
    )


def public_area(key: TpmKey, attributes: int = AK_ATTRIBUTES) -> bytes:
    """TPM2B_PUBLIC of a key without a TPM."""
    assert isinstance(key, ec.EllipticCurvePublicKey)
    numbers = key.public_numbers()
    head = bytes.fromhex("0023000b") + attributes.to_bytes(4, "big") + sized(b"")
    parameters = bytes.fromhex("00100018000b00030010")
    point = sized(numbers.x.to_bytes(32, "big")) + sized(numbers.y.to_bytes(32, "big"))
    return sized(head + parameters + point)


EK_ATTRIBUTES = 0x300B2
"""fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt."""


def rsa_public_area(key: rsa.RSAPublicKey, attributes: int = EK_ATTRIBUTES) -> bytes:
    """TPM2B_PUBLIC of an endorsement key without a TPM."""
    head = bytes.fromhex("0001000b") + attributes.to_bytes(4, "big") + sized(bytes(32))
    parameters = bytes.fromhex("0006008000430010080000000000")
    modulus = key.public_numbers().n.to_bytes(256, "big")
    return sized(head + parameters + sized(modulus))


def quote_message(pcrs: Mapping[int, bytes], nonce: bytes) -> bytes:
    """TPMS_ATTEST over PCRs of the SHA-256 bank."""
    bits = sum(1 << index for index in pcrs).to_bytes(3, "little")
    digest = sha256(b"".join(pcrs[index] for index in sorted(pcrs))).digest()
    head = bytes.fromhex("ff5443478018") + sized(b"\0\x0b" + bytes(32)) + sized(nonce)
    clock = bytes(8) + bytes(4) + bytes(4) + b"\1" + bytes(8)
    selection = bytes.fromhex("00000001000b03") + bits
    return head + clock + selection + sized(digest)


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """TPMT_SIGNATURE, ECDSA with SHA-256."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return bytes.fromhex("0018000b") + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))


@dataclass(frozen=True, kw_only=True)
class QuotedTpm:
    """A quote that Python made, and the key that a policy would pin."""

    evidence: Evidence
    key: ec.EllipticCurvePrivateKey
    pcrs: Mapping[int, bytes]


def quoted_tpm(nonce: bytes = bytes(32), attributes: int = AK_ATTRIBUTES) -> QuotedTpm:
    """Evidence without a TPM: only for what a real one would never make, and where none is."""
    key = ec.generate_private_key(ec.SECP256R1())
    pcrs = {index: bytes([index]) * 32 for index in range(8)}
    message = quote_message(pcrs, nonce)
    collateral = {
        "signature": sign(key, message),
        "ak": public_area(key.public_key(), attributes),
        "pcrs": b"".join(pcrs.values()),
    }
    evidence = Evidence(platform=Platform.TPM, body=message, collateral=collateral)
    return QuotedTpm(evidence=evidence, key=key, pcrs=pcrs)


@dataclass(frozen=True, kw_only=True)
class Maker:
    """A TPM maker's root, in a test's memory."""

    key: ec.EllipticCurvePrivateKey
    root: x509.Certificate

    @property
    def pem(self) -> bytes:
        """For a policy."""
        return self.root.public_bytes(Encoding.PEM)

    def certify(self, key: TpmKey, usage: x509.ObjectIdentifier | None, at: datetime) -> bytes:
        """PEM chain of a key, as makers write them: no subject, critical names."""
        name = x509.DirectoryName(_name("TPM of a test"))
        builder = _builder(x509.Name([]), self.root.subject, key, at)
        builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=True)
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        leaf = builder.sign(self.key, hashes.SHA256())
        return leaf.public_bytes(Encoding.PEM) + self.pem


def maker(at: datetime) -> Maker:
    """A new one; its certificates hold from a day before `at` to a day after."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Maker of a test")
    builder = _builder(name, name, key.public_key(), at)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return Maker(key=key, root=builder.sign(key, hashes.SHA256()))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: TpmKey, at: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - timedelta(days=1))
        .not_valid_after(at + timedelta(days=1))
    )
