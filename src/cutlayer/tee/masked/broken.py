"""Masks that are known to be broken, and which attack breaks each. It does nothing with them.

`tests/privacy/test_broken_masks.py` runs every attack that is named here.
"""

from collections.abc import Mapping

__all__ = ["BROKEN_SCHEMES", "ONE_TIME_PAD", "check_scheme"]

ONE_TIME_PAD = "one-time-pad"
"""The one scheme that is implemented."""

BROKEN_SCHEMES: Mapping[str, str] = {
    "reused-pad": "the difference of two messages under one pad is the difference of what they "
    "hide; with one known token the other is read off",
    "static-basis": "pads from few fixed vectors span a small space, which masked rows show; "
    "what is orthogonal to it is not hidden",
    "rotation": "with public weights the rotated ones give the rotation by least squares, and "
    "with it every input",
    "permutation": "columns of the permuted weights are those of the public ones in another "
    "order; matching them gives the order",
    "permuted-embedding": "a permuted embedding row has the values of its token's row: sorted, "
    "they name the token",
    "token-mixing": "mixed rows span the space of the tokens' rows: each embedding row in it is "
    "one of the tokens",
    "float-pad": "floating-point pads are not uniform: small ones leave the nearest token "
    "nearest, large ones round the numbers away",
}
"""Name of the scheme -> the attack."""


def check_scheme(name: str) -> str:
    """The name, if it is of a scheme that hides.

    Raises:
        ValueError: it is broken, or unknown.
    """
    if name in BROKEN_SCHEMES:
        raise ValueError(f"{name} is broken: {BROKEN_SCHEMES[name]}; use {ONE_TIME_PAD!r}")
    if name != ONE_TIME_PAD:
        raise ValueError(f"no masking scheme is called {name!r}; use {ONE_TIME_PAD!r}")
    return name
