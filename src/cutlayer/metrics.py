"""Counters of a server, in Prometheus form. It does not serve them (`server.health`).

Nothing here names a token, a text or a loss.
"""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["FederationMetrics", "ServerMetrics", "Totals"]

_ONWARD = {"FORWARD", "DECODE"}
"""Kinds that bring new tokens; a BACKWARD brings those of its FORWARD again."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Since the server's start; whoever shows a rate looks twice."""

    tokens: float = 0.0
    """Rows' tokens, once each."""
    bytes_up: float = 0.0
    """Tensors from clients, as they travelled."""
    bytes_down: float = 0.0
    """Tensors to clients."""


class FederationMetrics:
    """Where the rounds of a federation stand; zero on a server without one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.round = Gauge("cutlayer_federation_round", "Round that is going on", registry=registry)
        self.rounds = Counter(
            "cutlayer_federation_rounds", "Rounds finished by this process", registry=registry
        )
        self.failed_attempts = Counter(
            "cutlayer_federation_failed_attempts", "Rounds that began anew", registry=registry
        )
        self.stragglers = Counter(
            "cutlayer_federation_stragglers", "Members asked whose update was late or missing",
            registry=registry,
        )  # fmt: skip
        self.members = Gauge(
            "cutlayer_federation_members", "Members that have not left", registry=registry
        )
        self.waiting = Gauge(
            "cutlayer_federation_members_waiting", "Members that wait for a round",
            registry=registry,
        )  # fmt: skip


class ServerMetrics:
    """One registry per server: several may live in one process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.tokens = Counter(
            "cutlayer_trunk_tokens", "Tokens that went through the trunk", ["kind"],
            registry=registry,
        )  # fmt: skip
        self.calls = Counter(
            "cutlayer_calls", "Calls answered", ["kind", "outcome"], registry=registry
        )
        self.bytes = Counter(
            "cutlayer_tensor_bytes", "Bytes of tensors, up from clients or down to them",
            ["direction"], registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "cutlayer_call_seconds", "Seconds from arrival to answer", ["kind"], registry=registry
        )
        self.batch_clients = Histogram(
            "cutlayer_batch_clients", "Clients of one call of the trunk",
            buckets=[1, 2, 4, 8, 16, 32, 64], registry=registry,
        )  # fmt: skip
        self.batch_tokens = Histogram(
            "cutlayer_batch_tokens", "Tokens of one call of the trunk",
            buckets=[4**power for power in range(10)], registry=registry,
        )  # fmt: skip
        self.connections = Gauge("cutlayer_connections", "Open connections", registry=registry)
        self.runs = Gauge("cutlayer_runs", "Training runs in memory", registry=registry)
        self.sessions = Gauge("cutlayer_sessions", "Generation sessions", registry=registry)
        self.session_rows = Gauge(
            "cutlayer_session_rows", "Open rows of all sessions", registry=registry
        )
        self.cache_bytes = Gauge(
            "cutlayer_cache_bytes", "KV bytes allocated for sessions", registry=registry
        )
        self.evictions = Gauge(
            "cutlayer_evicted_rows", "Rows that lost their cache to others since the start",
            registry=registry,
        )  # fmt: skip
        self.decode_tokens = Counter(
            "cutlayer_decode_tokens", "Tokens of generation through the trunk", registry=registry
        )
        self.decode_seconds = Counter(
            "cutlayer_decode_runner_seconds", "Seconds of the trunk's thread in generation",
            registry=registry,
        )  # fmt: skip
        self.decode_cpu_seconds = Counter(
            "cutlayer_decode_runner_cpu_seconds",
            "Processor seconds of the trunk's thread in generation",
            registry=registry,
        )
        self.graph_bytes = Gauge(
            "cutlayer_graph_bytes", "Activations waiting for their BACKWARD", registry=registry
        )
        self.federation = FederationMetrics(registry)

    def observe_batch(self, num_clients: int, num_tokens: int) -> None:
        """Count one call of the trunk."""
        self.batch_clients.observe(num_clients)
        self.batch_tokens.observe(num_tokens)

    def observe_decode(self, num_tokens: int, seconds: float, cpu_seconds: float) -> None:
        """Count one joint decode."""
        self.decode_tokens.inc(num_tokens)
        self.decode_seconds.inc(seconds)
        self.decode_cpu_seconds.inc(cpu_seconds)

    def totals(self) -> Totals:
        """What went through since the start."""
        return Totals(
            tokens=sum(_total(self.tokens, "kind", kind) for kind in _ONWARD),
            bytes_up=_total(self.bytes, "direction", "up"),
            bytes_down=_total(self.bytes, "direction", "down"),
        )

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self._registry)


def _total(counter: Counter, label: str, value: str) -> float:
    """Read without creating the label's series."""
    samples = (sample for metric in counter.collect() for sample in metric.samples)
    return sum(
        sample.value
        for sample in samples
        if sample.name.endswith("_total") and sample.labels.get(label) == value
    )
