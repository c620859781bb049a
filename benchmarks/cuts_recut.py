"""Cuts that move: 20 random re-cuts in a run, and 50 of its re-cuts broken off by kill -9.

Prints a table and one JSON line. The processes are those of `recut_crashes`.
"""

from collections.abc import Mapping, Sequence

import msgspec

from benchmarks.isolate import run_isolated
from benchmarks.recut_crashes import CrashRequest, CrashResult
from benchmarks.report import emit, parse_arguments

__all__ = ["main", "measure"]

Value = bool | int | float | str | None
_SCALES = {
    "smoke": CrashRequest(num_steps=16, num_recuts=4, num_crashes=4),
    "standard": CrashRequest(num_steps=200, num_recuts=20, num_crashes=50),
}


def measure(profile: str) -> CrashResult:
    """Everything once.

    Args:
        profile: `smoke` or `standard`.
    """
    return run_isolated("benchmarks.recut_crashes", _SCALES[profile], CrashResult, num_threads=1)


def main(arguments: Sequence[str] | None = None) -> Mapping[str, Value]:
    """Measure and print."""
    parsed = parse_arguments(__doc__ or "", arguments)
    result: dict[str, Value] = {"profile": parsed.profile}
    result |= msgspec.structs.asdict(measure(parsed.profile))
    emit(result, parsed)
    return result


if __name__ == "__main__":
    main()
