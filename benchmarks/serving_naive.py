"""The naive baseline on the long prompt in several mask forms, and which mechanism gives what.

It does not print, nor measure cutlayer (`serving_link`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.baselines import NaiveSetup, Timed, naive_generation
from benchmarks.link import LINK_PROFILES
from benchmarks.naive import NaiveGeneration, sampled_lengths
from benchmarks.serving_link import LINK, LinkFigures
from benchmarks.serving_world import ServedModel

__all__ = ["FAIR_FORM", "Part", "mechanism_parts", "naive_seconds", "timed_lengths"]

FAIR_FORM = "dense-s"
"""The mask form that thresholds are about."""
_NUM_LENGTHS = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """One mechanism, after those before it."""

    name: str
    before_s: float
    """A whole reply to the long prompt without it."""
    after_s: float

    @property
    def factor(self) -> float:
        """How many times faster it makes the reply."""
        return self.before_s / self.after_s


def timed_lengths(prompt_length: int, new_tokens: int) -> list[int]:
    """At which lengths single tokens are timed, here and without caches in `serving_link`."""
    return sampled_lengths(prompt_length, new_tokens, _NUM_LENGTHS)


def naive_seconds(
    model: ServedModel,
    prompt: list[int],
    new_tokens: int,
    threads: Sequence[int],
    other_forms: Mapping[str, int],
) -> dict[str, float]:
    """Seconds of the whole reply by mask form.

    Args:
        model: the same cut as cutlayer's.
        prompt: token ids.
        new_tokens: of the reply.
        threads: settings to try with the fair form; the others are timed at its fastest.
        other_forms: and at how many lengths each is timed; reported, never a threshold.
    """

    def timed(form: str, num_lengths: int, num_threads: int) -> Timed[NaiveGeneration]:
        setup = NaiveSetup(
            model_folder=model.folder,
            lower=model.lower,
            upper=model.upper,
            link=LINK_PROFILES[LINK],
            mask_form=form,
            num_threads=num_threads,
        )
        return naive_generation(setup, prompt, new_tokens, num_lengths)

    fair = [timed(FAIR_FORM, _NUM_LENGTHS, count) for count in threads]
    best = min(fair, key=lambda found: found.seconds)
    others = {
        form: timed(form, count, best.num_threads).seconds for form, count in other_forms.items()
    }
    return {FAIR_FORM: best.seconds, **others}


def mechanism_parts(naive: Mapping[str, float], ours: LinkFigures) -> list[Part]:
    """From the naive baseline to speculation, one mechanism after the other.

    Each factor holds after those before it; in another order they would be others. Their product
    is the whole ratio.
    """
    times = (naive[FAIR_FORM], naive["lengths"], ours.long_uncached_s, ours.long_plain_s)
    names = (
        "mask: lengths instead of dense-s",
        "round trips: one instead of two a token, packed rows, bf16",
        "KV cache: one token instead of all",
        "speculation: several tokens a round trip",
    )
    return [
        Part(name=name, before_s=before_s, after_s=after_s)
        for name, before_s, after_s in zip(
            names, times, (*times[1:], ours.long_speculative_s), strict=True
        )
    ]
