"""The table of refusals: what is wrong with the evidence, and the name that it must be refused by.

A platform's rows follow its base. Rows over published evidence need it beside the checkout.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache

from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.quote import COLLATERAL
from cutlayer.tee.refusal import Refusal
from cutlayer.tee.synthetic_quoter import Pretence, SyntheticQuoter
from tests.unit.tee.authorities import AT, ec_key, issue, revocation_list
from tests.unit.tee.azure_worlds import AzureVm
from tests.unit.tee.evidence_samples import Sample, published, sample
from tests.unit.tee.judged_cases import (
    Case,
    Change,
    accepting,
    at,
    body,
    bound,
    collateral,
    cut,
    flip,
    later,
    named,
    policy,
    rooted,
)
from tests.unit.tee.nitro_worlds import Module
from tests.unit.tee.snp_worlds import LeafWish, SnpChip, Wished, make_chip, with_leaf

__all__ = ["BASES", "ROWS", "Row", "base"]

R = Refusal
PINNED = {
    "tdx": "mr_td",
    "sgx": "mr_enclave",
    "nitro": "pcr0",
    "sev-snp": "measurement",
    "azure": "measurement",
    "simulated": "mr_td",
    "tpm": "pcr4",
}
DATA = bytes(range(32))
"""What the made ones bind."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to be wrong."""

    base: str
    what: str
    change: Change
    refusal: R


def _rows(base: str, *rows: tuple[str, Change, R]) -> list[Row]:
    return [Row(base=base, what=what, change=change, refusal=name) for what, change, name in rows]


@cache
def _chip() -> SnpChip:
    return make_chip()


@cache
def _module() -> Module:
    return Module()


@cache
def _vm() -> AzureVm:
    return AzureVm(chip=_chip())


@cache
def _quoter() -> SyntheticQuoter:
    return SyntheticQuoter.create()


@cache
def _stranger() -> bytes:
    return issue("stranger", ec_key()).pem


def _made(evidence: Evidence, root: bytes) -> Sample:
    return Sample(evidence=evidence, at=AT, roots={evidence.platform: root})


BASES: dict[str, Callable[[], Sample]] = {
    "published tdx": lambda: sample("published tdx"),
    "published sgx": lambda: sample("published sgx"),
    "published nitro": lambda: sample("published nitro"),
    "published sev-snp": lambda: sample("published sev-snp"),
    "sev-snp": lambda: _made(_chip().evidence(Wished(report_data=DATA)), _chip().ark.pem),
    "nitro": lambda: _made(_module().evidence({"user_data": DATA}), _module().root.pem),
    "azure": lambda: _made(_vm().evidence(DATA), _chip().ark.pem),
    "tpm": lambda: sample("tpm"),
    "simulated": lambda: _made(_quoter().evidence(bytes(48), DATA, AT), _quoter().root_pem),
}


@cache
def base(name: str) -> Case:
    """The case that each row of this base changes."""
    return accepting(BASES[name](), PINNED[name.removeprefix("published ")])


def _edited(key: str, old: str, new: str) -> Change:
    """Intel's collateral with one field edited."""

    def edit(data: bytes) -> bytes:
        found = json.loads(data)
        assert old in found[key]
        found[key] = found[key].replace(old, new, 1)
        return json.dumps(found).encode()

    return collateral(COLLATERAL, edit)


def _published(piece: str, name: str) -> Change:
    return collateral(piece, lambda _: published(name))


def _given(piece: str, make: Callable[[], bytes]) -> Change:
    return collateral(piece, lambda _: make())


def _pretended(pretence: Pretence, mr_td: bytes = bytes(48)) -> Change:
    """Evidence of the same simulated machine in another state."""

    def change(case: Case) -> Case:
        return replace(case, evidence=_quoter().evidence(mr_td, DATA, AT, pretence))

    return change


_OTHER_SOFTWARE = {name: policy(measurements={name: ["ab" * 48]}) for name in set(PINNED.values())}
_NO_SOFTWARE = policy(measurements={})
_FOR_ANOTHER = bound(b"\xee" * 32)

