"""What `cutlayer attest` is given: evidence, times, hex, names with files. It judges nothing."""

import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.settings import parse_settings
from cutlayer.tee.attest import read_collateral
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.evidence import Evidence, Platform, read_evidence, read_limited
from cutlayer.tee.verifier import utc_now

__all__ = [
    "attester_settings",
    "evidence_of",
    "hex_value",
    "named_files",
    "named_values",
    "platform_of",
    "roots_of",
    "time_of",
]


def evidence_of(path: Path, platform: str | None, collateral: Sequence[str]) -> Evidence:
    """Evidence of a file: ours, or a vendor's bytes where a platform is named.

    Raises:
        ConfigError: the file cannot be read, or a platform or collateral is malformed.
        AttestationError: it is no evidence file.
    """
    given = read_collateral(named_files(collateral, "--collateral"))
    if platform is not None:
        return Evidence(
            platform=platform_of(platform), body=read_limited(path, "evidence"), collateral=given
        )
    evidence = read_evidence(path)
    return Evidence(
        platform=evidence.platform,
        body=evidence.body,
        collateral={**evidence.collateral, **given},
        companions=evidence.companions,
    )


def platform_of(name: str) -> Platform:
    """The platform with this name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return Platform(name)
    except ValueError:
        known = ", ".join(Platform)
        raise ConfigError(f"no platform is called {name!r}; known: {known}") from None


def roots_of(given: Sequence[str]) -> dict[Platform, Path]:
    """Files by platform, from PLATFORM=FILE.

    Raises:
        ConfigError: malformed, or no such platform.
    """
    files = named_files(given, "--root")
    return {platform_of(name): path for name, path in files.items()}


def time_of(text: str | None) -> datetime:
    """An ISO 8601 time, UTC unless it names a zone; now without one.

    Raises:
        ConfigError: it is no time.
    """
    if text is None:
        return utc_now()
    try:
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"--at {text!r} is no time; write it as 2026-11-21 or 2026-11-21T12:00:00Z"
        ) from error


def hex_value(text: str | None, option: str) -> bytes | None:
    """Up to 64 bytes in hex; None where the option is absent.

    Raises:
        ConfigError: no hex, empty or longer.
    """
    if text is None:
        return None
    try:
        value = bytes.fromhex(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is no hex number") from error
    if not 1 <= len(value) <= 64:
        raise ConfigError(f"{option} has {len(value)} bytes; 1 to 64 can be bound")
    return value


def named_files(given: Sequence[str], option: str) -> dict[str, Path]:
    """Files by name, from NAME=FILE.

    Raises:
        ConfigError: a name or a file is missing.
    """
    return {name: Path(value) for name, value in named_values(given, option).items()}


def named_values(given: Sequence[str], option: str) -> dict[str, str]:
    """Values by name, from NAME=VALUE.

    Raises:
        ConfigError: a name or a value is missing, or a name comes twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ConfigError(f"{option} {text!r} is not of the form NAME=VALUE")
        if name in found:
            raise ConfigError(f"{option} names {name!r} twice")
        found[name] = value
    return found


def attester_settings(
    config: Path | None, source: str | None, folder: Path | None, collateral: Sequence[str]
) -> AttesterSettings:
    """The table [tee.attester] of a settings file, or one of options; options override the file.

    Raises:
        ConfigError: no source is named, or the file has no such table.
    """
    table = {} if config is None else _attester_table(config)
    if source is not None:
        table["source"] = source
    if folder is not None:
        table["folder"] = folder
    if collateral:
        table["collateral"] = named_files(collateral, "--collateral")
    if "source" not in table:
        raise ConfigError("name the source of evidence: --source simulated, or --config FILE")
    return parse_settings(AttesterSettings, table, where=str(config or "options"))


def _attester_table(config: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read settings {config}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is not valid TOML: {error}") from error
    tee = table.get("tee")
    attester = tee.get("attester") if isinstance(tee, dict) else None
    if not isinstance(attester, dict):
        raise ConfigError(f"{config} has no table [tee.attester], so it names no source")
    return attester
