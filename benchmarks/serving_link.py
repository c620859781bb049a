"""Decoding through an emulated link, without and with speculation.

It does not print. Plain and speculative runs of a prompt take turns on one client and one server.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.report import median
from benchmarks.serving_client import Job, Steps, StreamRun, StreamSpec
from benchmarks.serving_prompts import Prompt, Style, copied_share
from benchmarks.serving_statistics import token_ms
from benchmarks.serving_world import ServedModel, World, Worlds
from cutlayer.client.settings import GenerationSettings

__all__ = [
    "CODEC",
    "FREE_TEMPERATURE",
    "LINK",
    "LinkCase",
    "LinkFigures",
    "PromptFigures",
    "measure_link",
]

LINK = "wan"
FREE_TEMPERATURE = 0.8
CODEC = "bf16"


@dataclass(frozen=True, kw_only=True)
class LinkCase:
    """What is measured."""

    model: ServedModel
    num_threads: int
    prompts: Sequence[Prompt]
    eos_ids: list[int]
    new_tokens: int
    long_prompt: list[int]
    """For the comparison with the naive baseline, prefill included."""
    long_new_tokens: int
    long_repeats: int
    draft: str
    """A `DraftKind`."""
    uncached_lengths: list[int]
    """At which a step without any cache is timed."""


@dataclass(frozen=True, kw_only=True)
class PromptFigures:
    """One prompt, both ways."""

    style: Style
    num_tokens: int
    copied_share: float
    """Of the reply's tokens, those that repeat the prompt."""
    plain_s: float
    """From the first token of the reply to the last."""
    speculative_s: float
    tokens_per_trip: float
    """With speculation."""
    accepted_share: float
    """Of the guesses that were sent."""
    is_equal: bool
    """Both ways gave the same tokens."""

    @property
    def gain(self) -> float:
        """Decode speed with speculation over plain."""
        return self.plain_s / self.speculative_s


@dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """Everything that was measured on one client and one server."""

    compute_ms: float
    """Per token on loopback, through the same proxy."""
    link_ms: float
    """Per token through the link."""
    prompts: list[PromptFigures]
    long_plain_s: float
    """Whole replies to the long prompt, prefill included."""
    long_speculative_s: float
    long_uncached_s: float
    """The same with every step over the whole row; summed from the steps that were timed."""
    long_copied_share: float
    is_equal: bool

    def gain(self, styles: Sequence[Style]) -> float:
        """Plain seconds of all prompts of these styles over their speculative seconds."""
        chosen = [one for one in self.prompts if one.style in styles]
        return sum(one.plain_s for one in chosen) / sum(one.speculative_s for one in chosen)

    def least_gain(self, style: Style) -> float:
        """The gain of the prompt that gains the least."""
        return min(one.gain for one in self.prompts if one.style is style)


def measure_link(case: LinkCase, worlds: Worlds) -> LinkFigures:
    """Loopback first, then everything else through the link."""
    plain = Job(streams=[StreamSpec(prompt=case.long_prompt, new_tokens=case.new_tokens)])
    steps = Job(steps=Steps(lengths=case.uncached_lengths, is_fresh=True))
    with worlds.open(case.model, case.num_threads, codec=CODEC, link="loopback") as world:
        world.set_link("loopback")
        compute_ms = token_ms(world.run(plain).streams[0].ends_s)
        world.set_link(LINK)
        link_ms = token_ms(world.run(plain).streams[0].ends_s)
        prompts = [_both_ways(case, world, prompt) for prompt in case.prompts]
        plain_s, plain_run = _long(case, world, "none")
        speculative_s, speculative_run = _long(case, world, case.draft)
        uncached = world.run(steps)
    return LinkFigures(
        compute_ms=compute_ms,
        link_ms=link_ms,
        prompts=prompts,
        long_plain_s=plain_s,
        long_speculative_s=speculative_s,
        long_uncached_s=_summed(case, uncached.step_seconds),
        long_copied_share=copied_share(case.long_prompt, plain_run.tokens),
        is_equal=plain_run.tokens == speculative_run.tokens
        and all(one.is_equal for one in prompts),
    )


def _both_ways(case: LinkCase, world: World, prompt: Prompt) -> PromptFigures:
    spec = StreamSpec(
        prompt=prompt.tokens,
        new_tokens=case.new_tokens,
        temperature=FREE_TEMPERATURE if prompt.style is Style.FREE else 0.0,
        eos_ids=case.eos_ids,
    )
    plain, speculative = (
        world.run(Job(streams=[spec], draft=draft)).streams[0] for draft in ("none", case.draft)
    )
    return PromptFigures(
        style=prompt.style,
        num_tokens=len(plain.tokens),
        copied_share=copied_share(prompt.tokens, plain.tokens),
        plain_s=_decode_s(plain),
        speculative_s=_decode_s(speculative),
        tokens_per_trip=_tokens_per_trip(prompt, speculative),
        accepted_share=speculative.num_accepted / max(1, speculative.num_drafted),
        is_equal=plain.tokens == speculative.tokens,
    )


def _decode_s(run: StreamRun) -> float:
    return run.ends_s[-1] - run.ends_s[0]


def _tokens_per_trip(prompt: Prompt, run: StreamRun) -> float:
    """Of the reply after its first token, which belongs to the prompt's last round trip."""
    num_prefill = math.ceil(len(prompt.tokens) / GenerationSettings().prefill_tokens)
    return (len(run.tokens) - 1) / max(1, run.num_round_trips - num_prefill)


def _long(case: LinkCase, world: World, draft: str) -> tuple[float, StreamRun]:
    """Median seconds of a whole reply to the long prompt, and one such reply."""
    spec = StreamSpec(prompt=case.long_prompt, new_tokens=case.long_new_tokens)
    runs = [world.run(Job(streams=[spec], draft=draft)) for _ in range(case.long_repeats)]
    seconds = [run.streams[0].ends_s[-1] - run.begin_s for run in runs]
    return median(seconds), runs[0].streams[0]


def _summed(case: LinkCase, seconds: Sequence[float]) -> float:
    """All lengths of the long reply, between those that were timed by linear interpolation."""
    first = len(case.long_prompt)
    lengths = np.arange(first, first + case.long_new_tokens)
    return float(np.interp(lengths, case.uncached_lengths, seconds).sum())
