"""A first policy file from reference values, with a comment over every key.

What it writes accepts exactly the machine that it was shown; the officer widens or narrows it. It
verifies nothing: give it claims that are.
"""

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.settings import parse_settings
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Platform
from cutlayer.tee.measure import measure_package
from cutlayer.tee.policy import Policy

__all__ = ["PINNED", "reference_claims", "render_policy"]

PINNED: Mapping[Platform, tuple[str, ...]] = {
    Platform.TDX: ("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3"),
    Platform.SIMULATED: ("mr_td",),
    Platform.SGX: ("mr_enclave",),
    Platform.SEV_SNP: ("measurement", "reported_tcb", "provider"),
    Platform.NITRO: ("pcr0", "pcr1", "pcr2"),
}
"""What a first policy pins of each platform; of others everything that was measured."""

_HEAD = """\
# What this side accepts as proof of what the other side runs. Every check is off that no key names,
# save these: debug builds, evidence for another key, simulated evidence and dates that do not hold.

# Name of this policy in reports and logs.
name = {name}

# Platforms whose evidence is looked at.
platforms = {platforms}

# simulated < measured-boot < hardware-tee < hardware-tee+gpu-cc. "simulated" proves nothing: it is
# for development.
least_assurance = {least}

# The vendor's words for firmware that are accepted.
tcb_statuses = {statuses}

# Advisories that are accepted although the vendor names them for this firmware.
advisories = {advisories}

# Least number of Intel's evaluation of firmware: older collateral is refused, though it is valid.
least_tcb_evaluation = {evaluation}

# Physical parts that are known, as the evidence names them; empty accepts every part of the vendor.
# Pinning them is the answer to attacks on the memory bus of somebody else's machine.
chips = {chips}

# Seconds that evidence with a time of its own may be old, and clocks may differ.
max_age_s = 300.0

# Accelerators that must give evidence too.
gpus = {gpus}
"""
_MEASUREMENTS = """\

# Reference values, in hex: of each name one value must be met. Lines that begin with # were
# measured too; take the # away to pin them.
[measurements]
"""
_GPU_MEASUREMENTS = """\

# The same for each accelerator.
[gpu_measurements]
"""
_ROOTS = """\

# Certificates (PEM, paths from this file's folder) that replace a vendor's root. What they vouch
# for is SIMULATED; a TPM's maker has no built-in root, so here it is no weakness to name one.
[roots]
"""


def reference_claims(
    platform: str | None, values: Mapping[str, str], is_named_root: bool
) -> Claims:
    """Claims of a machine that nobody has at hand, from reference values alone.

    Args:
        platform: its name; simulated where none is given.
        values: by the platform's names, in hex; a simulated machine measures this installation.
        is_named_root: a root replaces the vendor's, so the claims are SIMULATED.

    Raises:
        ConfigError: no such platform, or no values where they are needed.
    """
    try:
        kind = Platform(platform or Platform.SIMULATED)
    except ValueError:
        known = ", ".join(Platform)
        raise ConfigError(f"no platform is called {platform!r}; known: {known}") from None
    if not values and kind is not Platform.SIMULATED:
        raise ConfigError(
            f"a policy for {kind} needs reference values: --evidence FILE or --measurement NAME=HEX"
        )
    return Claims(
        platform=kind,
        assurance=_assurance(kind, is_named_root),
        measurements={} if values else {"mr_td": measure_package().hex()},
        report_data=b"",
        is_debug=False,
        tcb_status="UpToDate",
    )


def render_policy(
    name: str,
    claims: Claims,
    values: Mapping[str, str],
    roots: Mapping[Platform, Path],
    folder: Path,
) -> str:
    """The file's text.

    Args:
        name: of the policy.
        claims: of the reference machine.
        values: reference values that are pinned beside its own, or in their place.
        roots: certificates that it names.
        folder: where the file will lie; the roots' paths are relative to it.

    Raises:
        ConfigError: a reference value is no hex.
    """
    parts = [
        _HEAD.format(
            name=_quoted(name),
            platforms=_quoted([claims.platform]),
            least=_quoted(claims.assurance.label.lower()),
            statuses=_quoted([claims.tcb_status]),
            advisories=_quoted(list(claims.advisories)),
            evaluation=claims.tcb_evaluation or 0,
            chips=_quoted([] if claims.chip is None else [claims.chip]),
            gpus=len(claims.companions),
        ),
        _MEASUREMENTS,
        *_lines(claims, values),
    ]
    if claims.companions:
        parts += [_GPU_MEASUREMENTS, *_joint_lines(claims.companions)]
    if roots:
        parts += [_ROOTS, *_root_lines(roots, folder)]
    text = "".join(parts)
    parse_settings(Policy, tomllib.loads(text), where="the new policy")
    return text


def _lines(claims: Claims, values: Mapping[str, str]) -> Iterable[str]:
    pinned = (*PINNED.get(claims.platform, tuple(claims.measurements)), *values)
    for name, value in {**claims.measurements, **values}.items():
        mark = "" if name in pinned else "# "
        yield f"{mark}{_key(name)} = {_quoted([value])}\n"


def _assurance(kind: Platform, is_named_root: bool) -> Assurance:
    if kind is Platform.TPM:
        return Assurance.MEASURED_BOOT
    if kind is Platform.SIMULATED or is_named_root:
        return Assurance.SIMULATED
    # A GPU alone says nothing of the program that asked it.
    return Assurance.MEASURED_BOOT if kind is Platform.NVIDIA else Assurance.HARDWARE_TEE


def _joint_lines(companions: Iterable[Claims]) -> Iterable[str]:
    values: dict[str, set[str]] = {}
    for claims in companions:
        for name, value in claims.measurements.items():
            values.setdefault(name, set()).add(value)
    return [f"{_key(name)} = {_quoted(sorted(found))}\n" for name, found in values.items()]


def _root_lines(roots: Mapping[Platform, Path], folder: Path) -> Iterable[str]:
    for platform, path in roots.items():
        yield f"{_key(platform)} = {_quoted(os.path.relpath(path, folder))}\n"


def _key(name: str) -> str:
    is_bare = all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    return name if is_bare else _quoted(name)


def _quoted(value: object) -> str:
    # Strings and lists of them are the same in JSON and TOML, but for escaped surrogates.
    return json.dumps(value, ensure_ascii=False)
