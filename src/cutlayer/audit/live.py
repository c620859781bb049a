"""A real short run of one setting: fine-tune, rows that leave, and the score beside it.

Server and client are the product's own and talk over a loopback channel that encodes every frame;
nothing leaves this machine, and the owner's budgets are not spent. It does not attack.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from cutlayer.audit.evidence import Evidence
from cutlayer.audit.grid import TrialSpec, settings_of
from cutlayer.audit.observations import read_evidence
from cutlayer.audit.results import Utility
from cutlayer.audit.settings import AuditPlan, Phase
from cutlayer.audit.truth import Hidden, hidden_rows
from cutlayer.audit.utility import (
    Question,
    are_single_tokens,
    measure_choices,
    measure_utility,
)
from cutlayer.audit.verdict import verdict_key
from cutlayer.client.accounts import report_from_files
from cutlayer.client.client import Client
from cutlayer.client.run_state import Progress, RunState
from cutlayer.client.schedule import batch_plan
from cutlayer.client.settings import ClientSettings, Schedule, TrainSettings
from cutlayer.client.train import Trainer, TrainingData
from cutlayer.client.truth_file import read_truth
from cutlayer.client.witness import truth_path
from cutlayer.data.batches import BatchPlan
from cutlayer.data.template import NOT_SCORED, Example
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.partition import Head, Part, Tail, Trunk
from cutlayer.privacy.boundary import BoundaryName
from cutlayer.privacy.guarantee import PrivacyUnit
from cutlayer.privacy.mechanism import Mechanism, Withhold
from cutlayer.server.server import TrunkServer
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.wire.channel import Channel, LoopbackChannel, Peer
from cutlayer.wire.recording import open_recording

__all__ = ["Material", "Seen", "run_setting"]

_STILL = 1e-12
"""A learning rate that leaves float32 weights where they are."""
_ROWS_PER_CALL = 4
_OWNER = Peer(name="audited", roles=frozenset({"train"}), serial=None, address="loopback")

Adapt = Callable[[Head, Tail], None]
AdaptTrunk = Callable[[Trunk], None]
Mark = Callable[[Sequence[Example]], tuple[Example, ...]]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What all trials of an audit share."""

    plan: AuditPlan
    client: ClientSettings
    """The owner's settings, on this machine."""
    rows: Sequence[Example] = field(repr=False)
    """Private rows to attack."""
    heldout: Sequence[Example] = field(repr=False)
    """Rows to score."""
    asked: Sequence[Question] = field(repr=False)
    """The same as multiple choice."""
    planted: Sequence[Example] = field(default=(), repr=False)
    """Canaries that a fine-tune learns beside the owner's rows."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What came out of one run."""

    evidence: Evidence
    hidden: dict[int, Hidden] = field(repr=False)
    """By number of the observation; for scoring alone."""
    rule: Mechanism
    gradient_rule: Mechanism
    guarantee: str
    epsilon: str
    verdict_key: str
    utility: Utility
    adapt: Adapt = field(repr=False)
    """Puts the adapters of the run on public parts: what a colluding client knows."""
    tune_seconds: float
    is_planted: bool = False
    """Whether canaries were among the rows of the fine-tune."""
    adapt_trunk: AdaptTrunk | None = field(default=None, repr=False)
    """Puts the run's trunk adapter on a public trunk; None where the trunk did not learn."""


