"""Settings as TOML lines `section.key = value`: to print, to save, to read again.

It does not read (`cutlayer.settings`). The same form is what `--set` takes.
"""

import json
from collections.abc import Iterator, Mapping

from cutlayer.settings import Settings

__all__ = ["settings_text"]


def settings_text(settings: Settings) -> str:
    """Every setting that has a value, one a line, in the order of the classes."""
    table = settings.model_dump(mode="json", exclude_none=True)
    return "".join(f"{key} = {value}\n" for key, value in _lines(table, ()))


def _lines(table: Mapping[str, object], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        place = (*path, key)
        if isinstance(value, Mapping):
            yield from _lines(value, place)
        else:
            yield ".".join(place), _value(value)


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    # JSON's strings, numbers and truth values are TOML too.
    return json.dumps(value, ensure_ascii=False)
