"""`cutlayer attest`: verify evidence offline, begin a policy, measure software, make evidence.

Who judges is the same code that a client runs (`tee.verify`). Only `collateral` opens a connection.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.attest_tpm import app as tpm_app
from cutlayer.cli.federation_tables import printable
from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output

if TYPE_CHECKING:
    from datetime import datetime

    from cutlayer.tee.claims import Claims
    from cutlayer.tee.policy import Policy
    from cutlayer.tee.verify import AttestationResult

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Prove and check what a machine runs; offline.")
policy_app = typer.Typer(no_args_is_help=True, help="Policies: what is accepted as proof.")
app.add_typer(policy_app, name="policy")
app.add_typer(tpm_app, name="tpm")

EvidenceArgument = Annotated[
    Path, typer.Argument(metavar="EVIDENCE", help="File of `attest quote`, or a vendor's bytes.")
]
PlatformOption = Annotated[
    str | None, typer.Option("--platform", help="Of raw vendor bytes: tdx, sgx, sev-snp, ...")
]
CollateralOption = Annotated[
    list[str] | None,
    typer.Option("--collateral", metavar="NAME=FILE", help="What verifies it; may be repeated."),
]
AtOption = Annotated[
    str | None, typer.Option("--at", metavar="TIME", help="Time of the verdict; now if absent.")
]
ReportDataOption = Annotated[
    str | None, typer.Option("--report-data", metavar="HEX", help="What it must bind.")
]
RootOption = Annotated[
    list[str] | None,
    typer.Option("--root", metavar="PLATFORM=FILE", help="PEM in place of a vendor's root."),
]


@app.command("verify")
def verify(
    evidence: EvidenceArgument,
    policy: Annotated[Path, typer.Option("--policy", metavar="FILE", help="What is accepted.")],
    at: AtOption = None,
    platform: PlatformOption = None,
    collateral: CollateralOption = None,
    report_data: ReportDataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge evidence by a policy at a time, without a connection; a refusal has a name."""
    from cutlayer.cli.attest_input import evidence_of, hex_value, time_of
    from cutlayer.tee.policy import read_policy
    from cutlayer.tee.verify import verify as judge

    out = Output(as_json)
    accepted = read_policy(policy)
    shown = evidence_of(evidence, platform, collateral or ())
    result = judge(shown, accepted, time_of(at), hex_value(report_data, "--report-data"))
    _print_claims(out, result.claims)
    out.say(f"accepted by policy {result.policy} at {result.at:%Y-%m-%d %H:%M:%S} UTC")
    if report_data is None:
        out.say("not checked: whom it speaks for (--report-data)")
    out.result(_result(result, report_data is not None))


