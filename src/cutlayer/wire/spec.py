"""The spec: what both sides of a connection must agree on before the first tensor.

It does not load models nor hash them: the manifest leaves travel beside it in HELLO and WELCOME.
"""

from dataclasses import asdict, dataclass, fields

from cutlayer.errors import ProtocolError, SpecMismatch
from cutlayer.wire.frame import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION

__all__ = ["Spec", "compare"]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A flat description of the model's cut and of the form in which tensors travel."""

    protocol: int = PROTOCOL_VERSION
    """Version of frames and messages that this side wants to speak."""
    model_type: str
    """The architecture, as the model's config names it."""
    n_block: int
    """Blocks of the whole model."""
    lower: int
    """First block of the trunk."""
    upper: int
    """First block after the trunk."""
    hidden_size: int
    dtype: str
    """Type in which the trunk computes, such as "float32"; of a trunk with quantised weights also
    how they are kept, such as "float32/nf4"."""
    codec_up: str
    """Codec of tensors from the client to the server."""
    codec_down: str
    """Codec of tensors from the server to the client."""

    def to_table(self) -> dict[str, str | int]:
        """The form that travels in HELLO and WELCOME."""
        table: dict[str, str | int] = asdict(self)
        return table

    @classmethod
    def from_table(cls, table: dict[str, str | int]) -> "Spec":
        """Read a peer's table.

        Raises:
            SpecMismatch: fields are absent or unknown, as from software of another version.
            ProtocolError: a value has the wrong type.
        """
        known = {field.name: field.type for field in fields(cls)}
        if set(table) != set(known):
            missing = ", ".join(sorted(set(known) - set(table))) or "none"
            unknown = ", ".join(sorted(name[:40] for name in set(table) - set(known))) or "none"
            raise SpecMismatch(
                f"the peer's spec has other fields (missing: {missing}; unknown: {unknown}): "
                "its software is of another version, upgrade the older side"
            )
        values: dict[str, str | int] = {}
        for name, wanted in known.items():
            if type(table[name]) is not wanted:
                raise ProtocolError(f"spec field {name} is {table[name]!r:.60}, not {wanted}")
            values[name] = table[name]
        return cls(**values)  # type: ignore[arg-type]  # types were compared above


_CUT = "choose a cut within the blocks that the server holds"
_MODEL = "load the same model on both sides"
_HINTS = {
    "protocol": f"this side speaks {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}; "
    "upgrade the older side",
    "model_type": _MODEL,
    "n_block": _MODEL,
    "lower": _CUT,
    "upper": _CUT,
    "hidden_size": _MODEL,
    "dtype": "set the same model.dtype and model.trunk_weights on both sides; quantised weights, "
    "named after a slash, give other numbers than full ones",
    "codec_up": "set the same codec on both sides",
    "codec_down": "set the same codec on both sides",
}


def compare(mine: Spec, theirs: Spec) -> None:
    """Refuse a peer that describes another model, cut or format.

    Raises:
        SpecMismatch: lists every field that differs, with both values and what to do.
    """
    lines = []
    for name, hint in _HINTS.items():
        own, other = getattr(mine, name), getattr(theirs, name)
        if name == "protocol":
            is_same = OLDEST_PROTOCOL_VERSION <= other <= PROTOCOL_VERSION
        else:
            is_same = own == other
        if not is_same:
            lines.append(f"{name}: ours {own!r}, the peer's {_shown(other)} ({hint})")
    if lines:
        raise SpecMismatch("the two sides differ in " + "; ".join(lines))


def _shown(value: str | int) -> str:
    return repr(value if isinstance(value, int) else value[:80])
