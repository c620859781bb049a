"""Keys and values of a conversation give its tokens away."""

from dataclasses import replace
from pathlib import Path

import pytest

from cutlayer.audit.attack import Effort
from cutlayer.audit.attacks.kv_reuse import KvReuse
from cutlayer.audit.evidence import Evidence
from cutlayer.privacy.mechanism import MECHANISMS
from tests.audit_worlds import World, same_norm_noise, tiny_world


def _conversations(world: World) -> World:
    """Each row as a prompt and replies of one token."""
    pieces = []
    tokens = []
    for whole, row in zip(world.evidence.observations, world.tokens, strict=True):
        prompt = len(row) - 3
        for begin, end in [(0, prompt), *((at, at + 1) for at in range(prompt, len(row)))]:
            pieces.append(
                replace(
                    whole,
                    number=len(pieces),
                    phase="generation",
                    step=0,
                    start=begin,
                    h_LD=whole.h_LD[begin:end],
                )
            )
            tokens.append(row[begin:end])
    private = tuple((True,) * len(row) for row in tokens)
    evidence = Evidence(observations=tuple(pieces))
    return replace(world, evidence=evidence, tokens=tuple(tokens), private=private)


def _recovery(world: World) -> float:
    guesses = KvReuse().reconstruct(world.evidence, world.knowledge, Effort(seconds=60))
    ordered = sorted(guesses, key=lambda guess: guess.number)
    return world.recovery([guess.tokens for guess in ordered])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_cache_gives_every_token_of_a_conversation_away(family: str, tmp_path: Path) -> None:
    assert _recovery(_conversations(tiny_world(tmp_path, family=family))) == 1.0


@pytest.mark.parametrize("clip", [None, 0.5])
def test_little_noise_hides_little(clip: float | None, tmp_path: Path) -> None:
    name = "gaussian" if clip is None else "clipped_gaussian"
    world = tiny_world(tmp_path, rule=MECHANISMS.make(name, 0.03, clip))
    assert _recovery(_conversations(world)) > 0.8


def test_noise_of_the_same_norm_gives_no_more_than_chance(tmp_path: Path) -> None:
    world = _conversations(tiny_world(tmp_path, rule=MECHANISMS.make("gaussian", 0.03)))
    assert _recovery(replace(world, evidence=same_norm_noise(world.evidence))) < 0.1
