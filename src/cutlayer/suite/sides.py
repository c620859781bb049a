"""What server and owners of a split run have in their settings, and what a run leaves to be read.

The numbers of training are in `recipe`, rows in the task's folder. It runs nothing but the scoring.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from cutlayer.client.client import Client
from cutlayer.client.run_state import RunState, StepRecord
from cutlayer.client.settings import ClientSettings, RunSettings
from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.published.question import Prediction, Question
from cutlayer.evaluation.published.task_files import TaskFolder
from cutlayer.evaluation.report import Outcome
from cutlayer.evaluation.run import EvaluationOptions, evaluate
from cutlayer.evaluation.tasks import read_items
from cutlayer.model.folder import ModelFolder
from cutlayer.privacy.mechanism import PrivacySettings
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.simulation.timeline import Timeline
from cutlayer.simulation.worlds import ThreadWorld, thread_world
from cutlayer.suite.compute import Compute
from cutlayer.suite.recipe import adapter_settings, max_length, train_settings
from cutlayer.suite.spec import RunSpec

__all__ = [
    "CLIPS",
    "Answers",
    "Place",
    "answers",
    "check_test",
    "history_of",
    "loopback_world",
    "model_table",
    "owner_settings",
    "owner_table",
    "privacy_settings",
    "server_settings",
]

CLIPS = {"clipped_gaussian": 60.0, "matrix_gaussian": 600.0, "metric_dp": 60.0}
"""Norm bounds of the mechanisms that clip, in units of the activations: of a token's vector, for
matrix_gaussian of a whole row. Half the vectors that leave SmolLM2-135M's second block are longer
than 66, and a row of a hundred tokens is about 660 long."""
_NOWHERE, _LOOPBACK = "127.0.0.1:1", "127.0.0.1:0"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run is done."""

    folder: Path
    """A private folder; the state of all sides goes below it."""
    model: ModelFolder
    """The same at all sides."""
    compute: Compute
    """Of each side."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a trained model answered."""

    predictions: tuple[Prediction, ...] = field(repr=False)
    """One per test question, in their order."""
    seconds: float


def privacy_settings(spec: RunSpec) -> PrivacySettings:
    """The noise on what leaves at the lower cut; `CLIPS` has the bounds of rules that clip.

    Raises:
        ConfigError: the mechanism is unknown, or its scale is missing or senseless.
    """
    clip = CLIPS.get(spec.mechanism)
    table = {"mechanism": spec.mechanism, "scale": spec.scale, "clip": clip}
    return parse_settings(PrivacySettings, table, _where(spec))


def model_table(spec: RunSpec, place: Place) -> dict[str, object]:
    """Section [model] of every side.

    Raises:
        ConfigError: head and tail leave no block for the trunk.
    """
    num_blocks = int(place.model.config.num_hidden_layers)
    upper = num_blocks - spec.tail_blocks
    if not 0 <= spec.head_blocks < upper <= num_blocks:
        raise ConfigError(
            f"{spec.head_blocks} blocks of head and {spec.tail_blocks} of tail leave no trunk of "
            f"the model's {num_blocks}; take fewer"
        )
    return {
        "path": str(place.model.path),
        "lower": spec.head_blocks,
        "upper": upper,
        "threads": place.compute.threads,
        "device": place.compute.device,
    }


def server_settings(
    spec: RunSpec, place: Place, listen: dict[str, object] | None = None
) -> ServerSettings:
    """The trunk server of a run with one owner.

    Args:
        spec: the run.
        place: where.
        listen: its certificate, as keys of [listen]; None is a server that no socket reaches.
    """
    table = {
        "model": model_table(spec, place),
        "listen": {"address": _LOOPBACK, **(listen or {"plaintext": True})},
        "state": {"folder": str(place.folder / "server")},
        "drain_s": 1.0,
    }
    return parse_settings(ServerSettings, table, _where(spec))


def loopback_world(server: ServerSettings) -> AbstractContextManager[ThreadWorld]:
    """Server and owners as threads of this process, over frames that are really encoded."""
    return thread_world(server, Timeline(None), _say_nothing)


def owner_table(spec: RunSpec, task: TaskFolder, place: Place) -> dict[str, object]:
    """Sections that every owner has, whoever else takes part; its rows are all of the task's."""
    context_length = int(place.model.config.max_position_embeddings)
    return {
        "model": model_table(spec, place),
        "connection": {"address": _NOWHERE, "codec": spec.codec, "plaintext": True},
        "privacy": privacy_settings(spec).model_dump(),
        "adapter": adapter_settings(spec).model_dump(),
        "data": task.data_settings(max_length(spec, context_length)).model_dump(),
    }


def owner_settings(spec: RunSpec, task: TaskFolder, place: Place) -> ClientSettings:
    """The one owner of all rows."""
    table = {
        **owner_table(spec, task, place),
        "run": {"folder": str(place.folder / "run")},
        "train": train_settings(spec).model_dump(),
    }
    return parse_settings(ClientSettings, table, _where(spec))


def history_of(run: RunSettings) -> list[StepRecord]:
    """The finished steps of a run that nobody has open, in order, each once."""
    state = RunState(run)
    try:
        records = state.load(state.saved_steps()[-1]).progress.history
    finally:
        state.close()
    return list({record.step: record for record in records}.values())


def check_test(task: TaskFolder) -> None:
    """Before hours of training: can what comes after them be scored?

    Raises:
        DataError: test items are malformed, or not one for each key.
    """
    num_items, num_keys = len(read_items(task.test)), len(task.questions())
    if num_items != num_keys:
        raise DataError(
            f"{task.test} has {num_items} items for {num_keys} keys; write the task again"
        )


def answers(client: Client, task: TaskFolder) -> Answers:
    """Have the trained model answer every test question of a task that `check_test` accepted.

    Raises:
        DataError: a question is longer than the model's context.
    """
    began_s = time.monotonic()
    found = evaluate(client, read_items(task.test), EvaluationOptions())
    seconds = time.monotonic() - began_s
    pairs = zip(found.outcomes, task.questions(), strict=True)
    predictions = tuple(_prediction(outcome, question) for outcome, question in pairs)
    return Answers(predictions=predictions, seconds=seconds)


def _prediction(outcome: Outcome, question: Question) -> Prediction:
    said = outcome.prediction
    if not question.choices:
        return Prediction(text=str(said["reply"]))
    place, values = said["choice"], said["log_likelihoods"]
    assert isinstance(place, int)
    assert isinstance(values, list)
    return Prediction(text=question.choices[place], log_likelihoods=tuple(values))


def _say_nothing(text: str) -> None:
    """Nobody watches."""


def _where(spec: RunSpec) -> str:
    return f"run {spec.run_id}"