def run_setting(spec: TrialSpec, material: Material, folder: Path) -> Seen:
    """Run one setting from the beginning.

    Args:
        spec: the setting.
        material: rows and settings.
        folder: an empty private folder; state of both sides goes there.

    Raises:
        ConfigError: the client's settings do not allow it.
    """
    settings = _settings(spec, material, folder)
    file = folder / "run.recording"
    with _server(settings, folder) as connect:
        began_s = time.monotonic()
        is_tuned = spec.phase is Phase.TRAINED
        # Where vectors stay, what follows a secret's own tokens is not predicted, so not learnt.
        planted = material.planted if is_tuned and spec.withhold == Withhold.NONE else ()
        step, adapt_trunk = _tune(settings, connect, planted) if is_tuned else (0, None)
        tuned_s = time.monotonic() - began_s
        _record(settings, connect, material, step, file)
        scored = _score(settings, connect, material, step)
    recorded = read_evidence(open_recording(file))
    return Seen(
        evidence=recorded.evidence,
        hidden=hidden_rows(recorded, read_truth(truth_path(file))),
        rule=settings.privacy.activation_rule(),
        gradient_rule=settings.privacy.gradient_rule(),
        guarantee=scored.guarantee,
        epsilon=scored.epsilon,
        verdict_key=scored.verdict_key,
        utility=scored.utility,
        adapt=_adapters(settings),
        tune_seconds=tuned_s,
        is_planted=bool(planted),
        adapt_trunk=adapt_trunk,
    )


def _settings(spec: TrialSpec, material: Material, folder: Path) -> ClientSettings:
    """Of the run: the owner's, with a folder of its own and a length where it has none."""
    run: dict[str, object] = {"folder": folder / "run"}
    train = material.client.train
    table: dict[str, object] = {} if train is None else train.model_dump()
    if material.plan.train_steps is not None:
        table |= {"steps": material.plan.train_steps, "epochs": None}
    elif table.get("steps") is None and table.get("epochs") is None:
        if spec.phase is Phase.TRAINED:
            raise ConfigError(
                "phase trained needs a length: set audit.train_steps, or train.steps or "
                "train.epochs in the client's settings"
            )
        table |= {"steps": 1}
    sections: dict[str, dict[str, object]] = {"run": run, "train": table}
    return settings_of(spec, material.client, **sections)


@contextmanager
def _server(settings: ClientSettings, folder: Path) -> Iterator[Callable[[], Channel]]:
    """A trunk in this process; what connects to it."""
    model = settings.model.model_dump(exclude={"revision", "digest", "decode_threads"})
    table = {
        "model": model,
        "listen": {"address": "127.0.0.1:0", "plaintext": True},
        "state": {"folder": str(folder / "server")},
    }
    server = TrunkServer(parse_settings(ServerSettings, table, "the audit's server"))
    try:
        yield lambda: LoopbackChannel(server, _OWNER)
    finally:
        server.stop(grace_s=0)


def _tune(
    settings: ClientSettings, connect: Callable[[], Channel], planted: Sequence[Example]
) -> tuple[int, AdaptTrunk | None]:
    """Fine-tune as the settings say, canaries among the rows; the step, and the trunk's adapter."""
    with Client(settings, connect=connect) as client:
        step = (_train_with(client, planted) if planted else client.train()).step
        if Part.TRUNK not in settings.adapter.parts:
            return step, None
        state = client.trunk.pull_adapter(client.run_id, step)
    return step, lambda trunk: attach(trunk, settings.adapter).load(state)


def _train_with(client: Client, planted: Sequence[Example]) -> Progress:
    own, train = client.rows(), client.settings.train
    assert train is not None
    rows = replace(own, train=[*own.train, *planted])
    data = TrainingData(train=rows.train, validation=rows.validation, plan=batch_plan(rows, train))
    return client.trainer(data, train).run()


def _record(
    settings: ClientSettings,
    connect: Callable[[], Channel],
    material: Material,
    step: int,
    file: Path,
) -> None:
    """Let every row leave at the weights of `step`, in front of a recorder."""
    run = settings.run.model_copy(update={"record_file": file, "record_truth": True})
    recorded = settings.model_copy(update={"run": run})
    with Client(recorded, connect=connect) as client:
        rows = _marking(client)(material.rows)
        _trainer(client, rows, [], _plan(material, step)).run()


@dataclass(frozen=True, kw_only=True)
class _Scored:
    utility: Utility
    guarantee: str
    epsilon: str
    verdict_key: str