@policy_app.command("init")
def init(
    path: Annotated[Path, typer.Argument(metavar="POLICY", help="File to write.")],
    evidence: Annotated[
        Path | None, typer.Option("--evidence", metavar="FILE", help="Of the reference machine.")
    ] = None,
    measurement: Annotated[
        list[str] | None,
        typer.Option("--measurement", metavar="NAME=HEX", help="Reference value; repeat."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The file's name if absent.")] = None,
    platform: PlatformOption = None,
    root: RootOption = None,
    collateral: CollateralOption = None,
    at: AtOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a policy from verified evidence or from reference values; every key has a comment."""
    from cutlayer.cli.attest_input import evidence_of, named_values, roots_of, time_of
    from cutlayer.errors import ConfigError
    from cutlayer.storage.files import write_atomic
    from cutlayer.tee.policy import read_policy, read_roots
    from cutlayer.tee.policy_file import reference_claims, render_policy
    from cutlayer.tee.verifier import Trust
    from cutlayer.tee.verify import claims_of

    out = Output(as_json)
    if path.exists():
        raise ConfigError(f"{path} exists; choose another name, or delete it to begin anew")
    roots = roots_of(root or ())
    values = named_values(measurement or (), "--measurement")
    if evidence is None:
        claims = reference_claims(platform, values, bool(roots))
    else:
        shown = evidence_of(evidence, platform, collateral or ())
        claims = claims_of(shown, Trust(at=time_of(at), roots=read_roots(roots)))
        _print_claims(out, claims)
    text = render_policy(name or path.stem, claims, values, roots, path.parent)
    write_atomic(path, text.encode(), mode=0o644)
    written = read_policy(path)
    if evidence is not None:
        _warn_of(out, claims, written, time_of(at))
    out.say(f"wrote {path}; read it through before it is trusted")
    out.result({"policy": str(path), "name": written.name, "policy_digest": written.digest})


@app.command("measure")
def measure(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="This installation if absent.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The reference value of this installation or of a folder: the same files, the same value."""
    from cutlayer.tee.measure import measure_folder, measure_package

    out = Output(as_json)
    value = (measure_package() if folder is None else measure_folder(folder)).hex()
    out.say(value)
    what = "cutlayer" if folder is None else str(folder)
    # A simulated machine claims it as its mr_td; hardware measures images, not folders.
    out.result({"what": what, "algorithm": "sha384", "measurement": value, "name": "mr_td"})


@app.command("quote")
def quote(
    path: Annotated[Path, typer.Argument(metavar="EVIDENCE", help="File to write.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Settings with a table tee.attester."),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="simulated, configfs-tsm, ...")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="What the source keeps: simulated keys.")
    ] = None,
    collateral: CollateralOption = None,
    report_data: ReportDataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write this machine's evidence to a file; it binds --report-data, or 32 zeros."""
    from cutlayer.cli.attest_input import attester_settings, hex_value
    from cutlayer.storage.files import write_atomic
    from cutlayer.tee.attest import attest

    out = Output(as_json)
    settings = attester_settings(config, source, folder, collateral or ())
    bound = hex_value(report_data, "--report-data") or bytes(32)
    evidence = attest(settings, bound)
    write_atomic(path, evidence.to_json(), mode=0o644)
    if evidence.platform == "simulated":
        out.warn(_LOUD)
    out.say(f"wrote evidence of {evidence.platform} to {path}")
    result = {"evidence": str(path), "platform": evidence.platform, "report_data": bound.hex()}
    out.result(result)


@app.command("collateral")
def collateral(
    evidence: EvidenceArgument,
    path: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write.")],
    platform: PlatformOption = None,
    url: Annotated[
        str | None, typer.Option("--url", help="A cache (PCCS) in place of Intel's service.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch what verifies an Intel quote; the one attest command that opens a connection."""
    from cutlayer.cli.attest_input import evidence_of
    from cutlayer.errors import ConfigError
    from cutlayer.storage.files import write_atomic
    from cutlayer.tee.evidence import Platform
    from cutlayer.tee.intel_collateral import INTEL_SERVICE, fetch_collateral

    out = Output(as_json)
    shown = evidence_of(evidence, platform, ())
    if shown.platform not in (Platform.TDX, Platform.SGX):
        raise ConfigError(f"only Intel's quotes need it; this is evidence of {shown.platform}")
    fetched = fetch_collateral(shown.body, url or INTEL_SERVICE)
    write_atomic(path, fetched, mode=0o644)
    out.say(f"wrote {path}; name it as collateral intel, and fetch it again before 30 days end")
    out.result({"collateral": str(path), "name": "intel", "num_bytes": len(fetched)})


_LOUD = "SIMULATED: made by software under a test root; it proves nothing to anybody"


def _print_claims(out: Output, claims: "Claims") -> None:
    if claims.assurance.label == "SIMULATED":
        out.warn(_LOUD)
    out.say(f"{claims.assurance.label}: {claims.platform}, firmware {claims.tcb_status}")
    if claims.advisories:
        out.say(f"advisories: {', '.join(claims.advisories)}")
    if claims.is_debug:
        out.warn("a debug build: its owner can look inside")
    if claims.chip is not None:
        out.say(f"chip: {printable(claims.chip)}")
    lines = {**claims.measurements, "report data": claims.report_data.hex(), **claims.details}
    for name, value in lines.items():
        # Not a table: whoever copies a value wants it in one piece. Names and details are words of
        # the machine that is judged: they write no lines of ours.
        out.say(f"  {printable(name):<16} {printable(value)}")
    for companion in claims.companions:
        out.say("beside it:")
        _print_claims(out, companion)


def _warn_of(out: Output, claims: "Claims", policy: "Policy", at: "datetime") -> None:
    """Say what the new policy takes over from its example that an officer may not want."""
    from cutlayer.errors import AttestationError
    from cutlayer.tee.policy import appraise

    statuses = {one.tcb_status for one in (claims, *claims.companions)} - {"UpToDate"}
    if statuses:
        out.warn(f"this policy accepts firmware that is {', '.join(sorted(statuses))}")
    if claims.advisories:
        out.warn(f"this policy accepts the advisories {', '.join(claims.advisories)}")
    try:
        appraise(claims, policy, at, None)
    except AttestationError as error:
        out.warn(f"this policy refuses the evidence that it was made from: {error}")


def _result(result: "AttestationResult", is_bound: bool) -> dict[str, object]:
    return {
        "verdict": "accepted",
        "policy": result.policy,
        "policy_digest": result.policy_digest,
        "at": result.at.isoformat(),
        "is_binding_checked": is_bound,
        **_claims(result.claims),
    }


def _claims(claims: "Claims") -> dict[str, object]:
    return {
        "assurance": claims.assurance.label,
        "platform": claims.platform,
        "tcb_status": claims.tcb_status,
        "advisories": list(claims.advisories),
        "tcb_evaluation": claims.tcb_evaluation,
        "is_debug": claims.is_debug,
        "chip": claims.chip,
        "measurements": dict(claims.measurements),
        "report_data": claims.report_data.hex(),
        "issued_at": claims.issued_at and claims.issued_at.isoformat(),
        "details": dict(claims.details),
        "companions": [_claims(companion) for companion in claims.companions],
    }
