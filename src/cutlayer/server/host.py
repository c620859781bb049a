"""The trunk and everything that lives on it: runs, sessions and their adapters.

One method per frame kind, plain values in and out. Only the runner thread calls it; it does not
know frames, codecs, certificates or rights.

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cutlayer.errors import ProtocolError, StepExpired
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.model.cut import Cut
from cutlayer.model.partition import Trunk
from cutlayer.model.rows import Rows
from cutlayer.server.batches import (
    FAILURES,
    Failure,
    Joint,
    TrunkCall,
    TrunkResult,
    together,
    work_kind,
)
from cutlayer.server.engine import Gradients, Inference, TrunkEngine
from cutlayer.server.generation import Generation, check_hidden
from cutlayer.server.graphs import Graph, GraphBudget
from cutlayer.server.recut import Moved
from cutlayer.server.run_files import load_saved_adapter
from cutlayer.server.run_table import RunTable
from cutlayer.server.runs import TrainingRun
from cutlayer.server.scheduler import WorkKind
from cutlayer.server.sessions import Session, SessionTable
from cutlayer.server.settings import LimitSettings
from cutlayer.storage.vault import Vault
from cutlayer.trace import Tracer
from cutlayer.wire.messages import (
    Backward,
    CloseSession,
    Commit,
    Decode,
    Forward,
    Header,
    OpenRun,
    OpenSession,
)
from cutlayer.wire.recut_messages import Recut

__all__ = ["TrunkHost"]


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A FORWARD or BACKWARD that was checked and may be computed."""

    run: TrainingRun
    graph: Graph | None
    """None where the answer is known already."""
    tensor: Tensor


