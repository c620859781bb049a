"""The base of all frame headers. It defines no message."""

import msgspec

__all__ = ["Header"]


class Header(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Base of all headers. They travel as arrays: the order of fields is part of the format."""
