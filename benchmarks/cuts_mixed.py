"""Six owners with six cuts: is their gradient one model's, and what do different cuts cost.

Everything is in this process, real sockets and mutual TLS between. Throughput is that of whole
rounds with secure aggregation, of six different cuts against six equal ones whose clients have as
many blocks together; the order of the two alternates.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch
from peft import set_peft_model_state_dict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.cuts_world import Arm, Subject, running, six_cuts, train_all
from benchmarks.report import median
from benchmarks.subjects import subject_folder, write_text_llama
from benchmarks.unsplit import new_peft_model
from cutlayer import TrunkServer
from cutlayer.client.train import Report
from cutlayer.data.template import Example
from cutlayer.model.cut import Cut

__all__ = ["Mixed", "Scale", "measure"]

_EVERY_STEP = {"kind": "every_step", "lr": 1e-3, "beta1": 0.0}
"""Without a first moment's memory the moment is the gradient."""
_FINE = {"value_bits": 38, "max_weight": 1 << 16}
"""Finer integers than the default, whose steps would be most of the difference."""


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """How much to measure."""

    rows: int
    """Of each owner, for the gradient."""
    words: int
    """Of each row, for the gradient."""
    timed_words: int
    """Of each owner's one row, for the throughput."""
    pairs: int
    """Federations of different and of equal cuts, each so many."""
    rounds: int
    """Of each; the first warms up."""


class Mixed(msgspec.Struct, frozen=True, kw_only=True):
    """What different cuts change."""

    gradient_max_rel_diff: float
    """Largest difference of a tensor of the aggregated gradient from the unsplit model's on all
    rows, over that tensor's largest absolute value."""
    mixed_over_equal_throughput: float
    """Tokens per second of six different cuts over those of six equal ones; medians of rounds."""
    round_s_mixed: float
    round_s_equal: float
    cpu_s_mixed: float
    """Processor seconds of a whole federation, all sides: they say the same on a busy machine."""
    cpu_s_equal: float
    rounds_mixed: int
    """Rounds that the median is of."""


@dataclass
class _Timed:
    """What the federations of one arm took."""

    round_s: list[float] = field(default_factory=list)
    """Of each round but the first."""
    cpu_s: list[float] = field(default_factory=list)
    """Of each federation."""


_SCALES = {
    "smoke": Scale(rows=2, words=4, timed_words=4, pairs=1, rounds=2),
    "standard": Scale(rows=2, words=16, timed_words=12, pairs=3, rounds=4),
}


def measure(profile: str, model: str | None = None) -> Mixed:
    """Everything once.

    Args:
        profile: `smoke` or `standard`.
        model: folder, GGUF file or hub id; None is the profile's own.
    """
    scale = _SCALES[profile]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        work.chmod(0o700)
        subject = _subject(profile, model, scale, work)
        diff = _gradient_difference(subject, work)
        timed = replace(subject, rows=1, words=scale.timed_words)
        mixed, equal = _timed_arms(timed, scale, work)
    return Mixed(
        gradient_max_rel_diff=diff,
        mixed_over_equal_throughput=median(equal.round_s) / median(mixed.round_s),
        round_s_mixed=median(mixed.round_s),
        round_s_equal=median(equal.round_s),
        cpu_s_mixed=median(mixed.cpu_s),
        cpu_s_equal=median(equal.cpu_s),
        rounds_mixed=len(mixed.round_s),
    )


def _subject(profile: str, model: str | None, scale: Scale, work: Path) -> Subject:
    is_tiny = profile == "smoke" and model is None
    folder = (
        write_text_llama(work / "text-llama")
        if is_tiny
        else subject_folder(model, is_smoke=False, work_folder=work)
    )
    num_blocks = AutoConfig.from_pretrained(folder).num_hidden_layers
    return Subject(model=folder, num_blocks=num_blocks, rows=scale.rows, words=scale.words)


def _gradient_difference(subject: Subject, work: Path) -> float:
    """Of the second round, where factor B is no longer zero and all gradients are."""
    cuts, _ = six_cuts(subject.num_blocks)
    arm = Arm(cuts=cuts, rounds=2, local_steps=1, strategy=_EVERY_STEP, secure=_FINE, batch={})
    start: dict[str, Tensor] = {}

    def on_step(server: TrunkServer, number: int, report: Report) -> None:
        if number == 0 and report.record.step == 2:
            start.update(_newest(server)[0])

    with running(subject, arm, work / "gradient") as (server, clients):
        train_all(server, clients, on_step)
        moments = _newest(server)[1]
        examples = [example for client in clients for example in client.rows().train]
    gradients = _unsplit(subject.model, start, examples)
    return max(
        float((moments[f"{key}.exp_avg"] - x).abs().max() / x.abs().max())
        for key, x in gradients.items()
    )


def _newest(server: TrunkServer) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Adapters and moments after the newest finished round."""
    assert server.federation is not None
    checkpoint = server.federation.store.checkpoint()
    assert checkpoint is not None
    return checkpoint.state, checkpoint.strategy


def _unsplit(
    model: Path, start: Mapping[str, Tensor], examples: Sequence[Example]
) -> dict[str, Tensor]:
    """The gradient of the mean loss over all rows."""
    peft_model = new_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    set_peft_model_state_dict(peft_model, dict(start))
    num_scored = sum(label >= 0 for example in examples for label in example.labels[1:])
    for example in examples:
        logits = peft_model(torch.tensor([example.tokens])).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(example.labels[1:]), ignore_index=-100, reduction="sum"
        )
        torch.autograd.backward(loss / num_scored)
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in peft_model.named_parameters()
        if parameter.grad is not None
    }


def _timed_arms(subject: Subject, scale: Scale, work: Path) -> tuple[_Timed, _Timed]:
    """Federations of different cuts, and of equal ones."""
    different, equal = six_cuts(subject.num_blocks)
    arms = {"mixed": different, "equal": [equal] * len(different)}
    found = {name: _Timed() for name in arms}
    for pair in range(scale.pairs):
        for name in list(arms)[:: 1 if pair % 2 == 0 else -1]:
            _time(subject, arms[name], scale, work / f"{name}{pair}", found[name])
    return found["mixed"], found["equal"]


def _time(subject: Subject, cuts: Sequence[Cut], scale: Scale, folder: Path, found: _Timed) -> None:
    arm = Arm(cuts=cuts, rounds=scale.rounds, local_steps=2, strategy={}, secure={}, batch={})
    with running(subject, arm, folder) as (server, clients):
        begun_s = time.process_time()
        train_all(server, clients)
        found.cpu_s.append(time.process_time() - begun_s)
        assert server.federation is not None
        found.round_s += [row.seconds for row in server.federation.store.rounds()][1:]
