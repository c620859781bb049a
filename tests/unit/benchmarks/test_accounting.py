"""The accounting benchmark: its reference is right, and it would see what is wrong."""

import math

import pytest

from benchmarks.accounting import Point, closed_form, least_sigma, main, optimal_pure


def test_the_reference_gives_the_published_values():
    assert closed_form(0.5 / math.sqrt(100), 1e-5) == pytest.approx(284.39, abs=0.01)
    assert closed_form(10 / math.sqrt(100), 1e-5) == pytest.approx(4.377, abs=0.001)
    assert closed_form(least_sigma(3.0, 1e-6, 2.0) / 2.0, 1e-6) == pytest.approx(3.0, rel=1e-9)
    assert optimal_pure(2.0, 1, 1e-12) == pytest.approx(2.0, rel=1e-6)


def test_the_smoke_profile_finds_the_accountants_right(capsys: pytest.CaptureFixture[str]):
    result = main(["--profile", "smoke", "--json"])
    assert '"max_rel_diff"' in capsys.readouterr().out.splitlines()[-1]
    for key in ("max_rel_diff", "matrix_scale_max_rel_diff"):
        found = result[key]
        assert isinstance(found, float)
        assert found < 1e-3
    assert result["below_reference"] == 0


def test_an_accountant_below_the_reference_is_counted():
    right = {"name": "x", "delta": 1e-5, "reference": 4.0}
    assert Point(**right, pld=4.0, rdp=4.2).num_below == 0  # type: ignore[arg-type]
    assert Point(**right, pld=3.99, rdp=1.0).num_below == 2  # type: ignore[arg-type]
    assert Point(**right, pld=3.99, rdp=1.0).rel_diff > 1e-3  # type: ignore[arg-type]
