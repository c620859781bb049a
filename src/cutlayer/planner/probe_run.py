"""One short fine-tune of a probe: the product's client and server over a loopback channel.

Every frame is encoded, and the noise is real. It does not choose cuts, steps or seeds (`probe`).
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cutlayer.client.client import Client
from cutlayer.client.local_run import on_this_machine
from cutlayer.client.schedule import batch_plan
from cutlayer.client.settings import (
    ClientSettings,
    RunSettings,
    Schedule,
    TrainSettings,
)
from cutlayer.client.train import Report, TrainingData
from cutlayer.data.load import Dataset, load_dataset
from cutlayer.data.settings import DataSettings
from cutlayer.data.template import RowLimits
from cutlayer.errors import ConfigError, DataError
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.model.partition import Cut
from cutlayer.server.server import TrunkServer
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.wire.channel import LoopbackChannel, Peer

__all__ = ["Bench", "Cost", "Tuned", "make_bench"]

_STILL = 1e-12
"""A learning rate that leaves float32 weights where they are."""
_MAX_HELDOUT = 64
_HELDOUT_SHARE = 0.2
_OWNER = Peer(name="probed", roles=frozenset({"train"}), serial=None, address="loopback")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a cut scores before any step, and how long things take on this machine."""

    untuned_loss: float
    """Held-out loss, in nats per scored token."""
    open_s: float
    """Loading both sides."""
    step_s: float
    """One optimizer step."""
    eval_s: float
    """Scoring the held-out rows."""
    seconds: float
    """All that this measurement took."""

    def of_run(self, num_steps: int) -> float:
        """Seconds that a fine-tune of so many steps will take."""
        return self.open_s + num_steps * self.step_s + self.eval_s


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One fine-tune."""

    loss: float
    """Held-out loss after the last step."""
    seconds: float
    """Loading and scoring included."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs of a probe share."""

    client: ClientSettings
    """The owner's settings, for this machine alone."""
    rows: Dataset = field(repr=False)

    @property
    def num_heldout(self) -> int:
        """Held-out rows."""
        return len(self.rows.validation)

    def measure(self, cut: Cut) -> Cost:
        """The untuned loss, and the times of loading, a step and a score."""
        marks = [time.monotonic()]
        own = self._train_settings(seed=0, num_steps=2)
        still = own.model_copy(update={"lr": _STILL, "schedule": Schedule.CONSTANT})
        with _opened(self._settings(cut, still, seed=0)) as client:
            marks.append(time.monotonic())
            loss = self._trained(client, still, marks)
        began, opened, first, last = marks[0], marks[1], marks[2], marks[3]
        step_s = first - opened
        return Cost(
            untuned_loss=loss,
            open_s=opened - began,
            step_s=step_s,
            # The last of the two steps was followed by the score.
            eval_s=max(0.0, last - first - step_s),
            seconds=time.monotonic() - began,
        )

    def tune(self, cut: Cut, seed: int, num_steps: int) -> Tuned:
        """Fine-tune from the beginning."""
        began_s = time.monotonic()
        train = self._train_settings(seed, num_steps)
        with _opened(self._settings(cut, train, seed)) as client:
            loss = self._trained(client, train, [])
        return Tuned(loss=loss, seconds=time.monotonic() - began_s)

    def _trained(self, client: Client, train: TrainSettings, marks: list[float]) -> float:
        def mark(report: Report) -> None:
            marks.append(time.monotonic())

        rows = self.rows
        plan = batch_plan(rows, train)
        data = TrainingData(train=rows.train, validation=rows.validation, plan=plan)
        progress = client.trainer(data, train).run(mark)
        return progress.evaluations[str(progress.step)]

    def _train_settings(self, seed: int, num_steps: int) -> TrainSettings:
        """The owner's, for so many steps; nothing is saved or scored on the way."""
        own = self.client.train or TrainSettings(steps=num_steps)
        return own.model_copy(
            update={
                "steps": num_steps,
                "epochs": None,
                # Whatever is in the warm-up of a long run would be all of a short one.
                "warmup_steps": min(own.warmup_steps, num_steps // 4),
                "save_every": num_steps,
                "eval_every": None,
                "patience": None,
                "seed": own.seed + seed,
            }
        )

    def _settings(self, cut: Cut, train: TrainSettings, seed: int) -> ClientSettings:
        own = self.client
        model = own.model.model_copy(update={"lower": cut.lower, "upper": cut.upper})
        adapter = own.adapter.model_copy(update={"seed": own.adapter.seed + seed})
        return own.model_copy(update={"model": model, "train": train, "adapter": adapter})


def make_bench(client: ClientSettings, data: Path, cuts: Sequence[Cut]) -> Bench:
    """Read the rows once, and refuse what cannot be probed before any work.

    Raises:
        ConfigError: the settings have no [data], a hop adds noise of its own, or a cut exceeds the
            model's blocks.
        DataError: the rows cannot be read, or leave none to score.
    """
    if client.data is None:
        raise ConfigError(
            "the client's settings have no [data] section, which says how a row becomes prompt and "
            "completion; a probe needs it"
        )
    if any(hop.privacy is not None and hop.privacy.mechanism != "none" for hop in client.hops):
        raise ConfigError(
            "a probe has one trunk, and these [[hops]] add noise of their own between two; remove "
            "[[hops]] for the probe, and take its losses as too low"
        )
    model = resolve_model(client.model.path, client.model.revision)
    for cut in cuts:
        cut.check(int(model.config.num_hidden_layers))
    settings = _probed_data(client.data, data)
    keep_share = client.privacy.keep_share
    rows = load_dataset(settings, model.tokenizer(), _limits(client, model), keep_share)
    if not rows.train or not rows.validation:
        raise DataError(f"{data} leaves no row to train on, or none to score; give it more rows")
    kept = Dataset(
        train=rows.train, validation=rows.validation[:_MAX_HELDOUT], num_skipped=rows.num_skipped
    )
    local = on_this_machine(client, model.path)
    run = RunSettings(key_file=client.run.key_file)
    return Bench(client=local.model_copy(update={"run": run}), rows=kept)


def _probed_data(own: DataSettings, data: Path) -> DataSettings:
    """The owner's form, these rows; a share of them is held out unless a file for that is named."""
    share = 0.0 if own.validation is not None else own.validation_fraction or _HELDOUT_SHARE
    is_alike = data.suffix == own.train.suffix
    kind = own.kind if is_alike else None
    return own.model_copy(update={"train": data, "validation_fraction": share, "kind": kind})


def _limits(client: ClientSettings, model: ModelFolder) -> RowLimits:
    taken = client.adapter.num_positions
    length = int(model.config.max_position_embeddings) - taken
    return RowLimits(context_length=length, vocab_size=model.config.vocab_size)


@contextmanager
def _opened(settings: ClientSettings) -> Iterator[Client]:
    """Both sides in this process, with a folder that goes when the block ends."""
    with tempfile.TemporaryDirectory(prefix="cutlayer-probe-") as name:
        folder = Path(name)
        run = settings.run.model_copy(update={"folder": folder / "run"})
        server = TrunkServer(_server_settings(settings, folder))
        try:
            connected = settings.model_copy(update={"run": run})
            with Client(connected, connect=lambda: LoopbackChannel(server, _OWNER)) as client:
                yield client
        finally:
            server.stop(grace_s=0)


def _server_settings(settings: ClientSettings, folder: Path) -> ServerSettings:
    model = settings.model.model_dump(exclude={"revision", "digest", "decode_threads"})
    table = {
        "model": model,
        "listen": {"address": "127.0.0.1:0", "plaintext": True},
        "state": {"folder": str(folder / "server")},
    }
    return parse_settings(ServerSettings, table, "the probe's server")
