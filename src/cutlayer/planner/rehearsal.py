"""The client's own work, timed on this machine: its real step and session over made-up parts.

The trunk is an echo in this process, rows are random, and nothing leaves. It does not predict.

Shapes: N = tokens of a micro-batch.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from cutlayer.client.cached_row import Feed
from cutlayer.client.link import Link, OwnModel
from cutlayer.client.parts import TrainedParts
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.session import GenerationSession, SplitModel
from cutlayer.client.step import Boundaries, SplitStep, StepName
from cutlayer.data.batches import Batch, batch
from cutlayer.data.template import Example
from cutlayer.model.checkpoint import DTYPES
from cutlayer.model.manifest import Manifest
from cutlayer.model.optimizer import AdamWSettings
from cutlayer.model.partition import Head, Part, Tail
from cutlayer.planner.blank_part import blank_part
from cutlayer.planner.clock import Laps, undisturbed
from cutlayer.planner.echo import EchoService
from cutlayer.planner.workload import Workload
from cutlayer.privacy.boundary import Boundary, BoundaryName
from cutlayer.privacy.mechanism import PrivacySettings
from cutlayer.privacy.run_privacy import RunPrivacy, open_run_privacy
from cutlayer.wire.channel import LoopbackChannel, Peer
from cutlayer.wire.codec import get_codec
from cutlayer.wire.spec import Spec

__all__ = ["Phases", "measured_lengths", "measured_prompt", "rehearse"]

_MOST_TOKENS = 512
"""Of a rehearsed micro-batch or prompt: times per token do not change much beyond."""
_LEAST_REPEATS, _MOST_REPEATS = 3, 12
_TOKENS, _REPLY = 5, 8
_RUN = "rehearsal"
_PEER = Peer(name="rehearsal", roles=frozenset(), serial=None, address="here")


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Seconds of one micro-batch, one step's end, one prompt and one token."""

    head_forward_s: float
    """Head, gate and encoding."""
    tail_s: float
    """Decoding, tail, loss and its backward."""
    head_backward_s: float
    optimizer_s: float
    rest_s: float
    """Gate of the gradient, frames, accounts."""
    prefill_s: float
    decode_s: float