class TrunkHost:
    """All state that calls of the trunk share."""

    def __init__(
        self,
        trunk: Trunk,
        limits: LimitSettings,
        state_folder: Path,
        vault: Vault,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer | None = None,
        observe: Callable[[int, int], None] = lambda clients, tokens: None,
        observe_decode: Callable[[int, float, float], None] = lambda tokens, seconds, cpu_s: None,
    ) -> None:
        """Args:
        trunk: without adapters so far.
        limits: what the server lends.
        state_folder: where runs are saved.
        vault: seals what is saved.
        clock: seconds, for idle times.
        tracer: gets a span of every call of the trunk.
        observe: told the clients and tokens of every call of the trunk.
        observe_decode: told tokens, seconds and the thread's processor seconds of joint decodes.
        """
        self._trunk = trunk
        self._whole = Cut(trunk.block_range.start, trunk.block_range.stop)
        self._limits = limits
        self._clock = clock
        self._graphs = GraphBudget(limits.max_graph_bytes)
        self._engine = TrunkEngine(trunk, self._graphs, tracer, observe)
        self._table = RunTable(trunk, limits, state_folder, vault, self._new_name, clock)
        self._runs = self._table.runs
        self._names = itertools.count()
        self._generation = Generation(
            trunk,
            self._engine,
            self._table,
            limits.session_limits(),
            self._new_name,
            clock,
            observe_decode,
        )

    @property
    def sessions(self) -> SessionTable:
        """What generation keeps."""
        return self._generation.sessions

    @property
    def can_share(self) -> bool:
        """Whether several clients' rows may go through one call of this trunk."""
        return self._engine.can_share

    def runs(self) -> list[tuple[str, str, int]]:
        """Owner, run id and step of each run in memory; any thread may ask."""
        return [(*key, run.step) for key, run in list(self._runs.items())]

    @property
    def max_call_tokens(self) -> int:
        """Tokens that one call may have."""
        return self._limits.max_call_tokens

    @property
    def session_ttl_s(self) -> float:
        """How long a session may idle."""
        return self._limits.session_ttl_s

    @property
    def graph_bytes(self) -> int:
        """Activations that wait for their BACKWARD."""
        return self._graphs.used_bytes

    def open_run(self, owner: str, opened: OpenRun, cut: Cut | None = None) -> int:
        """Load or create a run at the newest step that both sides have; returns that step.

        Args:
            owner: the client's name.
            opened: what it said.
            cut: where its rows enter and leave the trunk; None is at the trunk's own ends.
        """
        self._generation.sweep()
        return self._table.open(owner, opened, cut or self._whole).step

    def run_together(self, calls: Sequence[TrunkCall]) -> list[TrunkResult | Failure]:
        """Calls of one kind of different clients, in one call of the trunk; each its own result.

        A FORWARD gives the trunk's output, after finishing the step before if told to; a BACKWARD
        the gradient at the lower cut and the squared norm, each where it was asked for.
        """
        match work_kind(calls[0].header):
            case WorkKind.FORWARD:
                return together(calls, self._begin_forward, self._forward, _end_forward)
            case WorkKind.EVALUATE:
                return together(calls, self._begin_evaluation, self._engine.infer, _end_inference)
            case WorkKind.BACKWARD:
                return together(calls, self._begin_backward, self._backward, _end_backward)
        return self._generation.decode(calls)

    def forward(self, owner: str, call: Forward, h_ND: Tensor) -> Tensor:
        """One client's FORWARD alone; see `run_together`."""
        tensor = self._run_alone(owner, call, h_ND).tensor
        assert tensor is not None
        return tensor

    def backward(
        self, owner: str, call: Backward, grad_ND: Tensor
    ) -> tuple[Tensor | None, float | None]:
        """One client's BACKWARD alone; see `run_together`."""
        result = self._run_alone(owner, call, grad_ND)
        return result.tensor, result.trunk_sq_norm

    def joint_of(self, owner: str, header: Header) -> Joint:
        """With whom a BACKWARD may share a call."""
        run = self._runs.get((owner, header.run_id)) if isinstance(header, Backward) else None
        if run is None or not isinstance(header, Backward):
            return Joint()
        graph = run.graph_of(header.step, header.micro)
        if graph is None or graph.joint is None:
            return Joint()
        owners = frozenset(member.owner for member in graph.joint.waiting)
        return Joint(graph=graph.joint.number, owners=owners)

    def commit(self, owner: str, call: Commit) -> int:
        """Finish a step and save it if told to; the server's step now."""
        run = self._table.get(owner, call.run_id)
        if call.commit is not None:
            run.commit(call.commit)
        if call.save:
            run.require_at(call.step)
            run.save(call.pin)
        return run.step

    def adapter_layout(self, adapter: AdapterSettings) -> Mapping[str, list[int]]:
        """Key and shape of every tensor of the trunk's adapter."""
        return self._table.layout(adapter)

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        """Members' runs of this round start from these; called again, it adds members.

        Raises:
            ConfigError: the round has other adapter settings, or the rank exceeds the limit.
            ProtocolError: a state does not fit the trunk.
        """
        self._table.begin_round(run_id, adapter, states)

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        """What the members' runs of a round have learnt; who has nothing yet is absent."""
        return self._table.collect(run_id, members, kind)

    def end_round(self, run_id: str) -> None:
        """Forget a round and its runs."""
        self._table.end_round(run_id)

    def pull_adapter(self, owner: str, run_id: str, step: int) -> AdapterState:
        """The trunk adapter of a saved step of the owner's own run."""
        return load_saved_adapter(self._table.store(owner, run_id), step).state

    def recut(self, owner: str, call: Recut, came: Moved, may_leave: Callable[[], None]) -> Moved:
        """Fork a saved run at another cut; see `recut.Forks.fork`."""
        return self._table.fork(owner, call, came, may_leave)

    def open_session(self, owner: str, call: OpenSession, cut: Cut | None = None) -> Session:
        """A session of generation under the adapter that it wants; its cut as in `open_run`."""
        return self._generation.open(owner, call, cut or self._whole)

    def decode(self, owner: str, call: Decode, h_ND: Tensor) -> Tensor:
        """One client's DECODE alone; see `run_together`."""
        tensor = self._run_alone(owner, call, h_ND).tensor
        assert tensor is not None
        return tensor

    def close_session(self, owner: str, call: CloseSession) -> int:
        """Give some rows' cache back, or all of a session's; how many bytes."""
        return self._generation.close(owner, call)

    def abandon(self, owner: str, header: Header) -> None:
        """A call ended between two of its pieces: its client has gone."""
        if isinstance(header, Decode):
            self._generation.abandon(owner, header)

    def sweep(self) -> None:
        """Forget sessions that idled too long; to be called now and then."""
        self._generation.sweep()

    def _run_alone(
        self, owner: str, header: Forward | Backward | Decode, tensor: Tensor
    ) -> TrunkResult:
        call = TrunkCall(owner=owner, header=header, tensor=tensor)
        (result,) = self.run_together([call])
        if isinstance(result, TrunkResult):
            return result
        raise result

    def _run_of(self, call: TrunkCall) -> tuple[TrainingRun, Rows]:
        """The run of a FORWARD after the commit that it carries, and its rows."""
        header = call.header
        assert isinstance(header, Forward)
        run = self._table.get(call.owner, header.run_id)
        rows = Rows(lengths=tuple(header.lengths))
        check_hidden(self._trunk, call.tensor, rows, run.adapter_name)
        if header.commit is not None:
            run.commit(header.commit)
        return run, rows

    def _begin_forward(self, call: TrunkCall) -> _Begun:
        run, rows = self._run_of(call)
        header = call.header
        assert isinstance(header, Forward)
        _check_finite(call.tensor, "hidden states")
        graph = run.begin_forward(header.step, header.micro, call.tensor, rows)
        return _Begun(run=run, graph=graph, tensor=call.tensor)

    def _forward(self, begun: Sequence[_Begun]) -> list[Tensor | Failure]:
        return self._engine.forward([one.graph for one in begun if one.graph is not None])

    def _begin_evaluation(self, call: TrunkCall) -> Inference:
        run, rows = self._run_of(call)
        header = call.header
        assert isinstance(header, Forward)
        if header.step != run.step:
            raise StepExpired(f"evaluation at step {header.step}, the server is at {run.step}")
        blocks = run.cut.trunk
        return Inference(adapter=run.adapter_name, h_ND=call.tensor, rows=rows, blocks=blocks)

    def _begin_backward(self, call: TrunkCall) -> _Begun:
        header = call.header
        assert isinstance(header, Backward)
        run = self._table.get(call.owner, header.run_id)
        graph = run.begin_backward(header.step, header.micro, call.tensor)
        if graph is not None:
            _check_finite(call.tensor, "gradients")
        return _Begun(run=run, graph=graph, tensor=call.tensor)

    def _backward(self, begun: Sequence[_Begun]) -> list[Gradients | Failure | None]:
        """Gradients of each; None where they were added before."""
        open_ones = [(one.graph, one.tensor) for one in begun if one.graph is not None]
        found = iter(self._engine.backward(open_ones))
        return [None if one.graph is None else next(found) for one in begun]

    def _new_name(self) -> str:
        return f"adapter{next(self._names)}"


