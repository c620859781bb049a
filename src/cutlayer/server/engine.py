"""Trunk calls: rows of several clients through one forward and one backward, each for itself.

It does not know runs, steps, frames or who waits; only the runner thread calls it. A failure is
its client's alone: what fails together is tried again one by one.

Shapes: N = tokens of one micro-batch or of all, D = hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from cutlayer.errors import ProtocolError
from cutlayer.model.adapter_slots import Segment
from cutlayer.model.grouped_lora import can_share_calls
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.partition import Trunk
from cutlayer.model.passage import Traveller, joined_rows, pass_through
from cutlayer.model.rows import Rows
from cutlayer.server.batches import FAILURES, Failure
from cutlayer.server.graphs import Graph, GraphBudget, JointGraph
from cutlayer.trace import NoTrace, Tracer

__all__ = ["Gradients", "Inference", "TrunkEngine"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Rows that need no gradient."""

    adapter: str | None
    """Name of the adapter; None is the base model."""
    h_ND: Tensor
    rows: Rows
    blocks: range
    """Global indices of the blocks that they take."""
    caches: Sequence[RowCache] | None = None


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What one micro-batch's backward gave."""

    input_ND: Tensor | None
    """At the lower cut, if it was wanted."""
    weights: Sequence[Tensor | None]
    """In the order of `Adapter.parameters`."""


class TrunkEngine:
    """All calls of one trunk."""

    def __init__(
        self,
        trunk: Trunk,
        budget: GraphBudget,
        tracer: Tracer | None = None,
        observe: Callable[[int, int], None] = lambda clients, tokens: None,
    ) -> None:
        """Args:
        trunk: before any adapter is put on it.
        budget: bytes for activations.
        tracer: gets a span of every call.
        observe: told the clients and tokens of every call.
        """
        self.can_share = can_share_calls(trunk)
        self._trunk = trunk
        self._budget = budget
        self._tracer = NoTrace() if tracer is None else tracer
        self._observe = observe
        self._like = trunk.zeros_ND(1)
        # There will be many adapters, and walking through all their modules takes a while.
        self._base_modules = list(trunk.modules())

    def forward(self, graphs: Sequence[Graph]) -> list[Tensor | Failure]:
        """Trunk output [N, D] of each micro-batch, detached; activations are kept if they fit."""
        return self._isolated(self._forward_together, graphs)

    def backward(self, calls: Sequence[tuple[Graph, Tensor]]) -> list[Gradients | Failure]:
        """Gradients of each micro-batch, given those of its output [N, D].

        Members of one joint forward share one backward; who is absent counts as zero rows there.
        The others are recomputed, together.
        """
        found: dict[int, Gradients | Failure] = {}
        by_joint: dict[JointGraph | None, list[int]] = {}
        for index, (graph, _) in enumerate(calls):
            by_joint.setdefault(graph.joint, []).append(index)
        for indices in by_joint.values():
            results = self._isolated(self._backward_together, [calls[i] for i in indices])
            found.update(zip(indices, results, strict=True))
        return [found[index] for index in range(len(calls))]

    def infer(self, calls: Sequence[Inference]) -> list[Tensor | Failure]:
        """Trunk output [N, D] of each; all or none have caches."""
        return self._isolated(self._infer_together, calls)

    def _isolated(
        self, compute: Callable[[Sequence[T]], list[R | Failure]], calls: Sequence[T]
    ) -> list[R | Failure]:
        if len(calls) == 1 or self.can_share:
            try:
                return compute(calls)
            except FAILURES as error:
                if len(calls) == 1:
                    return [error]
        return [found for call in calls for found in self._isolated(compute, [call])]

    def _forward_together(self, graphs: Sequence[Graph]) -> list[Tensor | Failure]:
        with self._span("forward", [graph.rows for graph in graphs]):
            y_ND, num_bytes = self._run(graphs)
            outputs = _split(_sent(y_ND.detach()), [graph.rows for graph in graphs])
        results = [_finite(y) for y in outputs]
        JointGraph(graphs, y_ND, num_bytes, self._budget)
        for graph, result in zip(graphs, results, strict=True):
            if isinstance(result, ProtocolError):
                graph.drop()
        return results

    def _backward_together(
        self, calls: Sequence[tuple[Graph, Tensor]]
    ) -> list[Gradients | Failure]:
        graphs = [graph for graph, _ in calls]
        grads = {id(graph): grad_ND for graph, grad_ND in calls}
        with self._span("backward", [graph.rows for graph in graphs]):
            joint = graphs[0].joint
            if joint is not None and joint.y_ND is not None:
                members, y_ND = joint.members, joint.y_ND
                joint.use_up()
            else:
                members, y_ND = graphs, self._run(graphs)[0]
                for graph in graphs:
                    graph.drop()
            grad_ND = torch.cat([grads.get(id(m), torch.zeros_like(m.h_ND)) for m in members])
            return _differentiate(y_ND, grad_ND.to(y_ND), members, graphs)

    def _infer_together(self, calls: Sequence[Inference]) -> list[Tensor | Failure]:
        with self._span("infer", [call.rows for call in calls]), torch.inference_mode():
            travellers = [self._traveller_of(call) for call in calls]
            y_ND = _sent(pass_through(self._trunk, travellers))
        return list(_split(y_ND, [call.rows for call in calls]))

    def _run(self, graphs: Sequence[Graph]) -> tuple[Tensor, int]:
        """The joint output [N, D] with its graph, and the bytes that the graph holds."""
        counter = _SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, _unpack):
            y_ND = self._run_shared(graphs) if self.can_share else self._run_alone(graphs[0])
        return y_ND, counter.num_bytes

    def _run_shared(self, graphs: Sequence[Graph]) -> Tensor:
        travellers = [
            Traveller(
                h_ND=graph.h_ND.to(self._like),
                rows=graph.rows,
                blocks=graph.blocks,
                segment=_segment(graph),
            )
            for graph in graphs
        ]
        with self._base_in_training():
            return pass_through(self._trunk, travellers)

    def _run_alone(self, graph: Graph) -> Tensor:
        with self._own_call(graph):
            h_ND = graph.h_ND.to(self._like)
            y_ND: Tensor = self._trunk(h_ND, joined_rows([graph.rows]), None, graph.blocks)
        return y_ND

    def _traveller_of(self, call: Inference) -> Traveller:
        return Traveller(
            h_ND=call.h_ND.to(self._like),
            rows=call.rows,
            blocks=call.blocks,
            segment=Segment(adapter=call.adapter, num_tokens=call.rows.num_tokens),
            caches=call.caches or (),
        )

    @contextmanager
    def _base_in_training(self) -> Iterator[None]:
        """Training mode without the adapters' modules, whose dropout is the segments' own."""
        for module in self._base_modules:
            module.training = True
        try:
            yield
        finally:
            for module in self._base_modules:
                module.training = False

    @contextmanager
    def _own_call(self, graph: Graph) -> Iterator[None]:
        """The base model's dropout draws from the global generator; so the adapter's does too."""
        torch.manual_seed(graph.seed)
        graph.adapter.activate()
        self._trunk.train()
        try:
            yield
        finally:
            self._trunk.eval()

    @contextmanager
    def _span(self, name: str, rows: Sequence[Rows]) -> Iterator[None]:
        num_tokens = sum(part.num_tokens for part in rows)
        self._observe(len(rows), num_tokens)
        with self._tracer.span("trunk", name, clients=len(rows), tokens=num_tokens):
            yield


