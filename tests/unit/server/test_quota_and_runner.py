"""A client's daily bytes, and the one thread that computes."""

import threading
import time

import pytest

from cutlayer.errors import PermissionRefused, TransportError
from cutlayer.server.quota import DailyQuota
from cutlayer.server.runner import Runner
from cutlayer.server.scheduler import FairScheduler


def test_bytes_of_a_day_are_limited_per_client_and_start_anew() -> None:
    now_s = [0.0]
    quota = DailyQuota(100, clock=lambda: now_s[0])
    quota.charge("a", 100)
    quota.charge("b", 1)
    with pytest.raises(PermissionRefused, match="00:00 UTC"):
        quota.charge("a", 1)
    now_s[0] = 86_400.0
    quota.charge("a", 1)
    assert quota.used_bytes("a") == 1


def test_vectors_of_a_day_are_limited_beside_the_bytes() -> None:
    quota = DailyQuota(None, max_vectors=10, clock=lambda: 0.0)
    quota.charge("a", 1 << 40, 10)
    quota.charge("a", 1 << 40)
    with pytest.raises(PermissionRefused, match=r"10 vectors .*max_client_vectors_per_day"):
        quota.charge("a", 1, 1)
    assert quota.used_vectors("a") == 10
    assert quota.used_bytes("a") == 2 << 40


def test_a_refused_call_counts_nothing() -> None:
    quota = DailyQuota(100, max_vectors=10, clock=lambda: 0.0)
    with pytest.raises(PermissionRefused, match="vectors"):
        quota.charge("a", 50, 11)
    assert (quota.used_bytes("a"), quota.used_vectors("a")) == (0, 0)
    quota.charge("a", 100, 10)


def test_error_of_one_request_reaches_its_caller_and_no_other() -> None:
    runner = Runner(FairScheduler())
    bad = runner.submit("a", 1, lambda: 1 // 0)
    good = runner.submit("b", 1, lambda: 7)
    with pytest.raises(ZeroDivisionError):
        bad.result(5)
    assert good.result(5) == 7
    runner.close()


def test_cancelled_request_is_never_run_and_closing_refuses_what_waits() -> None:
    runner = Runner(FairScheduler())
    gate, begun, ran = threading.Event(), threading.Event(), []

    def block() -> bool:
        begun.set()
        return gate.wait(5)

    running = runner.submit("a", 1, block)
    assert begun.wait(5)
    cancelled = runner.submit("a", 1, lambda: ran.append("cancelled"))
    waiting = runner.submit("a", 1, lambda: ran.append("waiting"))
    assert cancelled.cancel()
    closing = threading.Thread(target=runner.close)
    closing.start()
    with pytest.raises(TransportError, match="shutting down"):
        waiting.result(5)
    gate.set()
    closing.join(5)
    assert running.result(5) is True
    assert ran == []
    with pytest.raises(TransportError):
        runner.submit("a", 1, time.monotonic)
