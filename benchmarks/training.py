"""A training step: unsplit PEFT, cutlayer and the naive baseline, in one run on one model.

Prints a table and one JSON line. `ratio_unsplit` and the byte keys are of equal rows of 128 tokens
without padding; each side is measured with every thread setting asked for, the fastest is named.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from transformers import AutoConfig

from benchmarks.baselines import NaiveSetup, Timed, fastest, naive_training, unsplit_training
from benchmarks.link import LINK_PROFILES, Counters, DelayingProxy
from benchmarks.report import Arguments, emit, median, parse_arguments, print_table
from benchmarks.split import SplitRequest, SplitResult, SplitServer, make_kits, run_client
from benchmarks.subjects import equal_rows, ragged_rows, subject_folder
from benchmarks.unsplit import Training, UnsplitRequest
from cutlayer.identity.provision import LocalFolders

_RAGGED = (128, 96, 61, 17)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    model: Path
    kits: LocalFolders
    work: Path
    rows: list[list[int]]
    ragged: list[list[int]]
    steps: int
    warmup: int
    hidden_size: int
    upper: int


@dataclass(frozen=True)
class Measured:
    """Medians of one setting."""

    name: str
    seconds: float
    bytes_up: float
    """Per token of a step, at the socket."""
    bytes_down: float
    losses: tuple[float, ...] = ()
    threads: int = 0


class Ours:
    """Cutlayer over mutual TLS: one server and one proxy for all settings of one thread count."""

    def __init__(self, plan: Plan, server: SplitServer, proxy: DelayingProxy, threads: int) -> None:
        self._plan, self._proxy, self.threads = plan, proxy, threads

    def run(
        self,
        codec: str,
        link: str = "loopback",
        *,
        rows: list[list[int]] | None = None,
        is_head_trained: bool = True,
        export_folder: Path | None = None,
    ) -> Measured:
        """One client process; medians of its steps."""
        plan, rows = self._plan, rows or self._plan.rows
        self._proxy.set_link(LINK_PROFILES[link])
        request = SplitRequest(
            address=self._proxy.address,
            model_folder=str(plan.model),
            lower=2,
            upper=plan.upper,
            kit=str(plan.kits.clients["owner"]),
            codec=codec,
            rows=rows,
            steps=plan.steps,
            micro_batch_rows=max(1, len(rows) // 2),
            is_head_trained=is_head_trained,
            export_folder=None if export_folder is None else str(export_folder),
        )
        result, counters = run_client(request, self._proxy, self.threads)
        head = "trained head" if is_head_trained else "frozen head"
        shape = "ragged" if rows is plan.ragged else "equal rows"
        name = f"{codec}, {link}, {head}, {shape}, {self.threads} threads"
        return _measured(plan, name, result, counters, sum(map(len, rows)), self.threads)


@contextmanager
def serving(plan: Plan, threads: int) -> Iterator[Ours]:
    """A trunk server process and a proxy before it."""
    with (
        SplitServer(plan.model, 2, plan.upper, plan.kits, threads) as server,
        DelayingProxy(server.port, LINK_PROFILES["loopback"]) as proxy,
    ):
        yield Ours(plan, server, proxy, threads)


def unsplit(
    plan: Plan, threads: int, rows: list[list[int]], adapter: Path | None
) -> Timed[Training]:
    """Transformers and PEFT in one process."""
    request = UnsplitRequest(
        model_folder=str(plan.model),
        rows=rows,
        steps=plan.steps,
        adapter_file=None if adapter is None else str(adapter / "adapter_model.safetensors"),
    )
    return unsplit_training(request, threads)


def naive(plan: Plan, threads: int, link: str) -> Measured:
    """The published way, blocking and padded, with the fair modern mask form."""
    setup = NaiveSetup(
        model_folder=plan.model,
        lower=2,
        upper=plan.upper,
        link=LINK_PROFILES[link],
        num_threads=threads,
    )
    timed, _ = naive_training(setup, plan.rows, plan.steps)
    num_tokens = sum(map(len, plan.rows))
    return Measured(
        name=f"naive dense-s, {link}, {threads} threads",
        seconds=timed.seconds,
        bytes_up=median(timed.details.bytes_up, skip=1) / num_tokens,
        bytes_down=median(timed.details.bytes_down, skip=1) / num_tokens,
    )


def measure(plan: Plan, arguments: Arguments) -> dict[str, bool | int | float | str | None]:
    """Every setting once, and the ratios that are named."""
    first = plan.work / "first"
    rows: list[Measured] = []
    with serving(plan, arguments.threads[-1]) as ours:
        raw = ours.run("raw", export_folder=first)
    plain = fastest(lambda n: unsplit(plan, n, plan.rows, first), arguments.threads)
    best = min((_bf16(plan, n) for n in arguments.threads), key=lambda m: m.seconds)
    with serving(plan, best.threads) as ours:
        fp8, frozen = ours.run("fp8"), ours.run("fp8", is_head_trained=False)
        wan, lan = ours.run("bf16", "wan"), ours.run("bf16", "lan")
        ragged = ours.run("bf16", rows=plan.ragged)
        frozen_bf16 = ours.run("bf16", is_head_trained=False)
    plain_ragged = unsplit(plan, plain.num_threads, plan.ragged, None)
    naive_loop, naive_wan = (naive(plan, best.threads, link) for link in ("loopback", "wan"))
    rows = [raw, best, fp8, frozen, frozen_bf16, lan, wan, ragged, naive_loop, naive_wan]
    unsplit_name = f"unsplit, {plain.num_threads} threads"
    _show([Measured(unsplit_name, plain.seconds, 0.0, 0.0), *rows])
    losses = zip(raw.losses, plain.details.losses, strict=True)
    num_tokens = sum(map(len, plan.rows))
    return {
        "ratio_unsplit": best.seconds / plain.seconds,
        "ratio_unsplit_ragged": ragged.seconds / plain_ragged.seconds,
        "ratio_naive_link": naive_wan.seconds / wan.seconds,
        "ratio_naive_loopback": naive_loop.seconds / best.seconds,
        "bytes_up_per_token": fp8.bytes_up,
        "bytes_down_per_token": fp8.bytes_down,
        "bytes_up_per_token_bf16": best.bytes_up,
        "bytes_down_per_token_bf16": best.bytes_down,
        "bytes_down_per_token_frozen": frozen.bytes_down,
        "bytes_down_per_token_frozen_bf16": frozen_bf16.bytes_down,
        "hidden": plan.hidden_size,
        "loss_max_rel_diff": max(abs(a - b) / abs(b) for a, b in losses),
        "tokens_per_s": num_tokens / best.seconds,
        "tokens_per_s_unsplit": num_tokens / plain.seconds,
        "threads": best.threads,
        "threads_unsplit": plain.num_threads,
        "mask_form": "dense-s",
        "profile": arguments.profile,
    }


def _bf16(plan: Plan, threads: int) -> Measured:
    with serving(plan, threads) as ours:
        return ours.run("bf16")


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        work.chmod(0o700)
        emit(measure(_plan(arguments, work), arguments), arguments)


def _plan(arguments: Arguments, work: Path) -> Plan:
    model = subject_folder(arguments.model, is_smoke=arguments.is_smoke, work_folder=work)
    config = AutoConfig.from_pretrained(model)
    num_rows, length = (2, 16) if arguments.is_smoke else (4, 128)
    return Plan(
        model=model,
        kits=make_kits(work / "kits"),
        work=work,
        rows=equal_rows(num_rows, length, config.vocab_size),
        ragged=ragged_rows([length * n // 128 for n in _RAGGED[:num_rows]], config.vocab_size),
        steps=3 if arguments.is_smoke else 6,
        warmup=1 if arguments.is_smoke else 2,
        hidden_size=config.hidden_size,
        upper=config.num_hidden_layers - 2,
    )


def _measured(
    plan: Plan,
    name: str,
    result: SplitResult,
    counters: list[Counters],
    num_tokens: int,
    threads: int,
) -> Measured:
    # The last report comes before the last save, so every difference is one step's traffic.
    ups = [after.bytes_up - before.bytes_up for before, after in pairwise(counters)]
    downs = [after.bytes_down - before.bytes_down for before, after in pairwise(counters)]
    return Measured(
        name=f"cutlayer {name}",
        threads=threads,
        seconds=median(result.seconds, skip=plan.warmup),
        bytes_up=median(ups, skip=plan.warmup - 1) / num_tokens,
        bytes_down=median(downs, skip=plan.warmup - 1) / num_tokens,
        losses=result.losses,
    )


def _show(rows: list[Measured]) -> None:
    print_table(
        "training step",
        ("setting", "seconds", "bytes up / token", "bytes down / token"),
        [(row.name, row.seconds, row.bytes_up, row.bytes_down) for row in rows],
    )


if __name__ == "__main__":
    main()