_TDX = _rows(
    "published tdx",
    ("a bit of mr_td", flip(48 + 136), R.BAD_SIGNATURE),
    ("a bit of the report data", flip(48 + 520), R.BAD_SIGNATURE),
    ("a bit of the TD attributes: debug", flip(48 + 120), R.BAD_SIGNATURE),
    ("a bit of the signature", flip(636), R.BAD_SIGNATURE),
    ("half a quote", cut(2500), R.MALFORMED),
    ("an empty quote", cut(0), R.MALFORMED),
    ("said to be SGX", named(Platform.SGX), R.OTHER_PLATFORM),
    ("said to be SEV-SNP", named(Platform.SEV_SNP), R.MALFORMED),
    ("a policy for SEV-SNP", policy(platforms=[Platform.SEV_SNP]), R.OTHER_PLATFORM),
    ("another binding", _FOR_ANOTHER, R.WRONG_BINDING),
    ("other software", _OTHER_SOFTWARE["mr_td"], R.WRONG_MEASUREMENT),
    ("a policy without measurements", _NO_SOFTWARE, R.WRONG_MEASUREMENT),
    ("a month after its collateral", at(2025, 8, 1), R.EXPIRED),
    ("before its collateral", at(2025, 6, 1), R.NOT_YET_VALID),
    ("no collateral", collateral(COLLATERAL), R.NO_COLLATERAL),
    (
        "the collateral of SGX",
        _published(COLLATERAL, "sgx_quote_collateral.json"),
        R.OTHER_PLATFORM,
    ),
    ("TCB info edited", _edited("tcb_info", "UpToDate", "OutOfDate"), R.BAD_SIGNATURE),
    ("identity edited", _edited("qe_identity", "UpToDate", "OutOfDate"), R.BAD_SIGNATURE),
    ("an unknown root", rooted(Platform.TDX, _stranger), R.WRONG_ROOT),
    ("another chip", policy(chips=["00" * 16]), R.WRONG_CHIP),
    ("a GPU is wanted", policy(gpus=1), R.NO_GPU),
    ("more assurance is wanted", policy(least_assurance="hardware-tee+gpu-cc"), R.LOW_ASSURANCE),
)
_SGX = _rows(
    "published sgx",
    ("a bit of mr_enclave", flip(48 + 64), R.BAD_SIGNATURE),
    ("a bit of the report data", flip(48 + 320), R.BAD_SIGNATURE),
    ("a bit of the signature", flip(436), R.BAD_SIGNATURE),
    ("said to be TDX", named(Platform.TDX), R.OTHER_PLATFORM),
    ("a status that is not accepted", policy(tcb_statuses=["UpToDate"]), R.TCB),
    ("an advisory that is not accepted", policy(advisories=["INTEL-SA-00289"]), R.TCB),
    ("other software", _OTHER_SOFTWARE["mr_enclave"], R.WRONG_MEASUREMENT),
    ("another binding", _FOR_ANOTHER, R.WRONG_BINDING),
    ("after its collateral", at(2025, 9, 1), R.EXPIRED),
    (
        "the collateral of TDX",
        _published(COLLATERAL, "tdx_quote_collateral.json"),
        R.OTHER_PLATFORM,
    ),
)
_PUBLISHED_SNP = _rows(
    "published sev-snp",
    ("as it is: started for debugging", lambda case: case, R.DEBUG),
    ("the debug bit cleared", flip(0x0A, 0x08), R.BAD_SIGNATURE),
    ("a bit of the measurement", flip(0x90), R.BAD_SIGNATURE),
    ("a bit of the signature", flip(0x2A0), R.BAD_SIGNATURE),
    ("before its chip's certificate", at(2026, 8, 1), R.NOT_YET_VALID),
    ("after its chip's certificate", at(2033, 9, 1), R.EXPIRED),
    ("the chain of Genoa", _published("chain", "genoa.pem"), R.BAD_CHAIN),
    ("the chain of Turin", _published("chain", "turin_vcek.pem"), R.BAD_CHAIN),
    ("the root left out", _published("chain", "milan_ask.der"), R.BAD_CHAIN),
    ("another root", rooted(Platform.SEV_SNP, _stranger), R.WRONG_ROOT),
    ("its chip's certificate left out", collateral("vcek"), R.NO_COLLATERAL),
)
_SNP = _rows(
    "sev-snp",
    ("AMD's own root", lambda case: replace(case, roots={}), R.WRONG_ROOT),
    ("hardware is wanted", policy(least_assurance="hardware-tee"), R.LOW_ASSURANCE),
    ("no chain", collateral("chain"), R.NO_COLLATERAL),
    (
        "another chip of the same maker",
        _given("vcek", lambda: with_leaf(_chip(), LeafWish()).leaf.der),
        R.BAD_SIGNATURE,
    ),
    (
        "older firmware than its key's",
        body(lambda: _chip().report(Wished(tcb=bytes([3, 0, 0, 0, 0, 0, 22, 213])))),
        R.TCB,
    ),
    (
        "firmware that can fall back",
        body(lambda: _chip().report(Wished(report_data=DATA, committed_tcb=bytes(8)))),
        R.TCB,
    ),
    (
        "a revoked authority",
        _given(
            "crl", lambda: revocation_list(_chip().ark, [_chip().ask.certificate.serial_number])
        ),
        R.REVOKED,
    ),
    (
        "an expired revocation list",
        _given("crl", lambda: revocation_list(_chip().ark, [], AT - timedelta(days=20))),
        R.EXPIRED,
    ),
    ("another binding", _FOR_ANOTHER, R.WRONG_BINDING),
    ("a digest cut short", bound(DATA[:31]), R.WRONG_BINDING),
    ("no binding at all", bound(b""), R.WRONG_BINDING),
    ("other software", _OTHER_SOFTWARE["measurement"], R.WRONG_MEASUREMENT),
    ("another chip than the policy's", policy(chips=["ff" * 64]), R.WRONG_CHIP),
    ("a byte too much", body(lambda: _chip().report(Wished()) + b"\0"), R.MALFORMED),
    ("a Nitro document", body(lambda: _module().evidence().body), R.MALFORMED),
)
_NITRO = _rows(
    "published nitro",
    ("a bit of the signature", flip(-1), R.BAD_SIGNATURE),
    ("four hours later", later(hours=4), R.EXPIRED),
    ("a day before", later(days=-1), R.NOT_YET_VALID),
    ("an hour later", later(hours=1), R.STALE),
    ("other software", _OTHER_SOFTWARE["pcr0"], R.WRONG_MEASUREMENT),
    ("another binding", _FOR_ANOTHER, R.WRONG_BINDING),
    ("cut off", cut(4000), R.MALFORMED),
    ("another root", rooted(Platform.NITRO, _stranger), R.WRONG_ROOT),
    ("said to be TDX", named(Platform.TDX), R.MALFORMED),
) + _rows(
    "nitro",
    ("AWS's own root", lambda case: replace(case, roots={}), R.WRONG_ROOT),
    (
        "started for debugging",
        body(lambda: _module().evidence({"pcrs": {0: bytes(48)}, "user_data": DATA}).body),
        R.DEBUG,
    ),
    (
        "another module's signature",
        body(lambda: Module(root=_module().root).document(_module().payload())),
        R.BAD_SIGNATURE,
    ),
)
_AZURE = _rows(
    "azure",
    ("a bit of the runtime claims", flip(32 + 1184 + 20 + 100), R.WRONG_BINDING),
    ("a bit of the hardware's measurement", flip(32 + 0x90), R.BAD_SIGNATURE),
    (
        "another VM's vTPM",
        _given("signature", lambda: AzureVm().quote(DATA)["signature"]),
        R.BAD_SIGNATURE,
    ),
    ("another VM's key", _given("ak", lambda: AzureVm().public_area()), R.WRONG_ROOT),
    ("other PCR values", _given("pcrs", lambda: bytes(32)), R.BAD_SIGNATURE),
    ("no hardware certificate", collateral("vcek"), R.NO_COLLATERAL),
    ("another nonce", _FOR_ANOTHER, R.WRONG_BINDING),
    ("the quote left out", collateral("quote"), R.WRONG_BINDING),
    ("AMD's own root", lambda case: replace(case, roots={}), R.WRONG_ROOT),
    ("cut off", cut(1000), R.MALFORMED),
    ("other guest software", _OTHER_SOFTWARE["pcr4"], R.WRONG_MEASUREMENT),
)
_TPM = _rows(
    "tpm",
    ("a bit of the quote", flip(-1), R.BAD_SIGNATURE),
    ("other PCR values", collateral("pcrs", lambda old: bytes(len(old))), R.BAD_SIGNATURE),
    ("fewer PCR values", collateral("pcrs", lambda old: old[:32]), R.MALFORMED),
    ("no signature", collateral("signature"), R.NO_COLLATERAL),
    ("a key that nobody named", lambda case: replace(case, roots={}), R.WRONG_ROOT),
    ("another nonce", _FOR_ANOTHER, R.WRONG_BINDING),
    ("confidential hardware is wanted", policy(least_assurance="hardware-tee"), R.LOW_ASSURANCE),
    ("another boot", _OTHER_SOFTWARE["pcr4"], R.WRONG_MEASUREMENT),
)
_SIMULATED = _rows(
    "simulated",
    ("Intel's root", named(Platform.TDX), R.WRONG_ROOT),
    ("hardware is wanted", policy(least_assurance="hardware-tee"), R.LOW_ASSURANCE),
    ("started for debugging", _pretended(Pretence(is_debug=True)), R.DEBUG),
    ("other software", _pretended(Pretence(), mr_td=b"\1" * 48), R.WRONG_MEASUREMENT),
    ("old collateral", _pretended(Pretence(collateral_age=timedelta(days=60))), R.EXPIRED),
    ("another binding", _FOR_ANOTHER, R.WRONG_BINDING),
)
ROWS = [*_TDX, *_SGX, *_PUBLISHED_SNP, *_SNP, *_NITRO, *_AZURE, *_TPM, *_SIMULATED]
"""All of them."""
