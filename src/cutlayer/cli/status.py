"""`cutlayer status`: a server's state on one screen, the same as its page shows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.federation_tables import (
    joined_names,
    print_members,
    print_published,
    print_rounds,
    printable,
    time_span,
)
from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output, format_bytes

if TYPE_CHECKING:
    from cutlayer.dashboard.view import FederationView, PageState, ReplicaView

__all__ = ["status"]

_LAST_ROUNDS = 8
UrlOption = Annotated[str, typer.Option("--url", help="Address of the server's page.")]
TokenOption = Annotated[
    Path, typer.Option("--token-file", metavar="FILE", help="The server's token.")
]
TrustOption = Annotated[
    Path | None,
    typer.Option("--authority", metavar="FILE", help="Certificates to trust for https, PEM."),
]


def status(
    url: UrlOption = "http://127.0.0.1:7445",
    token_file: TokenOption = Path("state/http.token"),
    authority: TrustOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a running server: federation, members, rounds, throughput, bytes, runs."""
    import msgspec

    from cutlayer.dashboard.fetch import fetch_state
    from cutlayer.web.auth import read_token

    out = Output(as_json)
    page = fetch_state(url, read_token(token_file), authority)
    _print_server(page, out)
    if page.server.federation is not None:
        _print_federation(page.server.federation, page.server.time_s, out)
    if page.server.replicas:
        _print_replicas(page.server.replicas, out)
    out.result(msgspec.to_builtins(page))


def _print_server(page: "PageState", out: Output) -> None:
    server, rates = page.server, page.rates
    totals = server.totals
    state = "ready" if server.is_ready else "not ready"
    out.say(f"{printable(server.software)}, {state}, up {time_span(server.uptime_s)}")
    if server.assurance != "none":
        out.say(f"attestation  {printable(server.assurance)}")
    out.say(f"throughput   {rates.tokens_per_s:,.0f} tokens/s, {totals.tokens:,.0f} in all")
    out.say(
        f"bytes        {format_bytes(totals.bytes_up)} up, {format_bytes(totals.bytes_down)} down "
        f"({format_bytes(rates.bytes_up_per_s)}/s, {format_bytes(rates.bytes_down_per_s)}/s)"
    )
    out.say(
        f"open         {server.num_connections} connections, {len(server.runs)} training runs "
        f"({format_bytes(server.graph_bytes)} graphs), {server.num_sessions} sessions "
        f"({format_bytes(server.cache_bytes)} cache)"
    )


def _print_federation(federation: "FederationView", now_s: float, out: Output) -> None:
    name = printable(federation.name)
    out.say(f"federation   {name}: {printable(federation.strategy)}, {_aggregation(federation)}")
    out.say(f"round        {_where(federation)}")
    if federation.waits_for:
        out.say(f"waiting for  {joined_names(federation.waits_for)}")
    print_members(federation.members, now_s, out)
    if federation.rounds:
        print_rounds(federation.rounds[-_LAST_ROUNDS:], out)
    if federation.published:
        print_published(federation.published, out)


def _print_replicas(replicas: "tuple[ReplicaView, ...]", out: Output) -> None:
    rows = [
        (
            printable(replica.name),
            "ok" if replica.is_alive else "fail",
            str(replica.num_restarts),
            joined_names(replica.members),
        )
        for replica in replicas
    ]
    out.table(("replica", "", "restarts", "clients"), rows)


def _aggregation(federation: "FederationView") -> str:
    if federation.hides_aggregate:
        return "secure aggregation, sum hidden from the server"
    if federation.is_secure:
        return "secure aggregation on"
    return "secure aggregation OFF: the server sees each update"


def _where(federation: "FederationView") -> str:
    if federation.is_finished:
        return f"finished after {federation.num_rounds}"
    if federation.stopped:
        return f"stopped after {federation.round}: {printable(federation.stopped)}"
    attempt = f", attempt {federation.attempt}" if federation.attempt > 1 else ""
    phase = printable(federation.phase)
    return f"{federation.round} of {federation.num_rounds}{attempt}: {phase}"
