"""What an owner accepts: reference values in a file, and the verdict over claims.

It does not parse evidence (`verifiers`). A check that the policy does not name is not made, save
these, which are always on: debug, the binding, simulated evidence, dates.
"""

import hmac
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path

from pydantic import Field, field_validator

from cutlayer.errors import ConfigError
from cutlayer.settings import Settings, load_settings, settings_digest
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Platform
from cutlayer.tee.refusal import Refusal, refused

__all__ = ["Policy", "appraise", "read_policy", "read_roots"]

_OF_SOFTWARE = {Platform.AZURE: "pcr", Platform.TPM: "pcr"}
"""Where something else is measured than what the owner runs: how the names of that begin."""


class Policy(Settings):
    """One TOML file that the security officer signs."""

    name: str
    """For reports and logs."""
    platforms: list[Platform] = Field(min_length=1)
    """Evidence of any other platform is refused."""
    least_assurance: str = "hardware-tee"
    """simulated, measured-boot, hardware-tee or hardware-tee+gpu-cc."""
    measurements: dict[str, list[str]] = Field(default_factory=dict)
    """By the platform's names: values in hex, of which one must be met. Empty accepts any software
    and is refused above the level simulated; so is a policy without a PCR on Azure and TPM."""
    tcb_statuses: list[str] = Field(default=["UpToDate"])
    """The vendor's words that are accepted."""
    advisories: list[str] = Field(default=[])
    """Advisories that are accepted beside them; others are refused."""
    least_tcb_evaluation: int = Field(default=0, ge=0)
    """Intel's: whoever is judged brings the collateral, and could bring older than there is."""
    chips: list[str] = Field(default=[])
    """Physical parts that are known; empty accepts every part of the vendor."""
    max_age_s: float = Field(default=300.0, gt=0)
    """Of evidence that carries a time; a clock may differ by as much."""
    gpus: int = Field(default=0, ge=0)
    """Accelerators whose evidence must come too."""
    gpu_measurements: dict[str, list[str]] = Field(default_factory=dict)
    """As `measurements`, for each of them. With a `measurement_N` among them no manifest is asked
    for; versions alone do not stand in for one."""
    roots: dict[Platform, Path] = Field(default_factory=dict)
    """PEM files that replace a vendor's root; what they vouch for is SIMULATED (a TPM's maker has
    no built-in root, so one is named here)."""

    @field_validator("least_assurance")
    @classmethod
    def _is_level(cls, label: str) -> str:
        try:
            Assurance.named(label)
        except KeyError:
            known = ", ".join(level.label.lower() for level in Assurance)
            raise ValueError(f"no assurance level has this name; known: {known}") from None
        return label

    @field_validator("measurements", "gpu_measurements")
    @classmethod
    def _are_hex(cls, table: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, values in table.items():
            for value in values:
                try:
                    bytes.fromhex(value)
                except ValueError:
                    raise ValueError(f"{name}: {value!r} is no hex number") from None
        return {name: [value.lower() for value in values] for name, values in table.items()}

    @field_validator("chips")
    @classmethod
    def _are_lower(cls, chips: list[str]) -> list[str]:
        return [chip.lower() for chip in chips]

    @property
    def least(self) -> Assurance:
        """`least_assurance` as a level."""
        return Assurance.named(self.least_assurance)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides: every key, and what the named roots' files hold now.

        Raises:
            ConfigError: a root cannot be read.
        """
        return self.digest_with(self.read_roots())

    def digest_with(self, roots: Mapping[Platform, bytes]) -> str:
        """The same with roots that were read already; stands in results and logs."""
        # Not their paths: another file under the same name is another policy.
        held = {platform.value: sha256(pem).hexdigest() for platform, pem in roots.items()}
        keys = settings_digest(self.model_copy(update={"roots": {}}))
        return sha256(json.dumps([keys, held], sort_keys=True).encode()).hexdigest()

    def read_roots(self) -> dict[Platform, bytes]:
        """The named roots' PEM bytes.

        Raises:
            ConfigError: a file cannot be read.
        """
        return read_roots(self.roots)


def read_policy(path: Path) -> Policy:
    """A policy from its file; roots are relative to it.

    Raises:
        ConfigError: missing or malformed; says which key.
    """
    policy = load_settings(Policy, path)
    roots = {platform: path.parent / root for platform, root in policy.roots.items()}
    return policy.model_copy(update={"roots": roots})


def read_roots(files: Mapping[Platform, Path]) -> dict[Platform, bytes]:
    """PEM bytes of roots by platform.

    Raises:
        ConfigError: a file cannot be read.
    """
    found = {}
    for platform, path in files.items():
        try:
            found[platform] = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read the root {path}: {error.strerror}") from error
    return found


def appraise(claims: Claims, policy: Policy, at: datetime, report_data: bytes | None) -> None:
    """Refuse claims that the policy does not accept.

    Args:
        claims: of verified evidence.
        policy: the owner's.
        at: time of the verdict.
        report_data: what must be bound; None checks no binding (for files alone, never a peer).

    Raises:
        AttestationError: with the first reason found.
    """
    _check_kind(claims, policy)
    _check_measurements(claims, policy.measurements, policy.least)
    _check_state(claims, policy, at)
    if report_data is not None:
        _check_binding(claims, report_data)
    _check_gpus(claims, policy, report_data)


def _check_kind(claims: Claims, policy: Policy) -> None:
    if claims.platform not in policy.platforms:
        wanted = ", ".join(policy.platforms)
        raise refused(Refusal.OTHER_PLATFORM, f"{claims.platform}; the policy wants {wanted}")
    if claims.assurance < policy.least:
        raise refused(
            Refusal.LOW_ASSURANCE,
            f"this evidence is {claims.assurance.label}; policy {policy.name} wants at least "
            f"{policy.least.label}",
        )
    if claims.is_debug:
        raise refused(Refusal.DEBUG, "its owner can look inside; run a production build")


def _check_measurements(claims: Claims, wanted: Mapping[str, list[str]], least: Assurance) -> None:
    if not wanted and least > Assurance.SIMULATED:
        raise refused(
            Refusal.WRONG_MEASUREMENT,
            "the policy names no measurement, so any software would pass; add reference values "
            "with `cutlayer attest policy init`",
        )
    prefix = _OF_SOFTWARE.get(claims.platform, "")
    if least > Assurance.SIMULATED and not any(name.startswith(prefix) for name in wanted):
        raise refused(
            Refusal.WRONG_MEASUREMENT,
            f"the policy pins no {prefix.upper()}, so on {claims.platform} any software would "
            "pass; add the values that your system boots with",
        )
    for name, values in wanted.items():
        found = claims.measurements.get(name)
        if found is None or not any(hmac.compare_digest(found, value) for value in values):
            raise refused(
                Refusal.WRONG_MEASUREMENT,
                f"{name} is {found or 'absent'}, the policy accepts {' or '.join(values)}",
            )


def _check_state(claims: Claims, policy: Policy, at: datetime) -> None:
    if claims.tcb_status not in policy.tcb_statuses:
        raise refused(
            Refusal.TCB,
            f"status {claims.tcb_status} ({', '.join(claims.advisories) or 'no advisories'}); "
            f"accepted: {', '.join(policy.tcb_statuses)}",
        )
    unknown = sorted(set(claims.advisories) - set(policy.advisories))
    if unknown:
        raise refused(Refusal.TCB, f"advisories {', '.join(unknown)} are not accepted")
    if policy.least_tcb_evaluation > (claims.tcb_evaluation or 0):
        raise refused(
            Refusal.TCB,
            f"collateral of evaluation {claims.tcb_evaluation}, the policy wants "
            f"{policy.least_tcb_evaluation} or later; fetch it again",
        )
    if policy.chips and (claims.chip or "").lower() not in policy.chips:
        raise refused(Refusal.WRONG_CHIP, f"chip {claims.chip} is not one of the policy's")
    if claims.issued_at is None:
        return
    if abs(at - claims.issued_at) > timedelta(seconds=policy.max_age_s):
        raise refused(
            Refusal.STALE,
            f"made {claims.issued_at:%Y-%m-%d %H:%M:%S} UTC, judged {at:%Y-%m-%d %H:%M:%S}; at "
            f"most {policy.max_age_s:g} s apart: is a clock wrong?",
        )


def _check_binding(claims: Claims, report_data: bytes) -> None:
    # 32 bytes, as 64 with zeros after them: what follows the digest must be zeros.
    padded = report_data.ljust(len(claims.report_data), b"\0")
    if not report_data or not hmac.compare_digest(claims.report_data, padded):
        raise refused(
            Refusal.WRONG_BINDING,
            "it was made for another key, nonce or spec: stolen, replayed or of another job",
        )


def _check_gpus(claims: Claims, policy: Policy, report_data: bytes | None) -> None:
    if len(claims.companions) < policy.gpus:
        raise refused(
            Refusal.NO_GPU, f"{len(claims.companions)} of {policy.gpus} accelerators gave evidence"
        )
    # A report names the device and the number of its certificate; a service's token that number.
    names = [{one.chip, one.details.get("ueid")} - {None} for one in claims.companions]
    if len(set().union(*names)) < sum(len(own) for own in names):
        raise refused(Refusal.NO_GPU, "the same accelerator gave evidence twice")
    # Versions are words that firmware says of itself: they stand in for no measurement of it.
    is_firmware_pinned = any(name.startswith("measurement_") for name in policy.gpu_measurements)
    for companion in claims.companions:
        if companion.is_debug:
            raise refused(Refusal.DEBUG, "an accelerator is in debug mode")
        if not is_firmware_pinned and companion.tcb_status not in policy.tcb_statuses:
            raise refused(
                Refusal.TCB,
                f"an accelerator's firmware is {companion.tcb_status}: give the vendor's "
                "manifests with the evidence, or pin its `gpu_measurements.measurement_N`",
            )
        _check_measurements(companion, policy.gpu_measurements, Assurance.SIMULATED)
        if report_data is not None:
            _check_binding(companion, report_data)
