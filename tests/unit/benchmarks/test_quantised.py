"""The benchmark of quantised trunks: it measures what it says."""

import json

import pytest

from benchmarks.quantised import main


def test_fewer_bits_take_less_memory_and_err_more(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--profile", "smoke", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = [result[f"{name}_megabytes"] for name in ("full", "int8", "nf4")]
    errors = [result[f"{name}_trunk_error"] for name in ("full", "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] == 0 < errors[1] < 0.02 < errors[2] < 0.2
