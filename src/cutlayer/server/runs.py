"""One training run at the trunk server: the owner's trunk adapter, its optimizer, its open step.

It does not compute (`engine`), read frames, check rights nor choose what runs next; only the
runner thread calls it.

Shapes: N = tokens of all rows of a micro-batch, D = hidden size.
"""

import json
import math
from dataclasses import dataclass

from torch import Tensor

from cutlayer.errors import ProtocolError, StepExpired, StorageError
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import Adapter, AdapterSettings
from cutlayer.model.cut import Cut
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer, gradient_scale
from cutlayer.model.rows import Rows
from cutlayer.model.tensor_file import read_tensors
from cutlayer.server.engine import Gradients
from cutlayer.server.graphs import Graph
from cutlayer.server.run_files import check_cut, cut_of, step_files
from cutlayer.server.settings import LimitSettings
from cutlayer.settings import parse_settings
from cutlayer.storage.steps import StepStore
from cutlayer.wire.messages import OpenRun, Step

__all__ = ["TrainingRun"]


@dataclass
class _Micro:
    """A micro-batch of the open step."""

    graph: Graph
    input_grad_ND: Tensor | None = None
    is_done: bool = False


class TrainingRun:
    """Exactly-once steps: FORWARD may repeat, a repeated BACKWARD is answered from its last reply.

    Attributes:
        step: the last finished step.
        cut: where the run's rows enter and leave the trunk.
    """

    def __init__(
        self,
        owner: str,
        adapter: Adapter,
        opened: OpenRun,
        store: StepStore | None,
        limits: LimitSettings,
        cut: Cut,
    ) -> None:
        """Args:
        owner: the client's name.
        adapter: the owner's, on the blocks of its cut.
        opened: what the owner said.
        store: where steps are saved; None for a run of a round, which lives in memory.
        limits: what one step may hold.
        cut: the owner's.
        """
        self.step = 0
        self.cut = cut
        self.opened = opened
        self._owner = owner
        self._num_scored = 0
        self._adapter = adapter
        self._optimizer = PartOptimizer(
            adapter, parse_settings(AdamWSettings, opened.optimizer, "the run's optimizer")
        )
        self._store = store
        self._limits = limits
        self._micros: dict[int, _Micro] = {}
        self._trunk_sq_norm: float | None = None
        self._needs_backward = bool(adapter.parameters()) or opened.wants_input_grad
        if store is not None:
            self._go_to_common_step(store, opened.saved_steps)

    @property
    def is_in_round(self) -> bool:
        """Whether it is a federation's: the adapter is lent, and nothing is saved."""
        return self._store is None

    @property
    def adapter_name(self) -> str:
        """Of the weights that the run trains."""
        return self._adapter.name

    def begin_forward(self, step: int, micro: int, h_ND: Tensor, rows: Rows) -> Graph:
        """What the engine needs for one micro-batch of the open step; nothing is kept yet.

        Raises:
            StepExpired: the run stands at another step.
            ProtocolError: too many micro-batches, or too large ones.
        """
        self._require_open(step)
        self._require_room(step, micro, h_ND)
        seed = _dropout_seed(self.opened.seed, step, micro)
        wants_grad = self.opened.wants_input_grad
        blocks = self.cut.trunk
        return Graph(self._owner, self._adapter, h_ND, rows, blocks, seed, wants_grad)

    def keep(self, micro: int, graph: Graph) -> None:
        """Take the graph of a forward that went well, in place of an earlier one."""
        known = self._micros.get(micro)
        if known is None:
            self._micros[micro] = _Micro(graph)
        elif known.is_done:
            graph.drop()
        else:
            known.graph.drop()
            known.graph = graph

    def graph_of(self, step: int, micro: int) -> Graph | None:
        """The graph that a BACKWARD would use; None if there is none or it was used."""
        known = self._micros.get(micro) if step == self.step + 1 else None
        return None if known is None or known.is_done else known.graph

    def begin_backward(self, step: int, micro: int, grad_ND: Tensor) -> Graph | None:
        """The graph for a gradient; None if it was used before, and the answer is known.

        Raises:
            StepExpired: the run stands at another step, or forgot this micro-batch.
            ProtocolError: the gradient does not fit the micro-batch.
        """
        self._require_open(step)
        known = self._micros.get(micro)
        if known is None:
            raise StepExpired(f"step {step} has no micro-batch {micro}; send its FORWARD again")
        if known.is_done:
            return None
        if grad_ND.shape != known.graph.h_ND.shape:
            raise ProtocolError(
                f"gradient of shape {tuple(grad_ND.shape)} for a micro-batch of shape "
                f"{tuple(known.graph.h_ND.shape)}"
            )
        return known.graph

    def add(self, micro: int, gradients: Gradients) -> None:
        """Accumulate the adapter's gradients; a micro-batch counts once."""
        known = self._micros[micro]
        for parameter, grad in zip(known.graph.weights, gradients.weights, strict=True):
            if grad is None:
                continue
            if parameter.grad is None:
                # Of a joint call it is a transposed view; optimizers want the parameter's layout.
                parameter.grad = grad.contiguous()
            else:
                parameter.grad.add_(grad)
        known.input_grad_ND, known.is_done = gradients.input_ND, True

    def end_backward(
        self, step: int, micro: int, is_last: bool
    ) -> tuple[Tensor | None, float | None]:
        """Gradient at the lower cut if wanted, and after the last micro-batch the squared norm.

        Raises:
            ProtocolError: the step ends before all its gradients have come.
        """
        if is_last:
            self._require_all_done(step)
            self._trunk_sq_norm = self._optimizer.sq_norm()
        return self._micros[micro].input_grad_ND, self._trunk_sq_norm if is_last else None

    def forget_open_step(self) -> None:
        """Drop the step's micro-batches and gradients; it can be done again from its beginning."""
        for known in self._micros.values():
            known.graph.drop()
        self._micros.clear()
        self._trunk_sq_norm = None
        self._optimizer.clear()

    def commit(self, finished: Step) -> None:
        """Take the optimizer step; a repeated commit of the same step does nothing.

        Raises:
            StepExpired: another step is open, or its last BACKWARD has not come.
            ProtocolError: numbers that cannot be.
        """
        if finished.step == self.step:
            return
        self._require_open(finished.step)
        _check_scalars(finished)
        trunk_sq_norm = self._trunk_sq_norm
        if trunk_sq_norm is None and self._needs_backward:
            raise StepExpired(f"step {finished.step} is not complete: its last BACKWARD is missing")
        if self._needs_backward and finished.num_tokens > self._num_forwarded():
            # Or a member of a federation could weigh more than all the others together.
            raise ProtocolError(
                f"COMMIT of {finished.num_tokens} scored tokens; step {finished.step} had "
                f"{self._num_forwarded()} tokens in all"
            )
        scale = gradient_scale(
            finished.client_sq_norm + (trunk_sq_norm or 0.0),
            finished.num_tokens,
            self.opened.clip_norm,
        )
        self._optimizer.step(scale, finished.lr)
        self.step = finished.step
        self._num_scored += finished.num_tokens
        self.forget_open_step()

    def update(self, kind: UpdateKind) -> TrunkUpdate | None:
        """What the rows did to the adapter since the run was opened; None if nothing yet."""
        if kind is UpdateKind.DELTA:
            if self.step == 0:
                return None
            return TrunkUpdate(state=self._adapter.state(), weight=self._num_scored)
        if self._trunk_sq_norm is None and self._adapter.parameters():
            return None
        return TrunkUpdate(state=self._adapter.gradients(), weight=0)

    def require_at(self, step: int) -> None:
        """Refuse a save of another step than the client means.

        Raises:
            StepExpired: the run stands elsewhere.
        """
        if step != self.step:
            raise StepExpired(f"the server is at step {self.step}, so step {step} cannot be saved")

    def save(self, is_pinned: bool) -> None:
        """Make the last finished step durable; in a round the round is, so that nothing is done."""
        if self._store is None:
            return
        states = self._adapter.state(), self._optimizer.state()
        files = step_files(self.step, self.cut, self.opened.adapter, *states)
        self._store.save(self.step, files, is_pinned)

    def close(self) -> None:
        """Free graphs and the adapter's weights, unless they are lent; saved steps stay."""
        self.forget_open_step()
        if not self.is_in_round:
            self._adapter.remove()

    def _go_to_common_step(self, store: StepStore, client_steps: list[int]) -> None:
        own = store.steps()
        if not own and 0 in client_steps:
            self.save(is_pinned=False)
            return
        common = sorted(set(own) & set(client_steps))
        if not common:
            raise StepExpired(
                f"run {self.opened.run_id}: the server has steps {own}, the client {client_steps}, "
                "none in common; restore one side's state folder or start a new run"
            )
        self._restore(store, common[-1])

    def _restore(self, store: StepStore, step: int) -> None:
        files = store.load(step)
        about = json.loads(files["state.json"])
        check_cut(self.opened.run_id, cut_of(about), self.cut)
        # Parsed, so that a setting which an older release did not write has its default.
        saved = parse_settings(AdapterSettings, about["adapter"], "saved")
        if saved != parse_settings(AdapterSettings, self.opened.adapter, "opened"):
            raise StorageError(
                f"run {self.opened.run_id} was started with other adapter settings; "
                "start a new run for the new ones"
            )
        self._adapter.load(read_tensors(files, "adapter.safetensors"))
        self._optimizer.load(read_tensors(files, "optimizer.safetensors"))
        store.drop_after(step)
        self.step = step

    def _require_open(self, step: int) -> None:
        if step != self.step + 1:
            raise StepExpired(f"the server is at step {self.step}, so step {step} is not open")

    def _require_room(self, step: int, micro: int, h_ND: Tensor) -> None:
        limits, known = self._limits, self._micros.get(micro)
        if known is None and len(self._micros) >= limits.max_micro_batches:
            raise ProtocolError(
                f"step {step} has more than {limits.max_micro_batches} micro-batches; "
                "make them larger or ask the operator"
            )
        kept = 2 if self.opened.wants_input_grad else 1
        num_others = self._num_forwarded() - (known.graph.rows.num_tokens if known else 0)
        num_bytes = kept * (num_others + h_ND.shape[0]) * h_ND.shape[1] * h_ND.itemsize
        if num_bytes > limits.max_step_bytes:
            raise ProtocolError(
                f"step {step} needs {num_bytes} bytes of hidden states, this server keeps "
                f"{limits.max_step_bytes} (limits.max_step_bytes); take fewer rows per step"
            )

    def _num_forwarded(self) -> int:
        """Tokens of the open step that came so far."""
        return sum(known.graph.rows.num_tokens for known in self._micros.values())

    def _require_all_done(self, step: int) -> None:
        waiting = [micro for micro, known in self._micros.items() if not known.is_done]
        if waiting:
            raise ProtocolError(
                f"step {step} ends while micro-batches {waiting} wait for their BACKWARD"
            )


def _check_scalars(finished: Step) -> None:
    for name in ("client_sq_norm", "lr"):
        value = getattr(finished, name)
        if not (math.isfinite(value) and value >= 0):
            raise ProtocolError(f"COMMIT with {name}={value}; a finite number from 0 is needed")
    if finished.num_tokens < 0:
        raise ProtocolError(f"COMMIT with num_tokens={finished.num_tokens}")


def _dropout_seed(seed: int, step: int, micro: int) -> int:
    # One seed per micro-batch: a recomputed or repeated forward drops the same places.
    return ((seed * 1_000_003 + step) * 1_009 + micro) % 2**63
