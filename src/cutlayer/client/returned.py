"""Checks of everything that the server returns; the first fault ends all sending.

It does not compute or send. Profiles are in `return_profile` and `gradient_watch`, recomputing is
in `spot_check`; which call is recomputed is drawn after its reply is here, so a server cannot know.

Shapes: N = vectors of a call, D = hidden size.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cutlayer.client.gradient_watch import GradientWatch
from cutlayer.client.return_profile import OutputWatch
from cutlayer.client.run_state import StepRecord
from cutlayer.client.settings import CheckSettings
from cutlayer.client.spot_check import PublicTrunk, Sample
from cutlayer.errors import PeerMisbehaved
from cutlayer.model.adapters import AdapterState
from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Released
from cutlayer.privacy.history import ReleasedHistory
from cutlayer.wire.codec import decode
from cutlayer.wire.packed import Packed

__all__ = ["DecodeCall", "ReturnChecks", "TrainingCall"]


@dataclass(frozen=True, kw_only=True)
class TrainingCall:
    """Which micro-batch of which step was answered."""

    step: int
    micro: int
    rows: Rows
    sent: Packed
    """What was released, as it left."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"step {self.step}, micro-batch {self.micro}"


@dataclass(frozen=True, kw_only=True)
class DecodeCall:
    """Which vectors of a generation were answered, and by which weights."""

    released: Released
    """What was sent."""
    past: Sequence[ReleasedHistory]
    """All that each row of the call has released."""
    weights: str
    """Name of the weights that answer."""


