"""Whether speculation draws from the model's own distribution: plain and speculative samples.

A tiny model with few likely tokens gives many short replies both ways, with seeds of their own; the
replies' last tokens are compared by a chi-square test. It does not print.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from benchmarks.serving_client import Job, StreamRun, StreamSpec
from benchmarks.serving_statistics import same_distribution_p
from benchmarks.serving_world import ServedModel, World, Worlds

__all__ = ["SamplingFigures", "measure_sampling"]

_LINK = "lan"
"""Where a round trip costs nothing nobody guesses."""
_NEW_TOKENS = 8
_NUM_COMPARED = 3
"""Last tokens of a reply: all before them have their part in them."""
_TEMPERATURE, _TOP_K = 1.0, 2
_STREAMS_PER_JOB = 8
_PATTERN = [5, 9, 7, 5, 9, 11]
"""Repeated in the prompt, so that a lookup has something to guess."""


@dataclass(frozen=True, kw_only=True)
class SamplingFigures:
    """One kind of draft."""

    draft: str
    p_value: float
    num_samples: int
    num_drafted: int
    num_accepted: int


def measure_sampling(
    model: ServedModel,
    worlds: Worlds,
    drafts: Sequence[str],
    num_samples: int,
    *,
    codec: str = "raw",
    draft_model: str | None = None,
) -> list[SamplingFigures]:
    """Each kind of draft against plain sampling.

    Args:
        model: a tiny one.
        worlds: open worlds.
        drafts: `DraftKind`s.
        num_samples: replies of each side.
        codec: of the vectors.
        draft_model: folder of the small model, for drafts by one.
    """
    with worlds.open(model, 1, codec=codec, link="loopback", draft_model=draft_model) as world:
        world.set_link(_LINK)
        plain = _sample(world, Job(draft="none"), num_samples, first_seed=0)
        found = []
        for number, draft in enumerate(drafts, 1):
            kind = Job(draft=draft, max_drafts=3, min_match=1)
            drafted = _sample(world, kind, num_samples, first_seed=number * 1_000_000)
            found.append(
                SamplingFigures(
                    draft=draft,
                    p_value=same_distribution_p(_outcomes(plain), _outcomes(drafted)),
                    num_samples=num_samples,
                    num_drafted=sum(run.num_drafted for run in drafted),
                    num_accepted=sum(run.num_accepted for run in drafted),
                )
            )
    return found


def _sample(world: World, kind: Job, num_samples: int, first_seed: int) -> list[StreamRun]:
    runs: list[StreamRun] = []
    prompt = _PATTERN * 3
    for start in range(0, num_samples, _STREAMS_PER_JOB):
        streams = [
            StreamSpec(
                prompt=prompt,
                new_tokens=_NEW_TOKENS,
                temperature=_TEMPERATURE,
                top_k=_TOP_K,
                seed=first_seed + start + number,
            )
            for number in range(min(_STREAMS_PER_JOB, num_samples - start))
        ]
        runs.extend(world.run(msgspec.structs.replace(kind, streams=streams)).streams)
    return runs


def _outcomes(runs: Sequence[StreamRun]) -> list[tuple[int, ...]]:
    return [tuple(run.tokens[-_NUM_COMPARED:]) for run in runs]