def measured_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """As many of these rows as are worth timing; one, cut off, where even that is long."""
    first = min(lengths[0], _MOST_TOKENS)
    return (first,) * max(1, min(len(lengths), _MOST_TOKENS // first))


def measured_prompt(workload: Workload) -> int:
    """Tokens of a prompt's first call, or as many as are worth timing."""
    # The tokens that are timed after it must fit where prompt and reply do.
    room = max(1, workload.prompt_tokens + workload.new_tokens - _REPLY)
    return min(workload.prompt_tokens, workload.prefill_tokens, _MOST_TOKENS, room)


def rehearse(
    config: PreTrainedConfig, workload: Workload, num_blocks: int, budget_s: float
) -> Phases:
    """Time a client whose head and tail have so many blocks each; 0 shows what the ends cost.

    Args:
        config: of the whole model.
        workload: rows, formats and adapter.
        num_blocks: of each part; the ends of the model are always there.
        budget_s: time for repetitions, roughly.
    """
    dtype = DTYPES[workload.dtype]
    parts = [blank_part(config, part, num_blocks, dtype) for part in (Part.HEAD, Part.TAIL)]
    head, tail = parts
    assert isinstance(head, Head)
    assert isinstance(tail, Tail)
    head.decode_threads = tail.decode_threads = workload.decode_threads
    trained = TrainedParts(head, tail, workload.adapter, AdamWSettings(), seed=0)
    with tempfile.TemporaryDirectory() as folder, _privacy(Path(folder)) as privacy:
        stage = _Stage(config, workload, trained, privacy, budget_s)
        return Phases(**stage.train(), **stage.generate())


@contextmanager
def _privacy(folder: Path) -> Iterator[RunPrivacy]:
    folder.chmod(0o700)
    with open_run_privacy(folder / "run", _RUN) as privacy:
        yield privacy


class _Stage:
    """Parts, an echo and gates, and what runs over them."""

    def __init__(
        self,
        config: PreTrainedConfig,
        workload: Workload,
        parts: TrainedParts,
        privacy: RunPrivacy,
        budget_s: float,
    ) -> None:
        self._config, self._workload, self._parts = config, workload, parts
        self._privacy, self._budget_s = privacy, budget_s
        self._trunk = RemoteTrunk(Link(_connect, _own_model(config, workload)))

    def train(self) -> Mapping[str, float]:
        """Median seconds of the phases of a step."""
        watch = Laps()
        gates = Boundaries(
            activations=self._gate(BoundaryName.ACTIVATIONS),
            gradients=self._gate(BoundaryName.GRADIENTS),
        )
        step = SplitStep(self._parts, self._trunk, gates, in_flight=1, tracer=watch)
        self._parts.set_training(True)
        rows = self._rows()

        def once(number: int) -> None:
            name = StepName(run_id=_RUN, step=number, weights=f"step{number}")
            with watch.span("client", "step"):
                step.finish(name, step.gradients(name, [rows]), 1e-4, 1.0)

        _repeat(once, self._budget_s)
        phases = [name for name in watch.laps if name != "step"]
        columns = zip(*(watch.laps[name] for name in phases), strict=True)
        rests = [
            (whole[0] - sum(lap[0] for lap in laps), whole[1] - sum(lap[1] for lap in laps))
            for whole, laps in zip(watch.laps["step"], columns, strict=True)
        ]
        return {
            "head_forward_s": watch.seconds("head forward"),
            "tail_s": watch.seconds("tail"),
            "head_backward_s": watch.seconds("head backward"),
            "optimizer_s": watch.seconds("optimizer"),
            "rest_s": max(0.0, undisturbed(rests[1:])),
        }

    def generate(self) -> Mapping[str, float]:
        """Median seconds of a prompt's call and of a token's."""
        workload = self._workload
        self._parts.set_training(False)
        prompt = measured_prompt(workload)
        watch = Laps()

        def once(number: int) -> None:
            session = GenerationSession(self._split_model())
            rows = [session.open_row(prompt + _TOKENS) for _ in range(workload.streams)]
            for row in rows:
                with watch.span("client", "prompt"):
                    session.step([Feed(row=row, tokens=[1] * prompt)])
            feeds = [Feed(row=row, tokens=[number]) for row in rows]
            for _ in range(_TOKENS):
                with watch.span("client", "token"):
                    session.step(feeds)
            session.close()

        _repeat(once, self._budget_s / 2)
        return {
            "prefill_s": watch.seconds("prompt"),
            "decode_s": watch.seconds("token", skip=2),
        }

    def _split_model(self) -> SplitModel:
        return SplitModel(
            head=self._parts.head,
            tail=self._parts.tail,
            trunk=self._trunk,
            boundary=self._gate(BoundaryName.GENERATION),
            run_id=None,
            step=None,
        )

    def _gate(self, name: BoundaryName) -> Boundary:
        rule = PrivacySettings(mechanism="none").activation_rule()
        codec = get_codec(self._workload.codec)
        return Boundary(name, rule, codec, self._privacy.ledger, self._privacy.secret)

    def _rows(self) -> Batch:
        lengths = measured_lengths(self._workload.usual_lengths)
        generator = torch.Generator().manual_seed(0)
        examples = []
        for number, length in enumerate(lengths):
            drawn = torch.randint(0, self._config.vocab_size, (length,), generator=generator)
            tokens = drawn.tolist()
            scored = self._workload.num_scored(length - 1)
            labels = [-100] * (length - scored) + tokens[length - scored :]
            examples.append(Example(tokens=tokens, labels=labels, row_id=number))
        return batch(examples, range(len(examples)))


def _connect(place: str | None) -> LoopbackChannel:
    # The leaves of a model of no blocks: rehearsed parts have no checkpoint.
    return LoopbackChannel(EchoService(dict.fromkeys(_LEAVES, "00" * 32)), _PEER)


_LEAVES = ("config", "embedding", "norm", "lm_head")


def _own_model(config: PreTrainedConfig, workload: Workload) -> OwnModel:
    spec = Spec(
        model_type=config.model_type,
        n_block=config.num_hidden_layers,
        lower=0,
        upper=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        dtype=workload.dtype,
        codec_up=workload.codec,
        codec_down=workload.codec,
    )
    return OwnModel(spec=spec, manifest=Manifest({}), digest=None)


def _repeat(once: Callable[[int], None], budget_s: float) -> None:
    """At least a few times after one that warms up, then until the time is over."""
    end_s = time.monotonic() + budget_s
    for number in range(1, 2 + _MOST_REPEATS):
        if number > 1 + _LEAST_REPEATS and time.monotonic() > end_s:
            return
        once(number)
