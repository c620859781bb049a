"""Move the cut of a saved run: check, fork it at the server, write it here, then become it.

It does not train, load the parts that train afterwards (`client`) nor wait for commands
(`recut_desk`). Until the run's own file is replaced the run is the old one, and nothing of it was
changed, here or there; a move that was not finished is forgotten by whoever opens the run next.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import msgspec
from torch import Tensor

from cutlayer.client.link import Connect, Link, OwnModel, header_of
from cutlayer.client.own_model import model_identity
from cutlayer.client.recut_plan import RecutPlan, check_settings
from cutlayer.client.recut_room import Arrived, inspect, room_on
from cutlayer.client.run_state import RecutSteps, RunState, SavedStep
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError, CutlayerError, ProtocolError, StepExpired
from cutlayer.model.agreement import hash_leaves
from cutlayer.model.folder import ModelFolder
from cutlayer.model.moved_blocks import check_moved
from cutlayer.model.partition import Cut, Part
from cutlayer.privacy.moved_gate import MovedGate
from cutlayer.wire.codec import decode
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Kind
from cutlayer.wire.recut_messages import Recut, RecutDone, fork_id, split_tensors

__all__ = ["RecutReport", "Recutter"]


class RecutReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a re-cut did."""

    run_id: str
    """The run, as the server knows it now."""
    old: tuple[int, int]
    """Lower and upper before."""
    new: tuple[int, int]
    """Lower and upper now."""
    step: int
    """The step that the run goes on from."""
    to_server: list[int]
    """Blocks that left the client."""
    to_client: list[int]
    """Blocks that came to it."""
    bytes_up: int
    """Of frames."""
    bytes_down: int
    """Of frames."""
    seconds: float

    @property
    def is_moved(self) -> bool:
        """False where the cut was there already."""
        return self.old != self.new


