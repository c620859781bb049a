"""Counters of a server, in Prometheus form. It does not serve them (`server.health`).

Nothing here names a token, a text or a loss.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["ServerMetrics"]


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
        self.seconds = Histogram(
            "cutlayer_call_seconds", "Seconds from arrival to answer", ["kind"], registry=registry
        )
        self.connections = Gauge("cutlayer_connections", "Open connections", registry=registry)
        self.runs = Gauge("cutlayer_runs", "Training runs in memory", registry=registry)
        self.sessions = Gauge("cutlayer_sessions", "Generation sessions", registry=registry)
        self.cache_bytes = Gauge(
            "cutlayer_reserved_cache_bytes", "KV bytes reserved by sessions", registry=registry
        )
        self.graph_bytes = Gauge(
            "cutlayer_graph_bytes", "Activations waiting for their BACKWARD", registry=registry
        )

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self._registry)
