"""Serving: streams of one and of many clients, speculation, a slow link; against three baselines.

Prints tables and one JSON line: local transformers, Petals' measured shares of local speed, and the
naive baseline. Also takes --clients N, client processes at once (8). Ratios are within one run.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from benchmarks import serving_tables as tables
from benchmarks.link import LINK_PROFILES
from benchmarks.report import Arguments, emit, parse_arguments
from benchmarks.serving_clients import ClientsFigures, measure_clients
from benchmarks.serving_link import LINK, LinkFigures, measure_link
from benchmarks.serving_local import LocalFigures, measure_local
from benchmarks.serving_naive import FAIR_FORM, mechanism_parts, naive_seconds
from benchmarks.serving_plan import PetalsShape, Plan, make_plan
from benchmarks.serving_prompts import Style
from benchmarks.serving_sampling import SamplingFigures, measure_sampling
from benchmarks.serving_wire import WireFigures, measure_wire
from benchmarks.serving_world import Worlds, owner_names
from benchmarks.split import make_kits

__all__ = ["main"]

T = TypeVar("T")
Value = bool | int | float | str | None


@dataclass
class _Watch:
    """Times the parts."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin_s = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin_s


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """All parts."""

    small: LocalFigures
    real: LocalFigures
    petals: list[LocalFigures]
    clients: ClientsFigures
    wire: WireFigures
    link: LinkFigures
    naive: dict[str, float]
    """Seconds by mask form."""
    sampling: list[SamplingFigures]


def _measure(plan: Plan, worlds: Worlds, watch: _Watch) -> _Figures:
    def timed(name: str, measure: Callable[[], T]) -> T:
        with watch.part(name):
            return measure()

    small = timed("one client, small model", lambda: measure_local(plan.small, worlds))
    real_case, link = plan.real, plan.link
    return _Figures(
        small=small,
        real=small
        if real_case is None
        else timed("one client, real model", lambda: measure_local(real_case, worlds)),
        petals=[
            timed(shape.case.model.name, partial(measure_local, shape.case, worlds))
            for shape in plan.petals
        ],
        clients=timed("many clients", lambda: measure_clients(plan.clients, worlds)),
        wire=timed(
            "empty steps",
            lambda: measure_wire(plan.wire_model, worlds, plan.wire_steps, plan.wire_codec),
        ),
        link=timed("link and speculation", lambda: measure_link(link, worlds)),
        naive=timed(
            "naive baseline",
            lambda: naive_seconds(
                link.model,
                link.long_prompt,
                link.long_new_tokens,
                plan.naive_threads,
                plan.naive_forms,
            ),
        ),
        sampling=timed(
            "sampling",
            lambda: measure_sampling(
                plan.sampling_model,
                worlds,
                plan.sampling_drafts,
                plan.num_samples,
                codec=plan.wire_codec,
                draft_model=plan.draft_model,
            ),
        ),
    )


def _result(plan: Plan, found: _Figures) -> dict[str, Value]:
    link, wire, fair_s = found.link, found.wire, found.naive[FAIR_FORM]
    return {
        "ratio_local": found.real.ratio_local,
        "ratio_local_15m": found.small.ratio_local,
        "total_8_over_1": found.small.total_over_one,
        "total_8_over_1_135m": found.real.total_over_one,
        "total_8_clients_over_1": found.clients.total_over_one,
        "trunk_8_clients_over_1": found.clients.trunk_cpu_over_one,
        "trunk_8_clients_over_1_wall": found.clients.trunk_over_one,
        "fairness": found.clients.fairness,
        "ms_per_token_link": link.link_ms,
        "rtt_ms": LINK_PROFILES[LINK].rtt_ms,
        "compute_ms": link.compute_ms,
        "ms_per_token_allowed": 1.15 * LINK_PROFILES[LINK].rtt_ms + link.compute_ms,
        "empty_step_ms": wire.empty_step_ms,
        "whole_step_ms": wire.whole_step_ms,
        "overhead_bytes_up": wire.overhead_bytes_up,
        "overhead_bytes_down": wire.overhead_bytes_down,
        "speculation_gain_source": link.gain([Style.COQA, Style.SUMMARY]),
        "speculation_gain_coqa": link.gain([Style.COQA]),
        "speculation_gain_summary": link.gain([Style.SUMMARY]),
        "speculation_gain_free": link.least_gain(Style.FREE),
        "ratio_naive_link_plain": fair_s / link.long_plain_s,
        "ratio_naive_link": fair_s / link.long_speculative_s,
        "long_copied_share": link.long_copied_share,
        "greedy_equal": found.small.is_greedy_equal
        and found.real.is_greedy_equal
        and found.clients.is_greedy_equal
        and all(one.is_greedy_equal for one in found.petals)
        and link.is_equal,
        # The smallest of several is expected to be small: Bonferroni's bound allows for it.
        "sampling_p_value": min(
            1.0, len(found.sampling) * min(one.p_value for one in found.sampling)
        ),
        **_petals_keys(plan.petals, found.petals),
        "mask_form": FAIR_FORM,
        "clients": plan.clients.num_clients,
        "model": found.real.name,
    }


def _petals_keys(
    shapes: Sequence[PetalsShape], figures: Sequence[LocalFigures]
) -> dict[str, Value]:
    """Our share of local speed, and 8 streams over the single one that Petals has."""
    keys: dict[str, Value] = {}
    for shape, one in zip(shapes, figures, strict=True):
        hidden = shape.case.model.hidden_size
        petals_tokens_per_s = shape.petals_share * 1000 / one.unsplit_ms
        keys[f"ratio_local_petals_{hidden}"] = one.ratio_local
        keys[f"total_8_over_petals_{hidden}"] = one.total_tokens_per_s / petals_tokens_per_s
    return keys


def _show(plan: Plan, found: _Figures, seconds: Mapping[str, float]) -> None:
    ours = [found.small, *([found.real] if plan.real else []), *found.petals]
    tables.show_local(ours)
    tables.show_clients(found.clients, plan.clients.num_clients)
    tables.show_prompts(found.link)
    tables.show_naive(found.naive, found.link)
    tables.show_parts(mechanism_parts(found.naive, found.link))
    tables.show_sampling(found.sampling)
    tables.show_times(seconds)


def _parse(arguments: Sequence[str] | None) -> tuple[Arguments, int | None]:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--clients", type=int)
    found, rest = own.parse_known_args(arguments)
    return parse_arguments(__doc__ or "", rest), found.clients


def main(arguments: Sequence[str] | None = None) -> dict[str, Value]:
    """Measure and print."""
    shared, asked_clients = _parse(arguments)
    num_clients = asked_clients or (2 if shared.is_smoke else 8)
    load = os.getloadavg()[0]
    print(f"load average before: {load:.2f}", flush=True)
    watch = _Watch()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        kits = make_kits(work / "kits", owner_names(num_clients))
        with watch.part("models"):
            plan = make_plan(shared, num_clients, work)
        with Worlds(kits, num_clients if shared.is_smoke else None) as worlds:
            found = _measure(plan, worlds, watch)
    _show(plan, found, watch.seconds)
    result = {
        **_result(plan, found),
        "load_before": load,
        "seconds": sum(watch.seconds.values()),
        "profile": shared.profile,
    }
    emit(result, shared)
    return result


if __name__ == "__main__":
    main()
