"""Many clients at one trunk server: against the naive baseline, unsplit PEFT and our own sequence.

Prints tables and one JSON line. All sides run on the same rows in one run; every client is a
process behind a link of its own, and one replica of the trunk serves them all.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import psutil

from benchmarks.federation_parity import ParityRequest, ParityResult
from benchmarks.federation_sides import Case, Measured, Ours, Subject, subject, unsplit
from benchmarks.isolate import run_isolated
from benchmarks.link import LINK_PROFILES
from benchmarks.many_naive import MASK_FORM, NaiveFederation
from benchmarks.published_table import (
    centralised_seconds,
    client_batch_seconds,
    hierarchical_seconds,
    print_published_table,
    sequential_seconds,
    table_rows,
)
from benchmarks.replicas import replica_efficiency
from benchmarks.report import Arguments, emit, median, parse_arguments, print_table
from benchmarks.split import Setting, make_kits
from benchmarks.subjects import subject_folder, write_small_llama
from benchmarks.workers import WorkerGroup
from cutlayer.identity.provision import LocalFolders

Result = dict[str, bool | int | float | str | None]

Sections = dict[str, dict[str, Setting]]

SERVER: Sections = {}
"""Sections of the server's settings that differ from the defaults."""
SEQUENTIAL: Sections = {"batch": {"max_clients": 1}}
"""The same for our own sequential mode: who is alone does not wait for others."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    small: Subject
    """Round trips dominate."""
    real: Subject
    """Compute dominates."""
    kits: LocalFolders
    num_clients: int
    threads: tuple[int, ...]
    """Settings to try, of the server, and of sides on which one process computes at a time."""
    short: Case
    """Over the link, few tokens."""
    long: Case
    """Over the link, more of them."""
    loop: Case
    """On loopback, against our own sequential mode."""
    table: Case
    """The published comparison."""
    batch_counts: tuple[int, ...]
    """Clients in a client batch of the published comparison."""
    replica_counts: tuple[int, ...]
    """Replicas, and clients, of its hierarchical server; no more than there are cores."""
    wide: Case
    """Of the real model, over the link."""
    naive_steps: int
    """Of each client, the first warms up."""


class Comparison:
    """Measures what the plan says, side by side, and keeps everything for one table."""

    def __init__(self, plan: Plan, group: WorkerGroup) -> None:
        self._plan, self._group = plan, group
        self.shown: list[tuple[str, Measured]] = []

    def links(self) -> Result:
        """The small model behind links, on loopback against our own sequential mode, published."""
        plan = self._plan
        with self._naive(plan.small, plan.short) as naive:
            naive_short = self._fastest_naive(naive, plan.small, plan.short)
            naive_long = self._fastest_naive(naive, plan.small, plan.long)
        short, long, loop = self._best_of((plan.short, plan.long, plan.loop))
        with self._ours(plan.small, max(plan.threads), SEQUENTIAL) as ours:
            turns = [ours.in_turn(plan.loop, count) for count in plan.threads]
            per_row_s = sequential_seconds(ours, plan.table, plan.threads)
        with self._ours(plan.small, max(plan.threads)) as ours:
            per_row_s |= client_batch_seconds(ours, plan.table, plan.batch_counts)
        per_row_s |= centralised_seconds(plan.small, plan.table, plan.threads)
        for count in plan.replica_counts:
            replicas: Sections = {**SERVER, "replicas": {"count": count, "threads": 1}}
            with Ours(plan.small, plan.kits, self._group, 1, replicas) as ours:
                per_row_s |= hierarchical_seconds(ours, plan.table, count)
        for one in turns:
            self._show("loopback", plan.loop, one)
        sequential = min(turns, key=lambda one: one.median_s)
        return {
            "ratio_naive_link": naive_short.median_s / short.median_s,
            "ratio_naive_link_64": naive_long.median_s / long.median_s,
            "ratio_sequential_loopback": sequential.median_s / loop.median_s,
            **_timed("link", short),
            **_timed("link_naive", naive_short),
            **_timed("link_64", long),
            **_timed("link_64_naive", naive_long),
            **_timed("loopback", loop),
            **_timed("loopback_sequential", sequential),
            "bytes_up_per_token": long.bytes_up_per_token,
            "bytes_down_per_token": long.bytes_down_per_token,
            **_published(per_row_s),
        }

    def tokens(self) -> Result:
        """The real model: training tokens/s of all clients against unsplit and naive."""
        plan, case, count = self._plan, self._plan.wide, self._plan.num_clients
        threads = max(plan.threads)
        with self._ours(plan.real, threads) as ours:
            own = ours.together(case)
        plain = unsplit(plan.real, case, count, threads, steps=min(3, case.steps))
        with self._naive(plan.real, case) as naive:
            rows = case.rows(plan.real, count)
            seconds = naive.round_seconds(rows, max(2, plan.naive_steps // 3), threads)[1:]
        naively = Measured(name=f"naive {MASK_FORM}", seconds=seconds, threads=str(threads))
        for one in (own, plain, naively):
            self._show("real model", case, one)
        num_tokens = case.num_tokens * count
        return {
            "ratio_unsplit_tokens": plain.median_s / own.median_s,
            "ratio_naive_tokens": naively.median_s / own.median_s,
            "tokens_per_s": num_tokens / own.median_s,
            "tokens_per_s_unsplit": num_tokens / plain.median_s,
            "tokens_per_s_naive": num_tokens / naively.median_s,
            "threads": own.threads,
            "threads_unsplit": plain.threads,
            "peak_mb_client": own.client_peak_bytes / 1e6,
            "peak_mb_server": own.server_peak_bytes / 1e6,
        }

    def print(self) -> None:
        """One table of everything that was measured."""
        print_table(
            "one step of every client",
            ("where", "rows x tokens", "side", "threads", "ms, median", "ms, all"),
            [
                (
                    where,
                    f"{len(one.seconds)} x",
                    one.name,
                    one.threads,
                    one.median_s * 1e3,
                    " ".join(f"{1e3 * s:.0f}" for s in one.seconds),
                )
                for where, one in self.shown
            ],
        )

    def _best_of(self, cases: tuple[Case, ...]) -> list[Measured]:
        """Each case with every number of server threads; the fastest of each."""
        found: list[list[Measured]] = [[] for _ in cases]
        for threads in self._plan.threads:
            with self._ours(self._plan.small, threads) as ours:
                for place, case in enumerate(cases):
                    found[place].append(ours.together(case))
                    self._show(case.link, case, found[place][-1])
        return [min(ones, key=lambda one: one.median_s) for ones in found]

    def _fastest_naive(self, naive: NaiveFederation, model: Subject, case: Case) -> Measured:
        rows = case.rows(model, self._plan.num_clients)
        ones = [
            Measured(
                name=f"naive {MASK_FORM}",
                seconds=naive.round_seconds(rows, self._plan.naive_steps, threads)[1:],
                threads=str(threads),
            )
            for threads in self._plan.threads
        ]
        for one in ones:
            self._show(case.link, case, one)
        return min(ones, key=lambda one: one.median_s)

    def _naive(self, model: Subject, case: Case) -> NaiveFederation:
        link = LINK_PROFILES[case.link]
        return NaiveFederation(model.folder, model.lower, model.upper, link, self._plan.num_clients)

    def _ours(self, model: Subject, server_threads: int, extra: Sections = SERVER) -> Ours:
        return Ours(model, self._plan.kits, self._group, server_threads, extra)

    def _show(self, where: str, case: Case, measured: Measured) -> None:
        self.shown.append((f"{where}, {case.num_rows} x {case.length}", measured))


def _published(seconds_per_row: Mapping[str, float]) -> Result:
    """Print the published comparison; our factors over sequential, per replica."""
    factors = print_published_table(table_rows(seconds_per_row), "no mask travels, lengths do")
    keys = str.maketrans(" -", "__")
    return {f"factor_{name.translate(keys)}": value for name, value in factors.items()}


def _timed(name: str, measured: Measured) -> Result:
    return {f"step_ms_{name}": measured.median_s * 1e3, f"threads_{name}": measured.threads}


def measure(arguments: Arguments, work: Path) -> Result:
    """Everything once."""
    result: Result = {"load_average_before": psutil.getloadavg()[0]}
    plan = _plan(arguments, work)
    parity = run_isolated(
        "benchmarks.federation_parity",
        ParityRequest(num_steps=5 if arguments.is_smoke else 50),
        ParityResult,
        num_threads=1,
    )
    result |= msgspec.structs.asdict(parity)
    # Before the clients' processes take memory; always of the small model.
    replicated = replica_efficiency(replace(arguments, model=None))
    result["replica_efficiency"] = median(replicated.efficiencies)
    with WorkerGroup("benchmarks.many_clients", plan.num_clients, num_threads=1) as group:
        comparison = Comparison(plan, group)
        result |= comparison.links()
        result |= comparison.tokens()
    comparison.print()
    return {
        **result,
        "clients": plan.num_clients,
        "mask_form": MASK_FORM,
        "profile": arguments.profile,
    }


def _plan(arguments: Arguments, work: Path) -> Plan:
    is_smoke = arguments.is_smoke
    count = 2 if is_smoke else 8
    names = [f"owner{number}" for number in range(count)]
    kits = make_kits(work / "kits", names)
    real = subject_folder(arguments.model, is_smoke=is_smoke, work_folder=work)
    if is_smoke:
        tiny = subject(real, 1)
        link = Case(link="lan", num_rows=1, length=8, steps=4, warmup=1)
        loop = Case(link="loopback", num_rows=1, length=8, steps=4, warmup=1)
        return Plan(
            small=tiny,
            real=tiny,
            kits=kits,
            num_clients=count,
            threads=(1,),
            short=link,
            long=link,
            loop=loop,
            table=loop,
            batch_counts=(2,),
            replica_counts=(),
            wide=link,
            naive_steps=3,
        )
    return Plan(
        small=subject(write_small_llama(work / "small-llama"), 1),
        real=subject(real, 2),
        kits=kits,
        num_clients=count,
        threads=arguments.threads,
        short=Case(link="wan", num_rows=1, length=16, steps=40, warmup=4),
        long=Case(link="wan", num_rows=1, length=64, steps=20, warmup=3),
        loop=Case(link="loopback", num_rows=1, length=32, steps=30, warmup=3),
        table=Case(link="loopback", num_rows=1, length=128, steps=20, warmup=3),
        batch_counts=(2, 4, 8),
        replica_counts=tuple(n for n in (2, 4, 8) if n <= (os.cpu_count() or 1)),
        wide=Case(link="wan", num_rows=4, length=128, steps=4, warmup=1),
        naive_steps=6,
    )


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        work.chmod(0o700)
        emit(measure(arguments, work), arguments)


if __name__ == "__main__":
    main()
