"""`cutlayer serve`: run a trunk server, or a front with replicas, until it is told to stop.

Serving itself is in `server`.
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption, TraceOption
from cutlayer.cli.output import Output
from cutlayer.cli.page import serving_page
from cutlayer.errors import ConfigError, ModelError, TransportError

if TYPE_CHECKING:
    from cutlayer.dashboard.serve import Dashboard
    from cutlayer.server.front import TrunkFront
    from cutlayer.server.server import TrunkServer
    from cutlayer.server.settings import ServerSettings
    from cutlayer.trace import Trace

__all__ = ["serve"]

ReplicasOption = Annotated[
    int | None,
    typer.Option("--replicas", min=0, metavar="N", help="Copies of the trunk; 0 is none."),
]


def serve(
    config: ConfigOption,
    set_: SetOption = None,
    replicas: ReplicasOption = None,
    trace: TraceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a trunk server; SIGTERM and SIGINT let calls in flight finish, then stop it."""
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.server.settings import ServerSettings
    from cutlayer.server.tensor_parallel import follow_leader, is_follower, is_parallel
    from cutlayer.settings import load_settings
    from cutlayer.trace import Trace

    out = Output(as_json)
    changes = [] if replicas is None else [f"replicas.count={replicas}"]
    settings = load_settings(ServerSettings, config, [*(set_ or ()), *changes])
    if is_parallel() and settings.replicas.count:
        raise ConfigError(
            "torchrun shares one trunk out over processes, replicas.count copies it: choose one"
        )
    if is_follower():
        follow_leader(settings.model)
        return
    warn_of_expiry(settings.listen, out)
    asked = _stop_signals()
    tracer = None if trace is None else Trace("trunk server")
    lost: list[str] = []

    def give_up(reason: str) -> None:
        lost.append(reason)
        asked.set()

    server = _make_server(settings, tracer, give_up)
    began_s = time.monotonic()
    try:
        server.start()
        with serving_page(server, server.federation, settings, out) as page:
            host = settings.listen.address.rpartition(":")[0]
            _announce(server, f"{host}:{server.port}", settings.replicas.count, page, out)
            asked.wait()
            out.say("draining: calls in flight finish, new ones are refused")
    finally:
        server.stop()
        if tracer is not None and trace is not None:
            tracer.write(trace)
    if lost:
        raise TransportError(lost[0])
    out.say("stopped")
    out.result({"event": "stopped", "uptime_s": round(time.monotonic() - began_s, 3)})


def _make_server(
    settings: "ServerSettings", tracer: "Trace | None", give_up: Callable[[str], None]
) -> "TrunkServer | TrunkFront":
    if settings.replicas.count:
        from cutlayer.server.front import TrunkFront

        return TrunkFront(settings)
    from cutlayer.server.server import TrunkServer

    server = TrunkServer(settings, tracer)
    server.when_lost(give_up)
    return server


def _stop_signals() -> threading.Event:
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return asked


def _announce(
    server: "TrunkServer | TrunkFront",
    address: str,
    num_replicas: int,
    page: "Dashboard | None",
    out: Output,
) -> None:
    digest = _digest(server)
    spec = server.model.spec
    out.say(
        f"serving blocks {spec.lower} to {spec.upper - 1} of {spec.n_block} ({spec.model_type})"
    )
    if server.model.weight_bytes is not None:
        out.say(f"weights      {server.model.weight_bytes / 1e6:,.1f} MB, {spec.dtype}")
    out.say(f"address      {address}")
    if server.assurance() != "none":
        out.say(f"attestation  {server.assurance()}")
    if num_replicas:
        out.say(f"replicas     {num_replicas}")
    if server.health_port is not None:
        out.say(f"health       http://127.0.0.1:{server.health_port}/readyz")
    out.say(f"model digest {digest or 'unknown: this side does not hold the whole model'}")
    out.result(
        {
            "event": "ready",
            "address": address,
            "port": server.port,
            "health_port": server.health_port,
            "http_port": None if page is None else page.port,
            "model_digest": digest,
            "lower": spec.lower,
            "upper": spec.upper,
            "dtype": spec.dtype,
            "weight_bytes": server.model.weight_bytes,
            "replicas": num_replicas,
            "assurance": server.assurance(),
        }
    )


def _digest(server: "TrunkServer | TrunkFront") -> str | None:
    try:
        return server.model.manifest.root()
    except ModelError:
        return None
