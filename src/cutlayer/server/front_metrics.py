"""Gauges of a hierarchical server's front, in Prometheus form. It does not serve them (`health`).

Replicas are named by number; nothing here names a client, a token or a text.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from cutlayer.server.replica_group import ReplicaStatus

__all__ = ["render_replicas"]


def render_replicas(replicas: Iterable[ReplicaStatus]) -> bytes:
    """The replicas' state now, in the text format that Prometheus scrapes."""
    registry = CollectorRegistry()
    gauges = {
        name: Gauge(f"cutlayer_replica_{name}", text, ["replica"], registry=registry)
        for name, text in _GAUGES.items()
    }
    for replica in replicas:
        for name, value in _values(replica).items():
            gauges[name].labels(str(replica.index)).set(value)
    return generate_latest(registry)


_GAUGES = {
    "up": "1 while the replica serves",
    "restarts": "Starts after a death",
    "clients": "Clients that are placed on it",
    "tokens": "Tokens that its trunk was sent since it started",
    "waiting": "Calls that wait for its trunk",
    "runs": "Training runs in its memory",
    "sessions": "Generation sessions",
}


def _values(replica: ReplicaStatus) -> dict[str, int]:
    values = {
        "up": int(replica.pid is not None),
        "restarts": replica.num_restarts,
        "clients": len(replica.clients),
    }
    if replica.stats is not None:
        values["tokens"] = replica.stats.num_tokens
        values["waiting"] = replica.stats.num_waiting
        values["runs"] = replica.stats.num_runs
        values["sessions"] = replica.stats.num_sessions
    return values
