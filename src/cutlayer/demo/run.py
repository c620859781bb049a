"""The demo from beginning to end: before, train, after, reply, export, check.

The trunk server and the training client are processes of their own; this process is the owner's
too: it scores and generates over the same server and looks at its own rows alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cutlayer.client.client import Client
from cutlayer.client.settings import ClientSettings
from cutlayer.data.tasks import ChoiceTask
from cutlayer.data.topics import topic_tasks
from cutlayer.demo.measure import HeldOut, export_difference, held_out
from cutlayer.demo.processes import serving, train_in_process
from cutlayer.demo.setup import DemoFiles, DemoSize, client_settings, prepare, write_settings
from cutlayer.errors import ProtocolError
from cutlayer.model.folder import resolve_model
from cutlayer.privacy.ledger import LedgerSummary
from cutlayer.simulation.phases import PhaseClock

__all__ = ["DemoInputs", "DemoReport", "run_demo"]

_CHECKED_ROWS = 16
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DemoInputs:
    """What the demo starts from; everything was fetched before the clock runs."""

    model: Path
    """GGUF file or model folder."""
    articles: Path
    """The asset bbcnews."""
    folder: Path
    """A private folder of the demo's own."""
    cache: Path | None = None
    """Where the converted model is kept."""
    seed: int = 0
    size: DemoSize = field(default_factory=DemoSize)


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What was measured."""

    before: HeldOut
    after: HeldOut
    training: dict[str, object]
    """Result of `cutlayer train --json`."""
    prompt: str
    reply: str
    ledger: LedgerSummary
    """What left in training, scoring and generation; the export check comes after it."""
    num_checked_vectors: int
    """Released without noise in the export check."""
    export_max_abs_diff: float
    activation_rule: str
    """Noise on head outputs, in training, scoring and generation."""
    gradient_rule: str
    """Noise on gradients at the upper cut."""
    guarantee: str
    """What the noise on activations promises."""
    model_digest: str | None
    seconds_by_phase: dict[str, float]

    @property
    def seconds(self) -> float:
        """Conversion, both evaluations, training, generation and export check."""
        return sum(self.seconds_by_phase.values())

    def number(self, key: str) -> float:
        """One number of the training's result."""
        value = self.training.get(key)
        if not isinstance(value, int | float):
            raise ProtocolError(f"cutlayer train --json gave {key}={value!r}, a number is needed")
        return float(value)


def run_demo(inputs: DemoInputs, say: Say) -> DemoReport:
    """Run it; the server is gone when this returns or raises.

    Raises:
        CutlayerError: whatever went wrong on either side.
    """
    clock = PhaseClock(say)
    clock.begin("conversion", "converting the model (kept for the next time) and making keys")
    model = resolve_model(inputs.model, cache_folder=inputs.cache)
    files = prepare(
        inputs.folder,
        model.path,
        model.config.num_hidden_layers,
        inputs.articles,
        inputs.seed,
        inputs.size,
    )
    clock.begin("server start", "starting the trunk server")
    with serving(files.server_config, files.folder) as server:
        settings = client_settings(files, model.path, server.address, inputs.seed, inputs.size)
        write_settings(settings, files.client_config)
        return _measure(files, settings, server.model_digest, clock)


def _measure(
    files: DemoFiles, settings: ClientSettings, digest: str | None, clock: PhaseClock
) -> DemoReport:
    scoring = settings.model_copy(update={"data": files.data})
    clock.begin("evaluation before", "scoring the held-out rows before training")
    with Client(scoring) as client:
        tasks = topic_tasks(client.rows().validation, client.tokenizer)
        before = held_out(client, tasks)
    clock.begin("training", "training in a process of its own")
    training = train_in_process(files.client_config)
    clock.begin("evaluation after", "scoring the held-out rows after training")
    with Client(scoring) as client:
        after = held_out(client, tasks)
        clock.begin("generation", "generating a reply")
        prompt = str(client.tokenizer.decode(tasks[0].prompt))
        reply = client.generate([prompt])[0]
        ledger, guarantee = client.ledger, client.guarantee
        clock.begin("export", "exporting the adapter and checking it against the unsplit model")
        client.export(files.folder / "adapter")
    difference, num_checked = _check_export(files, settings, tasks)
    clock.stop()
    return DemoReport(
        before=before,
        after=after,
        training=training,
        prompt=prompt,
        reply=reply,
        ledger=ledger,
        num_checked_vectors=num_checked,
        export_max_abs_diff=difference,
        activation_rule=settings.privacy.activation_rule().label,
        gradient_rule=settings.privacy.gradient_rule().label,
        guarantee=guarantee,
        model_digest=digest,
        seconds_by_phase=clock.seconds_by_phase,
    )


def _check_export(
    files: DemoFiles, settings: ClientSettings, tasks: Sequence[ChoiceTask]
) -> tuple[float, int]:
    """Over the real link, but exact: no noise and no rounding, or equality could not be seen."""
    exact = settings.model_copy(
        update={
            "privacy": settings.privacy.model_copy(update={"mechanism": "none", "scale": None}),
            "connection": settings.connection.model_copy(update={"codec": "raw"}),
        }
    )
    prompts = [task.prompt for task in tasks[:_CHECKED_ROWS]]
    with Client(exact) as client:
        difference = export_difference(
            client, Path(settings.model.path), files.folder / "adapter", prompts
        )
    return difference, sum(len(prompt) for prompt in prompts)