class ReturnChecks:
    """One owner's checks; once a server has misbehaved they refuse everything."""

    def __init__(
        self,
        settings: CheckSettings,
        trunk: PublicTrunk | None = None,
        on_fault: Callable[[int], None] = lambda step: None,
        random_source: random.Random | None = None,
    ) -> None:
        """
        Args:
            settings: what is checked.
            trunk: public weights, where calls are recomputed.
            on_fault: told the training step, or 0, before PeerMisbehaved is raised.
            random_source: draws which calls are recomputed; None is the operating system.
        """
        self._settings, self._trunk = settings, trunk
        self._on_fault = on_fault
        self._random = random_source or random.SystemRandom()
        self._outputs = {"training": OutputWatch(), "generation": OutputWatch()}
        self._gradients = GradientWatch()
        self._refusal: str | None = None
        self._has_sampled_step = self._has_checked_call = False
        self._drawn: tuple[int, int, int] | None = None
        self._sample: Sample | None = None
        self._loaded: str | None = None
        self.num_spot_checks = 0
        """Rows that were recomputed."""
        self.peer = "the server"
        """Who is checked, for messages."""

    def require_trust(self) -> None:
        """To be asked before anything is sent.

        Raises:
            PeerMisbehaved: a reply was not an honest trunk's; nothing leaves any more.
        """
        if self._refusal is not None:
            raise PeerMisbehaved(self._refusal)

    def begin_step(self, step: int, batches: Sequence[Rows]) -> None:
        """Draw whether a row of this step will be recomputed, and which one."""
        self._sample = self._drawn = None
        if self._trunk is None or not self._is_drawn(is_first=not self._has_sampled_step):
            return
        micro = self._random.randrange(len(batches))
        self._drawn = step, micro, self._random.randrange(batches[micro].num_rows)

    def evaluation(self, step: int, sent: Packed, y_ND: Tensor) -> None:
        """Check an output of validation rows; raises as `forward` does."""
        if self._settings.profile:
            found = self._outputs["training"].fault(decode(sent).float(), y_ND)
            self._judge(found, f"output of an evaluation at step {step}", step)

    def forward(self, call: TrainingCall, y_ND: Tensor) -> None:
        """Check a training output.

        Raises:
            PeerMisbehaved: an honest trunk would not have returned it.
        """
        if self._settings.profile:
            found = self._outputs["training"].fault(decode(call.sent).float(), y_ND)
            self._judge(found, f"output of {call.where}", call.step)
        if self._drawn is None or self._drawn[:2] != (call.step, call.micro):
            return
        row = self._drawn[2]
        self._sample = Sample(
            where=f"{call.where}, row {row}",
            step=call.step,
            h_LD=_row(decode(call.sent).float(), call.rows, row),
            y_LD=_row(y_ND, call.rows, row),
        )

    def backward(self, call: TrainingCall, gradient_ND: Tensor) -> None:
        """Check a gradient at the lower cut.

        Raises:
            PeerMisbehaved: an honest trunk would not have returned it.
        """
        if self._settings.profile:
            found = self._gradients.fault(decode(call.sent).float(), gradient_ND, call.rows)
            self._judge(found, f"gradient of {call.where}", call.step)
        if self._sample is not None and self._drawn == (call.step, call.micro, self._drawn_row):
            self._sample.gradient_LD = _row(decode(call.sent).float(), call.rows, self._drawn_row)
            self._sample.input_gradient_LD = _row(gradient_ND, call.rows, self._drawn_row)

    @property
    def wants_step(self) -> bool:
        """Whether a row of the step that has just been computed is to be recomputed."""
        return self._sample is not None

    @property
    def wants_adapter(self) -> bool:
        """Whether the server has to declare the adapter that the step was computed with."""
        return self._sample is not None and self._trunk is not None and self._trunk.is_trained

    def compare_step(self, declared: AdapterState | None, history: Sequence[StepRecord]) -> None:
        """Recompute the row that was drawn.

        Args:
            declared: the server's adapter before the step; None where the trunk does not learn.
            history: the run's finished steps.

        Raises:
            PeerMisbehaved: the reply was not computed with these weights.
        """
        sample, trunk, self._sample = self._sample, self._trunk, None
        assert sample is not None
        assert trunk is not None
        if declared is not None:
            found = trunk.declared_fault(declared, sample.step - 1, history)
            self._judge(found, f"adapter of step {sample.step - 1}", sample.step)
        self._judge(trunk.fault(sample), f"answer to {sample.where}", sample.step)
        self._has_sampled_step, self._loaded = True, None
        self.num_spot_checks += 1

    def decoded(
        self, call: DecodeCall, y_ND: Tensor, declare: Callable[[], AdapterState | None]
    ) -> None:
        """Check an output of a generation.

        Args:
            call: what was answered.
            y_ND: the reply.
            declare: asks for the adapter that answers; None is the base model.

        Raises:
            PeerMisbehaved: an honest trunk would not have returned it.
        """
        if self._settings.profile:
            sent_ND = decode(call.released.packed).float()
            found = self._outputs["generation"].fault(sent_ND, y_ND)
            self._judge(found, "output of a generation", 0)
        if self._trunk is None or not self._is_drawn(is_first=not self._has_checked_call):
            return
        rows = call.released.rows
        row = self._random.randrange(rows.num_rows)
        start = rows.starts[row]
        sample = Sample(
            where=f"a generation, row {row} from token {start}",
            step=0,
            start=start,
            h_LD=decode(call.past[row].replay(start + rows.lengths[row]).packed).float(),
            y_LD=_row(y_ND, rows, row),
        )
        self._load(call.weights, declare)
        self._judge(self._trunk.fault(sample), f"answer to {sample.where}", 0)
        self._has_checked_call = True
        self.num_spot_checks += 1

    @property
    def _drawn_row(self) -> int:
        return -1 if self._drawn is None else self._drawn[2]

    def _is_drawn(self, is_first: bool) -> bool:
        every = self._settings.spot_check_every
        return every is not None and (is_first or self._random.random() * every < 1)

    def _load(self, key: str, declare: Callable[[], AdapterState | None]) -> None:
        assert self._trunk is not None
        if self._loaded != key:
            self._judge(self._trunk.load(declare()), "adapter of a generation", 0)
            self._loaded = key

    def _judge(self, found: str | None, what: str, step: int) -> None:
        if found is None:
            return
        self._refusal = (
            f"{self.peer} returned what an honest trunk does not, {what}: {found}; nothing is sent "
            "to it any more: ask its operator, compare model digests, cut and versions, and start "
            "again only with a server that you trust (docs/malicious-server.md)"
        )
        self._on_fault(step)
        raise PeerMisbehaved(self._refusal)


def _row(x_ND: Tensor, rows: Rows, row: int) -> Tensor:
    """One row of a packed tensor, apart from whatever becomes of it."""
    return x_ND.detach()[rows.offsets[row] : rows.offsets[row + 1]].clone()
