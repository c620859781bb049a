"""GPUs that Python makes under a test's root: reports, manifests and tokens of any content."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.nvidia_token import ISSUER
from cutlayer.tee.xml_canonical import canonical, parse_xml
from tests.unit.tee.authorities import AT, Authority, Wish, ec_key, issue

DRIVER, VBIOS = "600.1", "96.00.74.00.20"
FWID = bytes(range(48))
KID = "a key of a test"
_DICE = "2.23.133.5.4.1"
_DSIG = "http://www.w3.org/2000/09/xmldsig#"


def measured(index: int) -> str:
    """What a good GPU measures at NVIDIA's index."""
    return hashlib.sha384(bytes([index])).hexdigest()


def _signature(key: object, data: bytes) -> bytes:
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA384())))
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, its maker, and the maker's attestation service."""

    root: Authority = field(default_factory=lambda: issue("root", ec_key()))
    name: str = "GH100 A01 GSP FMC LF"
    fwid: bytes = FWID
    """That the certificate names."""
    serial: int = 7

    @cached_property
    def middle(self) -> Authority:
        return issue("GH100 A01 GSP BROM", ec_key(), self.root, Wish(serial=self.serial))

    @cached_property
    def leaf(self) -> Authority:
        dice = bytes.fromhex("303d06096086480165030402020430") + self.fwid
        wish = Wish(is_authority=False, extensions={_DICE: dice})
        return issue(self.name, ec_key(), self.middle, wish)

    @property
    def chain(self) -> bytes:
        return self.leaf.pem + self.middle.pem + self.root.pem

    def report(
        self, nonce: bytes = bytes(32), measurements: Mapping[int, str] | None = None
    ) -> bytes:
        """SPDM request and response, signed."""
        values = measurements or {index: measured(index) for index in range(64)}
        records = b"".join(_block(index, value) for index, value in values.items())
        fields = {3: DRIVER.encode() + b"\0", 6: bytes.fromhex("0074009620000000"), 20: FWID}
        opaque = b"".join(_little(k, 2) + _little(len(v), 2) + v for k, v in fields.items())
        head = bytes.fromhex("11600000") + bytes([len(values)]) + _little(len(records), 3)
        response = head + records + bytes(32) + _little(len(opaque), 2) + opaque
        signed = bytes.fromhex("11e001ff") + nonce + b"\0" + response
        return signed + _signature(self.leaf.key, signed)

    def evidence(self, body: bytes | None = None, **more: bytes) -> Evidence:
        """A report with what verifies it."""
        collateral = {"chain": self.chain, **more}
        return Evidence(platform=Platform.NVIDIA, body=body or self.report(), collateral=collateral)

    def manifest(
        self, version: str = DRIVER, golden: Mapping[int, list[str]] | None = None
    ) -> bytes:
        """A signed manifest of the measurements from 1 to 3."""
        golden = golden or {index: [measured(index), "ff" * 48] for index in range(1, 4)}
        rows = "".join(_resource(index, values) for index, values in golden.items())
        return self.signed_xml(
            f'<S xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" '
            f'xmlns:h="http://www.w3.org/2001/04/xmlenc#sha384">'
            f'<Meta colloquialVersion="{version}" product="GH100"/><Payload>{rows}</Payload>@</S>'
        )

    def signed_xml(self, text: str, uri: str = "", first: str = "enveloped-signature") -> bytes:
        """The document with an enveloped signature in the place of the only `@`.

        Args:
            text: of the document.
            uri: of what is signed, as it is stated.
            first: the first transform, as it is stated.
        """
        digest = hashlib.sha384(canonical(parse_xml(text.replace("@", "").encode()))).digest()
        c14n = "http://www.w3.org/2006/12/xml-c14n11"
        more = "http://www.w3.org/2001/04/xmldsig-more#"
        info = (
            f'<d:SignedInfo><d:CanonicalizationMethod Algorithm="{c14n}"/>'
            f'<d:SignatureMethod Algorithm="{more}ecdsa-sha384"/><d:Reference URI="{uri}">'
            f'<d:Transforms><d:Transform Algorithm="{_DSIG}{first}"/>'
            f'<d:Transform Algorithm="{c14n}"/></d:Transforms>'
            f'<d:DigestMethod Algorithm="{more}sha384"/>'
            f"<d:DigestValue>{_base64(digest)}</d:DigestValue></d:Reference></d:SignedInfo>"
        )
        chain = "".join(
            f"<d:X509Certificate>{_base64(one.der)}</d:X509Certificate>"
            for one in (self.leaf, self.middle, self.root)
        )
        rest = f"<d:KeyInfo><d:X509Data>{chain}</d:X509Data></d:KeyInfo>"
        whole = text.replace("@", f'<d:Signature xmlns:d="{_DSIG}">{info}@{rest}</d:Signature>')
        everything = parse_xml(whole.replace("@", "").encode()).walk()
        (signed,) = (one for one in everything if one.tag == "d:SignedInfo")
        value = _signature(self.leaf.key, canonical(signed))
        return whole.replace("@", f"<d:SignatureValue>{_base64(value)}</d:SignatureValue>").encode()

    @property
    def key_set(self) -> bytes:
        """Of the service."""
        return self.key_set_of(self.leaf, self.middle, self.root)

    def key_set_of(self, *certificates: Authority) -> bytes:
        """Of any chain."""
        chain = [_base64(one.der) for one in certificates]
        return json.dumps({"keys": [{"kid": KID, "kty": "EC", "x5c": chain}]}).encode()

    def token(self, claims: Mapping[str, object], alg: str = "ES384") -> str:
        """One JWT."""
        parts = [{"alg": alg, "kid": KID}, claims]
        signed = ".".join(_url64(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{_url64(_signature(self.leaf.key, signed.encode()))}"

    def tokens(self, nonce: str = "00" * 32, is_good: bool = True, **changes: object) -> bytes:
        """The service's answer about two GPUs; `changes` are of both GPUs' claims."""
        dates = {"iss": ISSUER, "eat_nonce": nonce, **_dates()}
        gpus = {f"GPU-{i}": self.token({**dates, **_good_claims(i), **changes}) for i in range(2)}
        digests = {
            name: ["DIGEST", ["SHA-256", hashlib.sha256(text.encode()).hexdigest()]]
            for name, text in gpus.items()
        }
        overall = {**dates, "x-nvidia-overall-att-result": is_good, "submods": digests}
        return json.dumps([["JWT", self.token(overall)], gpus]).encode()

    def token_evidence(self, body: bytes | None = None) -> Evidence:
        """The service's answer with its key set."""
        collateral = {"jwks": self.key_set}
        return Evidence(platform=Platform.NVIDIA, body=body or self.tokens(), collateral=collateral)


def _dates() -> dict[str, int]:
    now_s = int(AT.timestamp())
    return {"iat": now_s, "nbf": now_s, "exp": now_s + 3600}


def _good_claims(index: int) -> dict[str, object]:
    return {
        "ueid": str(1000 + index),
        "hwmodel": "GH100",
        "measres": "success",
        "dbgstat": "disabled",
        "secboot": True,
        "x-nvidia-gpu-driver-version": DRIVER,
        "x-nvidia-gpu-vbios-version": VBIOS,
        "x-nvidia-gpu-attestation-report-nonce-match": True,
    }


def _block(index: int, value: str) -> bytes:
    data = b"\1" + _little(len(value) // 2, 2) + bytes.fromhex(value)
    return bytes([index + 1, 1]) + _little(len(data), 2) + data


def _resource(index: int, values: list[str]) -> str:
    hashed = " ".join(f'h:Hash{i}="{value}"' for i, value in enumerate(values))
    return f'<Resource type="Measurement" active="True" index="{index}" {hashed}/>'


def _little(number: int, size: int) -> bytes:
    return number.to_bytes(size, "little")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
