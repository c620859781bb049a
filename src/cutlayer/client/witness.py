"""What an owner keeps of a run for an audit: frames as the server saw them, and the truth.

It changes nothing that is computed or sent, and does nothing unless the settings ask for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from cutlayer.client.link import Connect, OwnModel
from cutlayer.client.settings import ClientSettings
from cutlayer.client.step import Boundaries
from cutlayer.client.truth_file import TruthWriter
from cutlayer.data.template import Example
from cutlayer.errors import ConfigError
from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Boundary, Released
from cutlayer.privacy.budget import SessionBudget
from cutlayer.wire.channel import Channel
from cutlayer.wire.recorder import Recorder
from cutlayer.wire.recording import RecordingHeader

__all__ = ["Witness", "truth_path", "witness_of"]


@dataclass(frozen=True, kw_only=True)
class Witness:
    """Recorder and truth of one process; either may be absent."""

    recorder: Recorder | None = None
    truth: TruthWriter | None = None

    def connect(self, connect: Connect) -> Connect:
        """The same, with every channel recorded."""
        recorder = self.recorder
        if recorder is None:
            return connect

        def connect_recorded(place: str | None) -> Channel:
            return recorder.channel(connect(place))

        return connect_recorded

    def learn(self, *rows: Iterable[Example]) -> None:
        """Hear of the rows that will leave in training."""
        for examples in rows if self.truth is not None else ():
            assert self.truth is not None
            self.truth.learn(examples)

    def gates(self, gates: Boundaries) -> Boundaries:
        """The gates of training, the lower one witnessed."""
        return Boundaries(activations=self.gate(gates.activations), gradients=gates.gradients)

    def gate(self, gate: Boundary) -> Boundary:
        """A gate at the lower cut, witnessed."""
        return gate if self.truth is None else _WitnessedBoundary(gate, self.truth)

    def close(self) -> None:
        """End both files; the links are closed already."""
        if self.recorder is not None:
            self.recorder.close()
        if self.truth is not None:
            self.truth.close()


def witness_of(settings: ClientSettings, own: OwnModel, leaves: dict[str, str]) -> Witness:
    """What the settings ask for.

    Args:
        settings: `run.record_file` and `run.record_truth`.
        own: the model as this client tells it to the server.
        leaves: manifest leaves of head and tail.

    Raises:
        ConfigError: truth without a recording.
        StorageError: a file is there already, or cannot be written.
    """
    run = settings.run
    if run.record_file is None:
        if run.record_truth:
            raise ConfigError("run.record_truth needs run.record_file, beside which it is written")
        return Witness()
    header = RecordingHeader(
        software=f"cutlayer {version('cutlayer')}",
        spec=own.spec.to_table(),
        leaves=leaves,
        rules=settings.privacy.noise().model_dump(mode="json"),
    )
    truth = TruthWriter(truth_path(run.record_file)) if run.record_truth else None
    return Witness(recorder=Recorder(run.record_file, header), truth=truth)


def truth_path(recording: Path) -> Path:
    """Where the truth of a recording is."""
    return recording.with_name(f"{recording.name}.truth")


class _WitnessedBoundary(Boundary):
    """A gate whose owner writes down what passes it."""

    def __init__(self, gate: Boundary, truth: TruthWriter) -> None:
        # The very same gate: its ledger, secret and rule.
        vars(self).update(vars(gate))
        self._truth = truth

    def release(
        self,
        x_ND: Tensor,
        rows: Rows,
        row_ids: Sequence[str],
        version: str,
        budgets: Sequence[SessionBudget] = (),
        withheld_N: Tensor | None = None,
    ) -> tuple[Tensor, Released]:
        noised_ND, released = super().release(x_ND, rows, row_ids, version, budgets, withheld_N)
        self._truth.note(rows, row_ids, released.packed, withheld_N)
        return noised_ND, released