def _end_forward(call: TrunkCall, begun: _Begun, found: Tensor | Failure) -> TrunkResult:
    if isinstance(found, FAILURES):
        raise found
    assert isinstance(call.header, Forward)
    assert begun.graph is not None
    begun.run.keep(call.header.micro, begun.graph)
    return TrunkResult(tensor=found)


def _end_backward(call: TrunkCall, begun: _Begun, found: Gradients | Failure | None) -> TrunkResult:
    header, run = call.header, begun.run
    assert isinstance(header, Backward)
    if isinstance(found, FAILURES):
        run.forget_open_step()
        raise found
    if found is not None:
        run.add(header.micro, found)
    grad_ND, sq_norm = run.end_backward(header.step, header.micro, header.is_last)
    return TrunkResult(tensor=grad_ND, trunk_sq_norm=sq_norm)


def _end_inference(call: TrunkCall, begun: Inference, found: Tensor | Failure) -> TrunkResult:
    if isinstance(found, FAILURES):
        raise found
    return TrunkResult(tensor=found)


def _check_finite(tensor_ND: Tensor, name: str) -> None:
    if not bool(tensor_ND.isfinite().all()):
        raise ProtocolError(
            f"the {name} that came are NaN or infinite: training diverged at the client; lower "
            "train.lr, or use float32"
        )