def _score(
    settings: ClientSettings, connect: Callable[[], Channel], material: Material, step: int
) -> _Scored:
    """The score at the same weights, not recorded; what left of the rows is accounted before."""
    epsilon = _epsilon(settings)
    with Client(settings, connect=connect) as client:
        asked: list[Example] = []
        guarantee = client.guarantee
        utility = Utility()
        if material.heldout:
            mark = _marking(client)
            trainer = _trainer(client, mark(material.rows), asked, _plan(material, step))
            trainer.run()
            utility = _utility(trainer, mark, material, asked)
        return _Scored(
            utility=utility,
            guarantee=guarantee,
            epsilon=epsilon,
            verdict_key=verdict_key(settings, {**client.head.leaves, **client.tail.leaves}),
        )


def _utility(trainer: Trainer, mark: Mark, material: Material, asked: list[Example]) -> Utility:
    heldout = mark(material.heldout)
    if are_single_tokens(material.asked):
        return measure_choices(heldout, material.asked, trainer.first_logits)
    questions = [replace(question, rows=mark(question.rows)) for question in material.asked]
    return measure_utility(heldout, questions, _loss(trainer, asked))


def _marking(client: Client) -> Mark:
    """Tells rows which of their tokens stay, by the table that the run's own rows gave."""
    if not client.settings.privacy.keep_share:
        return tuple
    known = client.rows()
    stays = {row.row_id: row.is_withheld for row in (*known.train, *known.validation)}

    def mark(rows: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(
            replace(row, is_withheld=_stays(row, stays.get(row.row_id, []))) for row in rows
        )

    return mark


def _stays(row: Example, of_true: Sequence[bool]) -> list[bool]:
    """The same with any answer: whoever is asked keeps it, whatever it is."""
    first = next((n for n, label in enumerate(row.labels) if label != NOT_SCORED), len(row.labels))
    return [*of_true[:first], *([True] * (len(row.tokens) - first))] if of_true else []


def _plan(material: Material, step: int) -> BatchPlan:
    """Every row once a step, for the steps that follow `step`."""
    num = len(material.rows)
    return BatchPlan(
        num_rows=num,
        rows_per_step=num,
        steps=step + material.plan.passes,
        seed=material.plan.seed,
        micro_batch_rows=_ROWS_PER_CALL,
    )


def _trainer(
    client: Client, rows: Sequence[Example], asked: list[Example], plan: BatchPlan
) -> Trainer:
    """Steps that show the rows and move nothing; `asked` is what `evaluate` will score."""
    train = TrainSettings(
        steps=plan.num_steps,
        rows_per_step=plan.rows_per_step,
        micro_batch_rows=_ROWS_PER_CALL,
        lr=_STILL,
        schedule=Schedule.CONSTANT,
        save_every=plan.num_steps,
    )
    return client.trainer(TrainingData(train=rows, validation=asked, plan=plan), train)


def _loss(trainer: Trainer, asked: list[Example]) -> Callable[[Example], float]:
    def loss(row: Example) -> float:
        # The trainer scores whatever is in the list now: one row at a time.
        asked[:] = [row]
        return trainer.evaluate()

    return loss


def _epsilon(settings: ClientSettings) -> str:
    """What has left so far may tell about one row, at the lower cut and with gradients."""
    report = report_from_files(settings)
    by_boundary = {
        promise.boundary: promise.pld or promise.rdp
        for promise in report.promises
        if promise.rdp.unit is PrivacyUnit.ROW
    }
    if not by_boundary:
        return "nothing has left"
    lower = by_boundary.get(str(BoundaryName.ACTIVATIONS))
    gradients = by_boundary.get(str(BoundaryName.GRADIENTS))
    if lower is None or not lower.is_bounded or gradients is None:
        return str(lower)
    return f"{lower}; returned gradients: {gradients}"


def _adapters(settings: ClientSettings) -> Adapt:
    state = RunState(settings.run)
    try:
        steps = state.saved_steps()
        states: list[dict[str, Tensor]] = state.adapters(steps[-1]) if steps else [{}, {}]
    finally:
        state.close()
    return _adapter_of(settings.adapter, states)


def _adapter_of(adapter: AdapterSettings, states: Sequence[dict[str, Tensor]]) -> Adapt:
    def adapt(head: Head, tail: Tail) -> None:
        for part, state in zip((head, tail), states, strict=True):
            attach(part, adapter).load(state)

    return adapt
