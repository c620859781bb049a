"""What a verifier needs beside a synthetic quote, in Intel's formats, signed by the test authority.

TCB info, identity of the quoting enclave, two revocation lists, as dcap-qvl's QuoteCollateralV3.
"""

from collections.abc import Mapping
from datetime import datetime

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from cutlayer.tee.synthetic_authority import SyntheticAuthority
from cutlayer.tee.synthetic_pck import FMSPC, PCE_SVN
from cutlayer.tee.synthetic_quote import QE_MR_SIGNER, TCB_SVN

__all__ = ["TcbState", "raw_signature", "synthetic_collateral"]

_EVALUATION = 1
_TCB_DATE = "2025-01-01T00:00:00Z"


class TcbState(msgspec.Struct, frozen=True, kw_only=True):
    """What the simulated vendor says of the simulated chip."""

    status: str = "UpToDate"
    """Any of Intel's words."""
    advisories: tuple[str, ...] = ()
    is_unknown: bool = False
    """Every known level is above the chip's: no level matches."""
    is_revoked: bool = False
    """The chip's certificate is on the list."""


def synthetic_collateral(
    authority: SyntheticAuthority, state: TcbState, start: datetime, end: datetime
) -> bytes:
    """QuoteCollateralV3 as JSON, valid from `start` to `end`."""
    revoked = authority.pck if state.is_revoked else None
    tcb_info = msgspec.json.encode(_tcb_info(state, start, end))
    identity = msgspec.json.encode(_identity(start, end))
    key = authority.tcb_signer.key
    return msgspec.json.encode(
        {
            "pck_crl_issuer_chain": (authority.platform_ca.pem + authority.root.pem).decode(),
            "root_ca_crl": authority.revocation_list(authority.root, start, end).hex(),
            "pck_crl": authority.revocation_list(authority.platform_ca, start, end, revoked).hex(),
            "tcb_info_issuer_chain": authority.tcb_chain_pem.decode(),
            "tcb_info": tcb_info.decode(),
            "tcb_info_signature": raw_signature(key, tcb_info).hex(),
            "qe_identity_issuer_chain": authority.tcb_chain_pem.decode(),
            "qe_identity": identity.decode(),
            "qe_identity_signature": raw_signature(key, identity).hex(),
        }
    )


def raw_signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA over SHA-256 as r and s of 32 bytes, the form of quotes and of Intel's JSON."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _tcb_info(state: TcbState, start: datetime, end: datetime) -> Mapping[str, object]:
    beyond = 1 if state.is_unknown else 0
    components = [{"svn": svn + beyond} for svn in TCB_SVN]
    level = {
        "tcb": {
            "sgxtcbcomponents": components,
            "pcesvn": PCE_SVN,
            "tdxtcbcomponents": components,
        },
        "tcbDate": _TCB_DATE,
        "tcbStatus": state.status,
        "advisoryIDs": state.advisories,
    }
    module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    # The second byte of the TD's TCB is the version of the module's family.
    levels = [{"tcb": {"isvsvn": TCB_SVN[0]}, "tcbDate": _TCB_DATE, "tcbStatus": "UpToDate"}]
    family = {"id": f"TDX_{TCB_SVN[1]:02d}", **module, "tcbLevels": levels}
    return {
        "id": "TDX",
        "version": 3,
        **_validity(start, end),
        "fmspc": FMSPC.hex().upper(),
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": _EVALUATION,
        "tdxModule": module,
        "tdxModuleIdentities": [family],
        "tcbLevels": [level],
    }


def _identity(start: datetime, end: datetime) -> Mapping[str, object]:
    return {
        "id": "TD_QE",
        "version": 2,
        **_validity(start, end),
        "tcbEvaluationDataNumber": _EVALUATION,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": QE_MR_SIGNER.hex().upper(),
        "isvprodid": 2,
        "tcbLevels": [{"tcb": {"isvsvn": 4}, "tcbDate": _TCB_DATE, "tcbStatus": "UpToDate"}],
    }


def _validity(start: datetime, end: datetime) -> dict[str, str]:
    return {"issueDate": f"{start:%Y-%m-%dT%H:%M:%SZ}", "nextUpdate": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
