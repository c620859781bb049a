"""Decoding: the unsplit model, cutlayer and the naive baseline, in one run on one model.

Prints a table and one JSON line. Loopback and link times are medians per decoded token; bytes are
those of an fp8 prefill at the socket. The naive baseline's time is summed from 8 lengths.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from benchmarks.baselines import NaiveSetup, Timed, fastest, naive_generation, unsplit_decoding
from benchmarks.link import LINK_PROFILES, Counters, DelayingProxy
from benchmarks.naive import NaiveGeneration
from benchmarks.report import Arguments, emit, median, parse_arguments, print_table
from benchmarks.split import SplitRequest, SplitResult, SplitServer, make_kits, run_client
from benchmarks.subjects import equal_rows, subject_folder
from benchmarks.unsplit import Decoding, UnsplitRequest
from cutlayer.identity.provision import LocalFolders

_LINK = "wan"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    model: Path
    kits: LocalFolders
    prompt: list[int]
    new_tokens: int
    long_prompt: list[int]
    """For the comparison with the naive baseline, prefill included."""
    long_new_tokens: int
    hidden_size: int
    upper: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One generation by cutlayer."""

    name: str
    threads: int
    result: SplitResult
    prefill_bytes_up: float
    """Per prompt token, at the socket."""
    prefill_bytes_down: float

    @property
    def ms_per_token(self) -> float:
        """Median after the prefill and one warm-up token."""
        return 1000 * median(self.result.seconds, skip=2)

    @property
    def seconds(self) -> float:
        """Of the whole reply, prefill included."""
        return sum(self.result.seconds)


def split(
    plan: Plan,
    codec: str,
    threads: int,
    *,
    link: str = "loopback",
    prompt: list[int] | None = None,
    new_tokens: int | None = None,
) -> Measured:
    """Cutlayer over mutual TLS, through the proxy where a link is emulated or bytes are counted."""
    prompt = prompt or plan.prompt
    with (
        SplitServer(plan.model, 2, plan.upper, plan.kits, threads) as server,
        DelayingProxy(server.port, LINK_PROFILES[link]) as proxy,
    ):
        request = SplitRequest(
            address=proxy.address,
            model_folder=str(plan.model),
            lower=2,
            upper=plan.upper,
            kit=str(plan.kits.clients["owner"]),
            codec=codec,
            rows=[prompt],
            new_tokens=new_tokens or plan.new_tokens,
        )
        result, counters = run_client(request, proxy, threads)
    prefill = _prefill(counters)
    return Measured(
        name=f"cutlayer {codec}, {link}",
        threads=threads,
        result=result,
        prefill_bytes_up=prefill.bytes_up / len(prompt),
        prefill_bytes_down=prefill.bytes_down / len(prompt),
    )


def unsplit(plan: Plan, threads: int) -> Timed[Decoding]:
    """Transformers with its own KV cache in one process."""
    request = UnsplitRequest(
        model_folder=str(plan.model), rows=[plan.prompt], new_tokens=plan.new_tokens
    )
    return unsplit_decoding(request, threads)


def measure(plan: Plan, arguments: Arguments) -> dict[str, bool | int | float | str | None]:
    """Every setting once, and the ratios that are named."""
    plain = fastest(lambda n: unsplit(plan, n), arguments.threads)
    tried = [split(plan, "raw", n) for n in arguments.threads]
    ours = min(tried, key=lambda m: m.ms_per_token)
    fp8, bf16 = (split(plan, codec, ours.threads) for codec in ("fp8", "bf16"))
    wan = split(plan, "bf16", ours.threads, link=_LINK)
    lan = split(plan, "bf16", ours.threads, link="lan")
    long = min((_long(plan, n) for n in arguments.threads), key=lambda m: m.seconds)
    naive = fastest(lambda n: _naive(plan, n), arguments.threads)
    _show(plain, [*tried, fp8, bf16, lan, wan, long], naive.seconds)
    compute_ms, rtt_ms = bf16.ms_per_token, LINK_PROFILES[_LINK].rtt_ms
    return {
        "ratio_local": 1000 * plain.seconds / ours.ms_per_token,
        "ms_per_token_link": wan.ms_per_token,
        "rtt_ms": rtt_ms,
        "compute_ms": compute_ms,
        "ms_per_token_allowed": 1.25 * rtt_ms + compute_ms,
        "ratio_naive_link": naive.seconds / long.seconds,
        "bytes_up_per_token": fp8.prefill_bytes_up,
        "bytes_down_per_token": fp8.prefill_bytes_down,
        "bytes_up_per_token_bf16": bf16.prefill_bytes_up,
        "bytes_down_per_token_bf16": bf16.prefill_bytes_down,
        "greedy_equal": ours.result.tokens == plain.details.tokens,
        "hidden": plan.hidden_size,
        "seconds_naive_link": naive.seconds,
        "seconds_link": long.seconds,
        "threads": ours.threads,
        "threads_unsplit": plain.num_threads,
        "threads_naive": naive.num_threads,
        "mask_form": "dense-s",
        "profile": arguments.profile,
    }


def _long(plan: Plan, threads: int) -> Measured:
    """What the naive baseline is compared with, prefill included."""
    return split(
        plan,
        "bf16",
        threads,
        link=_LINK,
        prompt=plan.long_prompt,
        new_tokens=plan.long_new_tokens,
    )


def _naive(plan: Plan, threads: int) -> Timed[NaiveGeneration]:
    setup = NaiveSetup(
        model_folder=plan.model,
        lower=2,
        upper=plan.upper,
        link=LINK_PROFILES[_LINK],
        num_threads=threads,
    )
    return naive_generation(setup, plan.long_prompt, plan.long_new_tokens)


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        emit(measure(_plan(arguments, Path(name)), arguments), arguments)


def _plan(arguments: Arguments, work: Path) -> Plan:
    model = subject_folder(arguments.model, is_smoke=arguments.is_smoke, work_folder=work)
    config = AutoConfig.from_pretrained(model)
    length, new_tokens = (16, 6) if arguments.is_smoke else (128, 64)
    (prompt,) = equal_rows(1, length, config.vocab_size)
    (long_prompt,) = equal_rows(1, 2 * length, config.vocab_size, seed=1)
    return Plan(
        model=model,
        kits=make_kits(work / "kits"),
        prompt=prompt,
        new_tokens=new_tokens,
        long_prompt=long_prompt,
        long_new_tokens=new_tokens // 2,
        hidden_size=config.hidden_size,
        upper=config.num_hidden_layers - 2,
    )


def _prefill(counters: list[Counters]) -> Counters:
    opened, prefilled, *_ = counters
    return prefilled - opened


def _show(plain: Timed[Decoding], ours: list[Measured], naive_s: float) -> None:
    rows: list[tuple[str, int, float, float]] = [
        ("unsplit", plain.num_threads, 1000 * plain.seconds, 0.0),
        *((m.name, m.threads, m.ms_per_token, m.seconds) for m in ours),
        (f"naive dense-s, {_LINK}", ours[0].threads, 0.0, naive_s),
    ]
    print_table("decoding", ("setting", "threads", "ms / token", "seconds in all"), rows)


if __name__ == "__main__":
    main()
