"""A real short run of one setting: fine-tune, rows that leave, and the score beside it.

Server and client are the product's own and talk over a loopback channel that encodes every frame;
nothing leaves this machine, and the owner's budgets are not spent. It does not attack.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cutlayer.audit.evidence import Evidence
from cutlayer.audit.grid import TrialSpec, settings_of
from cutlayer.audit.results import Utility
from cutlayer.audit.seen import Tap, evidence_of, hidden_of
from cutlayer.audit.settings import AuditPlan, Phase
from cutlayer.audit.truth import Hidden
from cutlayer.audit.utility import Question, measure_utility
from cutlayer.audit.verdict import verdict_key
from cutlayer.client.client import Client
from cutlayer.client.run_state import RunState
from cutlayer.client.settings import ClientSettings, Schedule, TrainSettings
from cutlayer.client.train import Trainer, TrainingData
from cutlayer.data.batches import BatchPlan
from cutlayer.data.template import Example
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.partition import Head, Tail
from cutlayer.privacy.mechanism import Mechanism
from cutlayer.server.server import TrunkServer
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.wire.channel import LoopbackChannel, Peer

__all__ = ["Material", "Seen", "run_setting"]

_STILL = 1e-12
"""A learning rate that leaves float32 weights where they are."""
_ROWS_PER_CALL = 4
_OWNER = Peer(name="audited", roles=frozenset({"train"}), serial=None, address="loopback")

Adapt = Callable[[Head, Tail], None]


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
    with _client(settings, folder) as (client, tap):
        began_s = time.monotonic()
        step = _tune(client) if spec.phase is Phase.TRAINED else 0
        tuned_s = time.monotonic() - began_s
        plan = _plan(material, step)
        asked: list[Example] = []
        trainer = _trainer(client, material.rows, asked, plan)
        tap.is_on = True
        trainer.run()
        tap.is_on = False
        utility = measure_utility(material.heldout, material.asked, _loss(trainer, asked))
        key = verdict_key(settings, {**client.head.leaves, **client.tail.leaves})
        guarantee, epsilon = client.guarantee, _epsilon(client)
    return Seen(
        evidence=evidence_of(tap.calls),
        hidden=hidden_of(tap.calls, plan, material.rows),
        rule=settings.privacy.activation_rule(),
        gradient_rule=settings.privacy.gradient_rule(),
        guarantee=guarantee,
        epsilon=epsilon,
        verdict_key=key,
        utility=utility,
        adapt=_adapters(settings),
        tune_seconds=tuned_s,
    )


def _settings(spec: TrialSpec, material: Material, folder: Path) -> ClientSettings:
    """Of the run: the owner's, with a folder of its own and a length where it has none."""
    run = {"folder": folder / "run"}
    train = material.client.train
    table = {} if train is None else train.model_dump()
    if material.plan.train_steps is not None:
        table |= {"steps": material.plan.train_steps, "epochs": None}
    elif table.get("steps") is None and table.get("epochs") is None:
        if spec.phase is Phase.TRAINED:
            raise ConfigError(
                "phase trained needs a length: set audit.train_steps, or train.steps or "
                "train.epochs in the client's settings"
            )
        table |= {"steps": 1}
    return settings_of(spec, material.client, run=run, train=table)


@contextmanager
def _client(settings: ClientSettings, folder: Path) -> Iterator[tuple[Client, Tap]]:
    model = settings.model.model_dump(exclude={"revision", "digest", "decode_threads"})
    table = {
        "model": model,
        "listen": {"address": "127.0.0.1:0", "plaintext": True},
        "state": {"folder": str(folder / "server")},
    }
    server = TrunkServer(parse_settings(ServerSettings, table, "the audit's server"))
    try:
        tap = Tap(lambda: LoopbackChannel(server, _OWNER))
        with Client(settings, connect=tap.connect) as client:
            yield client, tap
    finally:
        server.stop(grace_s=0)


def _tune(client: Client) -> int:
    """Fine-tune as the settings say; the step reached."""
    return client.train().step


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


def _epsilon(client: Client) -> str:
    return client.guarantee


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
