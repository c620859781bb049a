"""Counters to rates."""

from cutlayer.dashboard.rates import RateMeter
from cutlayer.dashboard.view import Rates
from cutlayer.metrics import Totals


def test_the_rate_is_that_of_the_window_alone() -> None:
    meter = RateMeter(window_s=10)
    for second in range(31):
        tokens = 1000.0 if second < 15 else 1000.0 + 50 * (second - 15)
        meter.add(second, Totals(tokens=tokens, bytes_up=second * 8.0))
    assert meter.rates() == Rates(tokens_per_s=50, bytes_up_per_s=8, bytes_down_per_s=0)


def test_an_idle_server_goes_back_to_zero() -> None:
    meter = RateMeter(window_s=5)
    for second, tokens in ((0, 0), (1, 700), (7, 700), (9, 700)):
        meter.add(second, Totals(tokens=tokens))
    assert meter.rates().tokens_per_s == 0


def test_one_look_or_none_is_no_rate() -> None:
    meter = RateMeter()
    assert meter.rates() == Rates()
    meter.add(3, Totals(tokens=10))
    assert meter.rates() == Rates()
    meter.add(3, Totals(tokens=20))
    assert meter.rates() == Rates()


def test_a_replica_that_counts_from_zero_again_makes_no_negative_rate() -> None:
    meter = RateMeter()
    meter.add(0, Totals(tokens=900))
    meter.add(1, Totals(tokens=10))
    assert meter.rates().tokens_per_s == 0