@dataclass(frozen=True, kw_only=True)
class Recutter:
    """Everything that a re-cut of one open run needs."""

    settings: ClientSettings
    """With the cut where it now is."""
    folder: ModelFolder
    state: RunState
    link: Link
    """To the server that has the run, at the old cut."""
    connect: Connect
    """Opens one more channel, to ask whether the server takes the new cut."""
    own: OwnModel
    leaves: Mapping[str, str]
    """Manifest leaves of head and tail."""
    room: Callable[[str], int | None] = room_on
    """Memory on a device, in bytes."""

    def move(self, new: Cut, shares: bool) -> RecutReport:
        """Become the run with another cut; refused or broken off, the run is what it was.

        Args:
            new: where to cut.
            shares: the owner accepts that adapters of blocks that leave become visible.

        Raises:
            ConfigError: no trunk would be left, the run's settings forbid it, consent is missing,
                or the new blocks do not fit into memory.
            SpecMismatch: the server does not hold all blocks of the new trunk.
            TransportError: the server stayed away.
        """
        begun_s, sent, received = time.monotonic(), self.link.bytes_sent, self.link.bytes_received
        plan = self._plan(new)
        gate = MovedGate(self.state.privacy.ledger, shares)
        step = max(self.state.saved_steps(), default=0)
        if not plan.is_there:
            arrived = self._checked(plan, gate)
            try:
                self._fork(plan, gate, arrived)
                self.state.finish_recut(new, self._identity(plan, arrived))
            except CutlayerError:
                self.state.forget_recut()
                raise
        return RecutReport(
            run_id=self.state.run_id,
            old=(plan.old.lower, plan.old.upper),
            new=(new.lower, new.upper),
            step=step,
            to_server=plan.to_server,
            to_client=plan.to_client,
            bytes_up=self.link.bytes_sent - sent,
            bytes_down=self.link.bytes_received - received,
            seconds=time.monotonic() - begun_s,
        )

    def _plan(self, new: Cut) -> RecutPlan:
        model = self.settings.model
        here, begun = Cut(model.lower, model.upper), self.state.cut
        if begun is not None and begun != here:
            raise ConfigError(
                f"the settings say model.lower={here.lower}, upper={here.upper}, and the run in "
                f"{self.state.folder} was begun at {begun.lower} and {begun.upper}; put these "
                "back: a re-cut needs no other settings"
            )
        num_blocks = int(self.folder.config.num_hidden_layers)
        return RecutPlan(old=here, new=new, num_blocks=num_blocks)

    def _checked(self, plan: RecutPlan, gate: MovedGate) -> Arrived:
        """Everything that can be refused is, before anything leaves or is written."""
        check_settings(self.settings)
        if self.settings.federation is not None and self.state.has_equal_cuts:
            raise ConfigError(
                f"federation {self.settings.federation.name} has one cut for all members: ask its "
                "operator for federation.mixed_cuts = true, or leave it and train alone"
            )
        adapter = self.settings.adapter
        plan.check_trained(adapter.parts)
        # Or the re-cut would make what these settings name the run's.
        self.state.check(model_identity(self.settings, self.leaves))
        if Part.TRUNK in adapter.parts:
            gate.require_consent(plan.to_server)
        arrived = inspect(self.folder, self.settings.model, adapter, plan.runs_to_client, self.room)
        self._ask_for(plan.new)
        return arrived

    def _ask_for(self, new: Cut) -> None:
        """Whether the server takes this cut: no adapter is shown to one that does not."""
        spec = replace(self.own.spec, lower=new.lower, upper=new.upper)
        own = OwnModel(spec=spec, manifest=self.own.manifest, digest=self.own.digest)
        asking = Link(self.connect, own)
        try:
            asking.hello()
        finally:
            asking.close()

    def _fork(self, plan: RecutPlan, gate: MovedGate, arrived: Arrived) -> None:
        """Make the run with the new cut, at the server and beside the old one here."""
        new_steps = self.state.begin_recut()
        for step in self._kept_steps():
            saved = self.state.load(step)
            is_best = saved.progress.best_step == step
            try:
                weights, moments = self._send(plan, gate, step, saved.tensors, is_best)
            except StepExpired:
                if step > 0 and self.settings.federation is None:
                    raise
                # Nothing was trained, and fresh weights are the same at every cut; or they are a
                # federation's, which are told with the next round.
                self._keep_history(new_steps, saved)
                return
            check_moved(weights, moments, arrived.layout, "server")
            files = plan.files(saved.tensors, weights, moments)
            new_steps.save(saved.progress, files, is_pinned=is_best)

    def _keep_history(self, new_steps: RecutSteps, saved: SavedStep) -> None:
        """Of a member between rounds: a step before, so that the next round's weights are saved."""
        progress = saved.progress
        if progress.step > 0:
            before = msgspec.structs.replace(progress, step=progress.step - 1)
            new_steps.save(before, {}, is_pinned=False)

    def _kept_steps(self) -> list[int]:
        """The best step and the newest one; both sides have saved them."""
        steps = self.state.saved_steps()
        if not steps:
            return []
        best = self.state.load(steps[-1]).progress.best_step
        return sorted({steps[-1], *(step for step in steps if step == best)})

    def _send(
        self,
        plan: RecutPlan,
        gate: MovedGate,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        is_best: bool,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        run_id, new = self.state.run_id, plan.new
        released = gate.release(*plan.leaving(tensors), f"{run_id}.s{step}")
        call = Recut(
            run_id=run_id,
            new_run_id=fork_id(run_id),
            step=step,
            lower=new.lower,
            upper=new.upper,
            pin=is_best,
        )
        reply = self.link.send(Kind.RECUT, call, released.tensors).result()
        return _came(reply, step)

    def _identity(self, plan: RecutPlan, arrived: Arrived) -> dict[str, str]:
        """What the run will be claimed with."""
        here = {**self.leaves, **arrived.leaves}
        gone = {f"block.{block}" for block in plan.to_server}
        leaves = {name: leaf for name, leaf in here.items() if name not in gone}
        return {"model": hash_leaves(leaves)}


def _came(reply: Frame, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if header_of(reply, RecutDone).step != step:
        raise ProtocolError(f"the server moved another step than {step}")
    tensors = {name: decode(packed).clone() for name, packed in reply.tensors.items()}
    found = split_tensors(tensors)
    if found is None:
        raise ProtocolError(f"RECUT_DONE has tensors {sorted(tensors)[:3]}, which it cannot have")
    return found