class _SavedBytes:
    """Counts the distinct storages that autograd saves, weights included only by reference."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._seen: set[int] = set()

    def pack(self, saved: Tensor) -> Tensor:
        is_weight = saved.is_leaf or (saved._base is not None and saved._base.is_leaf)
        pointer = saved.untyped_storage().data_ptr()
        if not is_weight and pointer not in self._seen:
            self._seen.add(pointer)
            self.num_bytes += saved.untyped_storage().nbytes()
        return saved


def _unpack(saved: Tensor) -> Tensor:
    return saved


def _differentiate(
    y_ND: Tensor, grad_ND: Tensor, members: Sequence[Graph], wanted: Sequence[Graph]
) -> list[Gradients | Failure]:
    """Gradients of the wanted members' weights and inputs; nothing is added to any `.grad`.

    All members' leaves are asked for, so that the way through the trunk does not depend on who
    is absent: several processes may share its work.
    """
    leaves = [leaf for graph in members for leaf in _leaves(graph)]
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if leaves and y_ND.requires_grad:
        found = torch.autograd.grad(y_ND, leaves, grad_ND, allow_unused=True)
    results: dict[int, Gradients | Failure] = {}
    for graph in members:
        num_weights, num_leaves = len(graph.weights), len(_leaves(graph))
        own, found = found[:num_leaves], found[num_leaves:]
        of_input = own[num_weights] if num_leaves > num_weights else None
        results[id(graph)] = _checked(Gradients(input_ND=of_input, weights=own[:num_weights]))
    return [results[id(graph)] for graph in wanted]


def _leaves(graph: Graph) -> list[Tensor]:
    return [*graph.weights, *([graph.h_ND] if graph.h_ND.requires_grad else [])]


def _checked(gradients: Gradients) -> Gradients | Failure:
    tensors = [g for g in (*gradients.weights, gradients.input_ND) if g is not None]
    # The norm is one fast call; it may overflow where every value is finite.
    if not tensors or nn.utils.get_total_norm(tensors).isfinite():
        return gradients
    is_finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    return gradients if is_finite else _not_finite("gradients")


def _finite(y_ND: Tensor) -> Tensor | Failure:
    return y_ND if bool(y_ND.isfinite().all()) else _not_finite("output")


def _not_finite(name: str) -> ProtocolError:
    return ProtocolError(
        f"the trunk's {name} of this micro-batch came out NaN or infinite: the client's training "
        "diverged, or its values are too large; lower train.lr, or use float32"
    )


def _segment(graph: Graph) -> Segment:
    return Segment(
        adapter=graph.adapter.name,
        num_tokens=graph.rows.num_tokens,
        dropout_seed=graph.seed,
    )


def _split(y_ND: Tensor, rows: Sequence[Rows]) -> Sequence[Tensor]:
    return list(y_ND.split([part.num_tokens for part in rows]))


def _sent(y_ND: Tensor) -> Tensor:
    """As codecs want it."""
    return y_ND.to("cpu", torch.float32)
