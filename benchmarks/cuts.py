"""Cuts that differ and cuts that move: gradients, throughput, re-cuts and crashes in them.

Prints a table and one JSON line. Different cuts are `cuts_mixed`, moving ones `cuts_recut`.
"""

from collections.abc import Mapping, Sequence

import msgspec
import psutil

from benchmarks import cuts_mixed, cuts_recut
from benchmarks.report import emit, parse_arguments

__all__ = ["main"]

Value = bool | int | float | str | None


def main(arguments: Sequence[str] | None = None) -> Mapping[str, Value]:
    """Measure and print."""
    parsed = parse_arguments(__doc__ or "", arguments)
    result: dict[str, Value] = {"profile": parsed.profile, "load_before": psutil.getloadavg()[0]}
    result |= msgspec.structs.asdict(cuts_mixed.measure(parsed.profile, parsed.model))
    result |= msgspec.structs.asdict(cuts_recut.measure(parsed.profile))
    emit(result, parsed)
    return result


if __name__ == "__main__":
    main()
