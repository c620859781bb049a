"""`cutlayer status`: a server's state on one screen, the same as its page shows."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output, format_bytes

if TYPE_CHECKING:
    from cutlayer.dashboard.view import FederationView, PageState

__all__ = ["print_federation", "printable", "status"]

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

    from cutlayer.dashboard.auth import read_token
    from cutlayer.dashboard.fetch import fetch_state

    out = Output(as_json)
    page = fetch_state(url, read_token(token_file), authority)
    _print_server(page, out)
    if page.server.federation is not None:
        print_federation(page.server.federation, out, page.server.time_s)
    if page.server.replicas:
        rows = [
            (r.name, "ok" if r.is_alive else "fail", str(r.num_restarts), _names(r.members))
            for r in page.server.replicas
        ]
        out.table(("replica", "", "restarts", "clients"), rows)
    out.result(msgspec.to_builtins(page))


def _print_server(page: "PageState", out: Output) -> None:
    server, rates = page.server, page.rates
    totals = server.totals
    state = "ready" if server.is_ready else "not ready"
    out.say(f"{server.software}, {state}, up {_duration(server.uptime_s)}")
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


def print_federation(
    federation: "FederationView", out: Output, now_s: float, last: int = _LAST_ROUNDS
) -> None:
    """Rules, the round that is going on, members, the last rounds, published numbers."""
    out.say(f"federation   {federation.name}: {federation.strategy}, {_aggregation(federation)}")
    out.say(f"round        {_where(federation)}")
    if federation.waits_for and not federation.is_finished:
        out.say(f"waiting for  {_names(federation.waits_for)}")
    members = [
        (
            printable(member.name),
            str(member.status),
            str(member.num_rounds),
            str(member.num_missed),
            _ago(member.last_seen_s, now_s),
        )
        for member in federation.members
    ]
    out.table(("member", "now", "rounds", "missed", "last seen"), members)
    if federation.rounds:
        _print_rounds(federation, out, last)
    if federation.published:
        _print_published(federation, out)


def _print_rounds(federation: "FederationView", out: Output, last: int) -> None:
    rows = [
        (
            str(r.round),
            "-" if r.seconds is None else f"{r.seconds:.1f} s",
            f"{r.num_survivors} of {r.num_cohort}",
            str(r.num_attempts),
            f"{r.total_weight:,.0f}" if r.total_weight else "-",
            format_bytes(r.num_bytes),
            _names(r.stragglers),
        )
        for r in federation.rounds[-last:]
    ]
    out.table(("round", "time", "updates", "attempts", "tokens", "bytes", "stragglers"), rows)


def _print_published(federation: "FederationView", out: Output) -> None:
    """Each member's newest number of each name."""
    newest = {(p.member, p.name): p for p in federation.published}
    rows = [
        (
            printable(p.member),
            printable(p.name),
            str(p.round),
            "not finite" if p.value is None else f"{p.value:.5g}",
        )
        for p in newest.values()
    ]
    out.table(("published by", "number", "round", "value"), rows)


def _aggregation(federation: "FederationView") -> str:
    if federation.hides_aggregate:
        return "secure aggregation, sum hidden from the server"
    if federation.is_secure:
        return "secure aggregation on"
    return "secure aggregation OFF: the server sees each update"


def _where(federation: "FederationView") -> str:
    if federation.is_finished:
        return f"finished after {federation.num_rounds}"
    attempt = f", attempt {federation.attempt}" if federation.attempt > 1 else ""
    return f"{federation.round} of {federation.num_rounds}{attempt}: {federation.phase}"


def printable(text: str) -> str:
    """A peer's text without what steers a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _names(names: Iterable[str]) -> str:
    return ", ".join(printable(name) for name in names)


def _ago(then_s: float | None, now_s: float) -> str:
    return "never" if then_s is None else f"{_duration(max(0.0, now_s - then_s))} ago"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86_400 else f"{seconds / 86_400:.1f} d"
