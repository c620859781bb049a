"""Write docs/settings.md from the settings classes: `.venv/bin/python docs/make_settings.py`.

It invents no text: keys, types, defaults and sentences are those of the code.
"""

import enum
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import cutlayer
from cutlayer.client.settings import ClientSettings
from cutlayer.enclave.owner_settings import EnclaveClientSettings
from cutlayer.enclave.settings import EnclaveSettings
from cutlayer.server.settings import ServerSettings

__all__ = ["SETTINGS_PAGE", "render"]

SETTINGS_PAGE = Path(__file__).with_name("settings.md")

_INTRO = """# Settings

Written by `docs/make_settings.py` from the settings classes; a test compares. Change the code, then
run `.venv/bin/python docs/make_settings.py`.

Each role has one TOML file. The key `lr` of the section `[train]` is `--set train.lr=1e-4` on the
command line. Unknown keys are errors that name the nearest known one. A section that may be left
out has required keys only when it is there. Limits are written as the code checks them. "none"
means that the key is absent. Examples with comments: the folder `examples/`. What the data settings
mean: [data.md](data.md); the privacy settings: [privacy.md](privacy.md).
"""


def render() -> str:
    """The whole page."""
    roles = (
        ("The data owner", ClientSettings),
        ("The trunk server", ServerSettings),
        ("The data owner of an enclave", EnclaveClientSettings),
        ("The enclave", EnclaveSettings),
    )
    return "\n".join([_INTRO, *(_role(title, cls) for title, cls in roles)])


def _role(title: str, cls: type[BaseModel]) -> str:
    lines = [f"## {title}", "", f"`{_public_name(cls)}`", ""]
    for name, section, lead in _sections(cls, ""):
        heading = f"### `{_header(cls, name)}`" if name else "### Before the first section"
        table = [_row(key, field) for key, field in _plain_fields(section)]
        if table:
            head = ["| key | type | default | meaning |", "|---|---|---|---|"]
            lines += [heading, "", *([lead, ""] if lead else []), *head, *table, ""]
    return "\n".join(lines)


def _header(cls: type[BaseModel], name: str) -> str:
    """As it stands in a file; sections that repeat have two brackets."""
    field = cls.model_fields.get(name)
    repeats = field is not None and typing.get_origin(field.annotation) is tuple
    return f"[[{name}]]" if repeats else f"[{name}]"


def _public_name(cls: type[BaseModel]) -> str:
    """As whoever writes Python imports it."""
    module = "cutlayer" if hasattr(cutlayer, cls.__name__) else cls.__module__
    return f"{module}.{cls.__name__}"


def _sections(
    cls: type[BaseModel], prefix: str, lead: str = ""
) -> typing.Iterator[tuple[str, type[BaseModel], str]]:
    yield prefix, cls, lead
    for key, field in cls.model_fields.items():
        child = _section_class(field)
        if child is not None:
            name = f"{prefix}.{key}" if prefix else key
            yield from _sections(child, name, _lead(field))


def _lead(field: FieldInfo) -> str:
    need = "Required" if field.is_required() else "May be left out"
    return f"{need}. {field.description or ''}".rstrip()


def _plain_fields(cls: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    fields = cls.model_fields.items()
    return [(key, field) for key, field in fields if _section_class(field) is None]


def _section_class(field: FieldInfo) -> type[BaseModel] | None:
    for option in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _row(key: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    cells = (f"`{key}`", _type(field), _default(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    limits = [limit for item in field.metadata for limit in _limits(item)]
    return ", ".join([_type_name(field.annotation), *limits])


def _limits(constraint: object) -> list[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    known = ((sign, getattr(constraint, name, None)) for name, sign in signs.items())
    return [f"{sign} {value}" for sign, value in known if value is not None]


def _type_name(annotation: object) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(arg) for arg in args if arg is not type(None))
    if origin is typing.Literal:
        return " or ".join(f'"{arg}"' for arg in args)
    if origin in (list, tuple):
        return f"list of {_type_name(args[0])}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(f'"{member.value}"' for member in annotation)
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return names.get(typing.cast(type, annotation), str(annotation))


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "**required**"
    return "none" if default is None else f"`{_value(default)}`"


def _value(default: object) -> str:
    if isinstance(default, list | tuple):
        return "[" + ", ".join(_value(item) for item in default) + "]"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, str | Path):
        return f'"{default}"'
    return str(default)


if __name__ == "__main__":
    SETTINGS_PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {SETTINGS_PAGE.name}")
