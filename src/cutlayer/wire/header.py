"""The base of all frame headers, and the finished step that several of them carry.

It defines no message.
"""

from typing import ClassVar

import msgspec

__all__ = ["Header", "Step"]


class Header(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Base of all headers. They travel as arrays: the order of fields is part of the format."""

    num_late: ClassVar[int] = 0
    """Fields at the end, empty by default, that receivers of the first release do not know: they
    are absent on the wire where they are empty."""

    def written(self) -> "Header | list[object]":
        """What travels: the header, or its fields without the empty late ones."""
        if not self.num_late:
            return self
        values: list[object] = list(msgspec.structs.astuple(self))
        for _ in range(self.num_late):
            if values[-1]:
                break
            values.pop()
        return values


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """What the server needs to finish one optimizer step: two scalars and a learning rate."""

    step: int
    """The step that this finishes, from 1."""
    client_sq_norm: float
    """Squared L2 norm of head and tail gradients of the summed loss. Visible to the server."""
    num_tokens: int
    """Label tokens of the step: gradients of the summed loss are divided by it."""
    lr: float
