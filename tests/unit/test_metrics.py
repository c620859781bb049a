"""The counters of a server."""

from cutlayer.metrics import ServerMetrics, Totals


def test_tokens_of_a_batch_count_once_although_it_comes_back() -> None:
    metrics = ServerMetrics()
    metrics.tokens.labels("FORWARD").inc(10)
    metrics.tokens.labels("BACKWARD").inc(10)
    metrics.tokens.labels("DECODE").inc(3)
    metrics.bytes.labels("up").inc(100)
    assert metrics.totals() == Totals(tokens=13, bytes_up=100, bytes_down=0)


def test_federation_metrics_are_there_from_the_start() -> None:
    metrics = ServerMetrics()
    metrics.federation.rounds.inc()
    lines = metrics.render().decode().splitlines()
    assert "cutlayer_federation_rounds_total 1.0" in lines
    for name in ("failed_attempts_total", "stragglers_total", "members", "members_waiting"):
        assert f"cutlayer_federation_{name} 0.0" in lines


def test_two_servers_of_one_process_count_apart() -> None:
    first, second = ServerMetrics(), ServerMetrics()
    first.federation.stragglers.inc()
    assert b"cutlayer_federation_stragglers_total 0.0" in second.render()


def test_decodes_count_their_tokens_and_the_seconds_of_the_trunk_s_thread() -> None:
    metrics = ServerMetrics()
    metrics.observe_decode(8, 0.5, 0.25)
    metrics.observe_decode(2, 0.25, 0.125)
    lines = metrics.render().decode().splitlines()
    assert "cutlayer_decode_tokens_total 10.0" in lines
    assert "cutlayer_decode_runner_seconds_total 0.75" in lines
    assert "cutlayer_decode_runner_cpu_seconds_total 0.375" in lines
