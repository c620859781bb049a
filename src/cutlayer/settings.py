"""Typed settings: one frozen pydantic base, one TOML file plus `--set a.b=c`, one digest.

It does not know any setting: those live with the code that they configure.
"""

import difflib
import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from cutlayer.canonical import canonical_json
from cutlayer.errors import ConfigError

__all__ = ["Settings", "load_settings", "parse_settings", "settings_digest"]

T = TypeVar("T", bound="Settings")


class Settings(BaseModel):
    """Base of every settings class: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )


def load_settings(cls: type[T], path: Path, overrides: Iterable[str] = ()) -> T:
    """Read one TOML file, apply `a.b=c` overrides (values in TOML syntax, else text), validate.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, or a value is refused.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read settings {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(table, override)
    return parse_settings(cls, table, where=str(path))


def parse_settings(cls: type[T], table: Mapping[str, object], where: str) -> T:
    """Validate plain values; errors name the key and, for unknown keys, the nearest one."""
    try:
        return cls.model_validate(table)
    except ValidationError as error:
        lines = [_explain(cls, dict(item)) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def settings_digest(settings: Settings) -> str:
    """SHA-256 over the canonical JSON of the resolved settings, in hex."""
    return hashlib.sha256(canonical_json(settings.model_dump(mode="json"))).hexdigest()


def _apply_override(table: dict[str, object], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r} is not of the form section.key=value")
    *parents, last = key.strip().split(".")
    node = table
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
        node = child
    node[last] = _toml_value(text.strip())


def _toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(cls: type[Settings], item: Mapping[str, object]) -> str:
    location = item["loc"]
    assert isinstance(location, tuple)
    key = ".".join(str(part) for part in location)
    if item["type"] == "missing":
        return f"{key} is required"
    if item["type"] != "extra_forbidden":
        said = str(item["msg"]).removeprefix("Value error, ")
        # A whole section would bury what is wrong with it.
        is_section = isinstance(item.get("input"), Mapping)
        named = key if is_section else f"{key}={item.get('input')!r}"
        return f"{named}: {said}" if named else said
    known = _known_keys(cls, location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"{key} is not a setting; {hint}"


def _known_keys(cls: type[Settings], path: tuple[object, ...]) -> list[str]:
    node: type[BaseModel] = cls
    for part in path:
        if isinstance(part, int):
            continue
        field = node.model_fields.get(str(part))
        annotation = field.annotation if field else None
        # A section that may be absent is a union with None.
        sections = [
            kind
            for kind in get_args(annotation) or (annotation,)
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not sections:
            return []
        node = sections[0]
    return list(node.model_fields)
