"""The table of refusals: what is wrong with the evidence, and the name that it must be refused by.

A platform's rows follow its base. Rows over published evidence need it beside the checkout.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta

import msgspec

from cutlayer.tee.evidence import Platform
from cutlayer.tee.quote import COLLATERAL
from cutlayer.tee.refusal import Refusal
from cutlayer.tee.synthetic_quoter import Pretence
from tests.unit.tee.authorities import AT, revocation_list
from tests.unit.tee.azure_worlds import AzureVm
from tests.unit.tee.evidence_samples import published
from tests.unit.tee.judged_cases import (
    Case,
    Change,
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
    rows,
)
from tests.unit.tee.nitro_worlds import Module
from tests.unit.tee.refusal_bases import BASES, DATA, PINNED, chip, module, quoter, stranger
from tests.unit.tee.snp_worlds import LeafWish, Wished, with_leaf

__all__ = ["ROWS"]

R = Refusal
_SDK = "nv/sample_attestation_data_gpu_"
_RIM = "nv/NV_GPU_DRIVER_GH100_550.144.03.xml"
_DRIVER = {"driver_version": [b"580.159.03".hex()]}
_ANY = {"driver_version": [b"1.2.3".hex()]}


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
        return replace(case, evidence=quoter().evidence(mr_td, DATA, AT, pretence))

    return change


def _beside(name: str, pins: Mapping[str, list[str]], *statuses: str) -> Change:
    """With another sample's evidence as an accelerator's, and a policy that asks for one."""
    accepted = ["UpToDate", *statuses]

    def change(case: Case) -> Case:
        piece = BASES[name]().evidence
        together = msgspec.structs.replace(case.evidence, companions=[piece])
        change = policy(gpus=1, gpu_measurements=pins, tcb_statuses=accepted)
        return replace(change(case), evidence=together)

    return change


_OTHER_SOFTWARE = {name: policy(measurements={name: ["ab" * 48]}) for name in set(PINNED.values())}
_NO_SOFTWARE = policy(measurements={})
_FOR_ANOTHER = bound(b"\xee" * 32)

_TDX = rows(
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
    ("an unknown root", rooted(Platform.TDX, stranger), R.WRONG_ROOT),
    ("another chip", policy(chips=["00" * 16]), R.WRONG_CHIP),
    ("a GPU is wanted", policy(gpus=1), R.NO_GPU),
    ("more assurance is wanted", policy(least_assurance="hardware-tee+gpu-cc"), R.LOW_ASSURANCE),
)
_SGX = rows(
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
_PUBLISHED_SNP = rows(
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
    ("another root", rooted(Platform.SEV_SNP, stranger), R.WRONG_ROOT),
    ("its chip's certificate left out", collateral("vcek"), R.NO_COLLATERAL),
)
_SNP = rows(
    "sev-snp",
    ("AMD's own root", lambda case: replace(case, roots={}), R.WRONG_ROOT),
    ("hardware is wanted", policy(least_assurance="hardware-tee"), R.LOW_ASSURANCE),
    ("no chain", collateral("chain"), R.NO_COLLATERAL),
    (
        "another chip of the same maker",
        _given("vcek", lambda: with_leaf(chip(), LeafWish()).leaf.der),
        R.BAD_SIGNATURE,
    ),
    (
        "older firmware than its key's",
        body(lambda: chip().report(Wished(tcb=bytes([3, 0, 0, 0, 0, 0, 22, 213])))),
        R.TCB,
    ),
    (
        "firmware that can fall back",
        body(lambda: chip().report(Wished(report_data=DATA, committed_tcb=bytes(8)))),
        R.TCB,
    ),
    (
        "a revoked authority",
        _given("crl", lambda: revocation_list(chip().ark, [chip().ask.certificate.serial_number])),
        R.REVOKED,
    ),
    (
        "an expired revocation list",
        _given("crl", lambda: revocation_list(chip().ark, [], AT - timedelta(days=20))),
        R.EXPIRED,
    ),
    ("no GPU beside it", policy(gpus=1), R.NO_GPU),
    ("another CPU beside it", _beside("simulated", {}), R.OTHER_PLATFORM),
    ("another binding", _FOR_ANOTHER, R.WRONG_BINDING),
    ("a digest cut short", bound(DATA[:31]), R.WRONG_BINDING),
    ("no binding at all", bound(b""), R.WRONG_BINDING),
    ("other software", _OTHER_SOFTWARE["measurement"], R.WRONG_MEASUREMENT),
    ("another chip than the policy's", policy(chips=["ff" * 64]), R.WRONG_CHIP),
    ("a byte too much", body(lambda: chip().report(Wished()) + b"\0"), R.MALFORMED),
    ("a Nitro document", body(lambda: module().evidence().body), R.MALFORMED),
)
_NITRO = rows(
    "published nitro",
    ("a bit of the signature", flip(-1), R.BAD_SIGNATURE),
    ("four hours later", later(hours=4), R.EXPIRED),
    ("a day before", later(days=-1), R.NOT_YET_VALID),
    ("an hour later", later(hours=1), R.STALE),
    ("other software", _OTHER_SOFTWARE["pcr0"], R.WRONG_MEASUREMENT),
    ("another binding", _FOR_ANOTHER, R.WRONG_BINDING),
    ("cut off", cut(4000), R.MALFORMED),
    ("another root", rooted(Platform.NITRO, stranger), R.WRONG_ROOT),
    ("said to be TDX", named(Platform.TDX), R.MALFORMED),
) + rows(
    "nitro",
    ("AWS's own root", lambda case: replace(case, roots={}), R.WRONG_ROOT),
    (
        "started for debugging",
        body(lambda: module().evidence({"pcrs": {0: bytes(48)}, "user_data": DATA}).body),
        R.DEBUG,
    ),
    (
        "another module's signature",
        body(lambda: Module(root=module().root).document(module().payload())),
        R.BAD_SIGNATURE,
    ),
)
_AZURE = rows(
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
_TPM = rows(
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
_SIMULATED = rows(
    "simulated",
    ("Intel's root", named(Platform.TDX), R.WRONG_ROOT),
    ("hardware is wanted", policy(least_assurance="hardware-tee"), R.LOW_ASSURANCE),
    ("started for debugging", _pretended(Pretence(is_debug=True)), R.DEBUG),
    ("other software", _pretended(Pretence(), mr_td=b"\1" * 48), R.WRONG_MEASUREMENT),
    ("old collateral", _pretended(Pretence(collateral_age=timedelta(days=60))), R.EXPIRED),
    ("another binding", _FOR_ANOTHER, R.WRONG_BINDING),
)
_NVIDIA = rows(
    "published nvidia",
    ("a bit of the nonce", flip(10), R.BAD_SIGNATURE),
    ("a bit of a measurement", flip(37 + 8 + 20), R.BAD_SIGNATURE),
    ("a bit of the signature", flip(-1), R.BAD_SIGNATURE),
    ("cut off", cut(2000), R.MALFORMED),
    ("another GPU's chain", _published("chain", f"{_SDK}hopperCertChain.txt"), R.BAD_SIGNATURE),
    ("no chain", collateral("chain"), R.NO_COLLATERAL),
    ("another root", rooted(Platform.NVIDIA, stranger), R.WRONG_ROOT),
    ("before its certificates", at(2019, 1, 1), R.NOT_YET_VALID),
    ("another driver's manifest", _published("rim", _RIM), R.WRONG_MEASUREMENT),
    ("a manifest that is none", _published("rim", "nv/hopperCertChain.txt"), R.MALFORMED),
    ("firmware that nobody compared", policy(tcb_statuses=["UpToDate"]), R.TCB),
    ("another driver", _OTHER_SOFTWARE["driver_version"], R.WRONG_MEASUREMENT),
    ("another nonce", _FOR_ANOTHER, R.WRONG_BINDING),
    ("said to be SEV-SNP", named(Platform.SEV_SNP), R.MALFORMED),
)
_BARE = "NotCompared"
_WITH_GPU = rows(
    "sev-snp",
    ("a GPU of another challenge", _beside("published nvidia", _DRIVER, _BARE), R.WRONG_BINDING),
    ("a GPU of another driver", _beside("published nvidia", _ANY, _BARE), R.WRONG_MEASUREMENT),
    ("a GPU that nobody compared", _beside("published nvidia", {}), R.TCB),
    ("a GPU with a version of no proof", _beside("published nvidia", _DRIVER), R.TCB),
    needs_published=True,
)
ROWS = [*_TDX, *_SGX, *_PUBLISHED_SNP, *_SNP, *_NITRO, *_AZURE, *_TPM, *_SIMULATED]
ROWS += [*_NVIDIA, *_WITH_GPU]
"""All of them."""
