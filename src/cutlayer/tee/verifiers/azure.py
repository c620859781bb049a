"""Azure confidential VM: hardware vouches for the paravisor, the paravisor for the guest's vTPM.

Body: the HCL report. Collateral for the hardware: on SEV-SNP that verifier's (`vcek`, `chain`,
`crl`); on TDX `td_quote` (Azure's host turns the TDREPORT into it) with that verifier's. For the
guest: `quote` (TPMS_ATTEST) with the TPM verifier's `signature`, `ak` and `pcrs`, checked under
the attestation key that the paravisor names. Without a quote nothing measures the guest's own
software: the hardware's measurement is the paravisor's.

It reads no event log. A root that the policy names for `azure` stands for the hardware inside.
"""

from collections.abc import Mapping
from dataclasses import replace

from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.hcl_report import HclReport, check_runtime_binding, parse_hcl_report
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.tpm_trust import key_pem
from cutlayer.tee.verifier import VERIFIERS, Trust

__all__ = ["AzureVerifier"]

_OWN_COLLATERAL = ("td_quote", "quote", "signature", "ak", "pcrs")
_TPM_COLLATERAL = ("signature", "ak", "pcrs")
_PARAVISOR_LEVEL = "00000000"


@VERIFIERS.register(Platform.AZURE)
class AzureVerifier:
    """HCL reports over SEV-SNP and TDX."""

    def verify(self, evidence: Evidence, trust: Trust) -> Claims:
        """What hardware, paravisor and vTPM say together; the level is the hardware's.

        Raises:
            AttestationError: see `Verifier`.
        """
        report = parse_hcl_report(evidence.body)
        # Before the hardware's signature: the cheaper check, and it needs no collateral.
        check_runtime_binding(report, report.report_data)
        hardware = _verify_hardware(report, evidence.collateral, trust)
        check_runtime_binding(report, hardware.report_data)
        claims = replace(
            hardware,
            platform=Platform.AZURE,
            report_data=report.user_data,
            details=dict(hardware.details) | _details(report),
        )
        if "quote" not in evidence.collateral:
            return claims
        guest = _verify_guest(report, evidence.collateral, trust)
        return replace(
            claims,
            measurements=dict(hardware.measurements) | dict(guest.measurements),
            report_data=guest.report_data,
            details=dict(claims.details) | {"guest": "measured by the vTPM"},
        )


def _verify_hardware(report: HclReport, collateral: Mapping[str, bytes], trust: Trust) -> Claims:
    body = report.hardware_report
    if report.platform is Platform.TDX:
        if "td_quote" not in collateral:
            raise refused(
                Refusal.NO_COLLATERAL,
                "a TDREPORT is for its own machine; the quote 'td_quote' over it is missing",
            )
        body = collateral["td_quote"]
    rest = {name: value for name, value in collateral.items() if name not in _OWN_COLLATERAL}
    inner = Evidence(platform=report.platform, body=body, collateral=rest)
    claims = VERIFIERS.get(report.platform).verify(inner, _hardware_trust(report, trust))
    _check_asker(claims)
    return claims


def _check_asker(claims: Claims) -> None:
    # The guest beneath may ask the chip too, and would bind runtime claims of its own.
    level = claims.measurements.get("vmpl", _PARAVISOR_LEVEL)
    if level != _PARAVISOR_LEVEL:
        raise refused(
            Refusal.WRONG_BINDING,
            f"the hardware's report was asked for at privilege level {int(level, 16)}, not by the "
            "paravisor at level 0",
        )


def _hardware_trust(report: HclReport, trust: Trust) -> Trust:
    if Platform.AZURE not in trust.roots:
        return trust
    return replace(trust, roots=dict(trust.roots) | {report.platform: trust.roots[Platform.AZURE]})


def _verify_guest(report: HclReport, collateral: Mapping[str, bytes], trust: Trust) -> Claims:
    # The paravisor's word for the key replaces a TPM maker's: the key is named, not certified.
    named = Trust(at=trust.at, roots={Platform.TPM: key_pem(report.attestation_key())})
    parts = {name: collateral[name] for name in _TPM_COLLATERAL if name in collateral}
    quote = Evidence(platform=Platform.TPM, body=collateral["quote"], collateral=parts)
    return VERIFIERS.get(Platform.TPM).verify(quote, named)


def _details(report: HclReport) -> dict[str, str]:
    configuration = report.runtime.vm_configuration.items()
    details = {
        f"vm {name}": str(value) for name, value in configuration if isinstance(value, str | int)
    }
    return details | {"hardware": str(report.platform), "guest": "not measured: no vTPM quote"}
