"""The serving benchmark's tables. It measures nothing and forms no ratio that is not printed."""

from collections.abc import Mapping, Sequence

from benchmarks.report import print_table
from benchmarks.serving_clients import ClientsFigures
from benchmarks.serving_link import LinkFigures
from benchmarks.serving_local import LocalFigures
from benchmarks.serving_naive import Part
from benchmarks.serving_sampling import SamplingFigures

__all__ = [
    "show_clients",
    "show_local",
    "show_naive",
    "show_parts",
    "show_prompts",
    "show_sampling",
    "show_times",
]


def show_local(figures: Sequence[LocalFigures]) -> None:
    """One client process."""
    columns = (
        "model",
        "unsplit ms / token",
        "one stream",
        "share of local",
        "streams",
        "tokens / s together",
        "over one",
        "threads",
    )
    rows = [
        (
            one.name,
            one.unsplit_ms,
            one.one_ms,
            one.ratio_local,
            one.num_streams,
            one.total_tokens_per_s,
            one.total_over_one,
            "+".join(map(str, one.threads)),
        )
        for one in figures
    ]
    print_table("one client process, loopback, mutual TLS", columns, rows)


def show_clients(figures: ClientsFigures, num_clients: int) -> None:
    """Several client processes."""
    rows = [
        ("one client", figures.one_tokens_per_s, figures.one_trunk_tokens_per_s),
        (f"{num_clients} clients", figures.total_tokens_per_s, figures.trunk_tokens_per_s),
        ("ratio", figures.total_over_one, figures.trunk_over_one),
    ]
    columns = ("client processes", "tokens / s", "trunk tokens / s of runner time")
    print_table("clients of one trunk, loopback, mutual TLS", columns, rows)


def show_prompts(figures: LinkFigures) -> None:
    """Speculation, prompt by prompt."""
    columns = (
        "prompt",
        "tokens",
        "copied",
        "plain s",
        "speculative s",
        "gain",
        "tokens / trip",
        "accepted",
        "equal",
    )
    rows = [
        (
            one.style.value,
            one.num_tokens,
            one.copied_share,
            one.plain_s,
            one.speculative_s,
            one.gain,
            one.tokens_per_trip,
            one.accepted_share,
            one.is_equal,
        )
        for one in figures.prompts
    ]
    print_table("speculation through 40 ms / 100 Mbit/s", columns, rows)


def show_naive(naive: Mapping[str, float], ours: LinkFigures) -> None:
    """Whole replies to the long prompt."""
    rows = [
        (form, seconds, seconds / ours.long_plain_s, seconds / ours.long_speculative_s)
        for form, seconds in naive.items()
    ]
    columns = ("naive mask form", "naive s", "over plain", "over speculation")
    print_table("whole reply through 40 ms / 100 Mbit/s, prefill included", columns, rows)


def show_parts(parts: Sequence[Part]) -> None:
    """What each mechanism gives."""
    rows = [(part.name, part.before_s, part.after_s, part.factor) for part in parts]
    columns = ("mechanism, after those above", "without s", "with s", "factor")
    print_table("the part that each mechanism gives", columns, rows)


def show_sampling(figures: Sequence[SamplingFigures]) -> None:
    """Plain and speculative samples."""
    rows = [
        (one.draft, one.num_samples, one.num_drafted, one.num_accepted, one.p_value)
        for one in figures
    ]
    columns = ("drafts", "replies each", "drafted", "accepted", "p")
    print_table("speculative against plain sampling, chi-square", columns, rows)


def show_times(seconds: Mapping[str, float]) -> None:
    """How long each part of the benchmark took."""
    print_table("time spent", ("part", "s"), list(seconds.items()))
