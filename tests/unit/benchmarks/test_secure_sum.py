"""The benchmark of secure aggregation runs, and has the figures that the documents name."""

from benchmarks.report import parse_arguments
from benchmarks.secure_sum import main


def test_it_measures_time_and_bytes_per_member() -> None:
    result = main(parse_arguments("", ["--profile", "smoke"]))
    for key in ("mask_million_s", "member_s_10", "opening_s_10", "bytes_up_10", "bytes_down_10"):
        value = result[key]
        assert isinstance(value, int | float)
        assert value > 0, key
