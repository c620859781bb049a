"""A client process of the soak run: sessions of its own, or conversations over one engine.

As a module it reads a `SplitRequest` and a `SoakSetup`, then answers `SoakPhase`s with `SoakRun`s.
It does not judge what they mean.
"""

import sys
import tempfile

import msgspec

from benchmarks.isolate import answer, read_request
from benchmarks.soak_conversations import ConversationSoak
from benchmarks.soak_memory import settled_bytes
from benchmarks.soak_plan import Script, SoakPrompt
from benchmarks.soak_sessions import SessionSoak, Tally, solo_replies
from benchmarks.split import SplitRequest, client_settings
from benchmarks.workers import requests, say_ready
from cutlayer import Client

__all__ = ["SoakPhase", "SoakRun", "SoakSetup"]


class SoakSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What the process drives."""

    prompts: list[SoakPrompt]
    count: int
    """Sessions or conversations."""
    has_engine: bool
    """Conversations over one engine; else sessions of their own."""


class SoakPhase(msgspec.Struct, frozen=True, kw_only=True):
    """So long, and with these draws."""

    seconds: float
    seed: int


class SoakRun(msgspec.Struct, frozen=True, kw_only=True):
    """What happened, and what the process held when all was closed."""

    num_streams: int
    num_wrong: int
    num_finished: int
    num_cancelled: int
    num_resumed: int
    num_replays: int
    num_cache_full: int
    num_tokens: int
    resident_bytes: int


def _run(client: Client, setup: SoakSetup, expected: list[list[int]], phase: SoakPhase) -> Tally:
    script = Script(phase.seed, len(setup.prompts))
    kind = ConversationSoak if setup.has_engine else SessionSoak
    soak = kind(client, setup.prompts, expected, script, setup.count)
    soak.run(phase.seconds)
    return soak.tally


def _answer(tally: Tally) -> SoakRun:
    return SoakRun(
        num_streams=tally.num_streams,
        num_wrong=tally.num_wrong,
        num_finished=tally.num_finished,
        num_cancelled=tally.num_cancelled,
        num_resumed=tally.num_resumed,
        num_replays=tally.num_replays,
        num_cache_full=tally.num_cache_full,
        num_tokens=tally.num_tokens,
        resident_bytes=settled_bytes(),
    )


def main() -> None:
    """Make the solo replies, then answer phases until stdin is closed."""
    request = read_request(SplitRequest)
    setup = msgspec.json.decode(sys.stdin.readline(), type=SoakSetup)
    with (
        tempfile.TemporaryDirectory() as folder,
        Client(client_settings(request, folder)) as client,
    ):
        expected = solo_replies(client, setup.prompts)
        say_ready()
        for phase in requests(SoakPhase):
            answer(_answer(_run(client, setup, expected, phase)))


if __name__ == "__main__":
    main()
