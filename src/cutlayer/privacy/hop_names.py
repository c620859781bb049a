"""Names of gates where the trunk is a chain: the gate's own, and which hop it leads to.

It knows no gate (`boundary`) and no budget (`budget`).
"""

__all__ = ["at_hop", "without_hop"]

_MARK = ".hop"


def at_hop(name: str, hop: int) -> str:
    """The name of a gate that leads to a hop; the first hop's is the plain name.

    Args:
        name: of the gate, such as activations.
        hop: its number, from 1.
    """
    assert hop >= 1
    return name if hop == 1 else f"{name}{_MARK}{hop}"


def without_hop(name: str) -> str:
    """The gate's own name, whichever hop it leads to."""
    return name.partition(_MARK)[0]
