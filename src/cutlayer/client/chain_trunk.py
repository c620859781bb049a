"""Several trunks in a row as one: what training and generation ask of a trunk, asked of each hop.

The client stands between the hops: what one returns is checked, passes the gate of the next, and
goes there. One training call is in `chain_calls`, rows of generation are in `chain_rows`.
"""

from collections.abc import Sequence
from typing import Never

import msgspec

from cutlayer.client.attested import Attestation
from cutlayer.client.chain_calls import ChainBackward, ChainForward, ChainHop
from cutlayer.client.chain_checks import ChainChecks
from cutlayer.client.chain_flow import CallFlow
from cutlayer.client.chain_rows import ChainRows
from cutlayer.client.far_rows import SessionRows
from cutlayer.client.link import PendingCall
from cutlayer.client.remote_trunk import CallNames, RemoteTrunk
from cutlayer.errors import ProtocolError
from cutlayer.model.adapters import AdapterState
from cutlayer.privacy.boundary import Released
from cutlayer.wire.messages import Backward, Forward, OpenRun, Step, Welcome

__all__ = ["ChainTrunk"]


class ChainTrunk(RemoteTrunk):
    """Two hops or more; used from one thread."""

    def __init__(self, hops: Sequence[ChainHop], trunk_trains: bool) -> None:
        """
        Args:
            hops: the lowest first.
            trunk_trains: whether the hops have adapters, so that gradients go through all of them.
        """
        assert len(hops) > 1
        self._hops = tuple(hops)
        self._trunk_trains = trunk_trains
        self._clips = False
        self._flow = CallFlow()
        self._sq_norms: tuple[int, Sequence[float]] = (0, ())
        self._chain_checks = ChainChecks([hop.trunk.checks for hop in hops])
        self.checks = self._chain_checks

    @property
    def hops(self) -> tuple[RemoteTrunk, ...]:
        """The trunks, the lowest first."""
        return tuple(hop.trunk for hop in self._hops)

    @property
    def proofs(self) -> tuple[Attestation | None, ...]:
        """What the hops after the first must prove."""
        return tuple(hop.proof for hop in self._hops[1:])

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent to all hops."""
        return sum(trunk.bytes_sent for trunk in self.hops)

    @property
    def bytes_received(self) -> int:
        """Bytes of frames received from all hops."""
        return sum(trunk.bytes_received for trunk in self.hops)

    def hello(self) -> Welcome:
        """Connect to every hop; the first one's answer."""
        first, *_ = [trunk.hello() for trunk in self.hops]
        return first

    def open_run(self, call: OpenRun) -> int:
        """The newest step that the client and all hops have, where the run now stands at each.

        Raises:
            ProtocolError: a hop went to a step that it was not offered.
            StepExpired: a hop has no step in common with the others.
        """
        self.checks.require_trust()
        self._flow.clear()
        self._clips, self._sq_norms = call.clip_norm is not None, (0, ())
        common, reached = call.saved_steps, list[int]()
        # A hop may hold less than those before it: they are then brought back to where it stands.
        while len(set(reached)) != 1:
            reached = []
            for number, trunk in enumerate(self.hops):
                opened = msgspec.structs.replace(
                    call, saved_steps=common, wants_input_grad=self._wants_grad(number, call)
                )
                step = trunk.open_run(opened)
                if step not in common:
                    raise ProtocolError(f"hop {number + 1} went to step {step}, offered: {common}")
                common = [saved for saved in common if saved <= step]
                reached.append(step)
        return reached[0]

    def forward(
        self, released: Released, call: Forward, names: CallNames | None = None
    ) -> PendingCall:
        """Send a micro-batch up through all hops; the reply's tensor `y` is [N, D]."""
        assert names is not None
        self.checks.require_trust()
        calls = [
            msgspec.structs.replace(call, commit=self._told(call.commit, number))
            for number in range(len(self._hops))
        ]
        return ChainForward(self._hops, released, calls, names, self._flow)

    def backward(
        self, released: Released, call: Backward, names: CallNames | None = None
    ) -> PendingCall:
        """Send a gradient down through all hops; the reply has the norm of all of them."""
        assert names is not None
        self.checks.require_trust()
        return ChainBackward(self._hops, released, call, names, self._flow, self._note_norms)

    def save(self, run_id: str, step: int, finished: Step | None, pin: bool) -> None:
        """Have every hop finish and save `step`."""
        for number, trunk in enumerate(self.hops):
            trunk.save(run_id, step, self._told(finished, number), pin)

    def finish(self, run_id: str, step: int, finished: Step | None) -> None:
        """Have every hop finish `step` without saving it."""
        for number, trunk in enumerate(self.hops):
            trunk.finish(run_id, step, self._told(finished, number))

    def pull_adapter(self, run_id: str, step: int) -> AdapterState:
        """The adapters of all hops together."""
        declared = [trunk.pull_adapter(run_id, step) for trunk in self.hops]
        self._chain_checks.declared = declared
        return {key: tensor for state in declared for key, tensor in state.items()}

    def session_rows(self, run_id: str | None, step: int | None, version: str) -> SessionRows:
        """See `RemoteTrunk.session_rows`."""
        rows = [trunk.session_rows(run_id, step, version) for trunk in self.hops]
        later = self._hops[1:]
        limit = later[0].max_session_vectors
        return ChainRows(rows, [hop.generation for hop in later], version, limit)

    def open_session(
        self, max_lengths: Sequence[int], run_id: str | None, step: int | None
    ) -> Never:
        """Not here: each hop has a session of its own, see `session_rows`."""
        raise AssertionError("sessions of a chain are its hops'")

    def decode(
        self,
        released: Released,
        session_id: str,
        rows: Sequence[int],
        max_lengths: Sequence[int] = (),
    ) -> Never:
        """Not here: see `session_rows`."""
        raise AssertionError("rows of a chain are its hops'")

    def interrupt(self) -> None:
        """See `RemoteTrunk.interrupt`."""
        for trunk in self.hops:
            trunk.interrupt()

    def resume(self) -> None:
        """See `RemoteTrunk.resume`."""
        for trunk in self.hops:
            trunk.resume()

    def close(self) -> None:
        """End all connections."""
        for trunk in self.hops:
            trunk.close()

    def _note_norms(self, step: int, sq_norms: Sequence[float]) -> None:
        # What each hop's gradients come to, for the clip of the others.
        self._sq_norms = (step, tuple(sq_norms))

    def _wants_grad(self, number: int, call: OpenRun) -> bool:
        """Whether something before this hop trains."""
        return call.wants_input_grad or (number > 0 and self._trunk_trains)

    def _told(self, finished: Step | None, number: int) -> Step | None:
        """A commit as one hop needs it: all parts clip by the norm of all."""
        if finished is None or not self._clips:
            return finished
        step, sq_norms = self._sq_norms
        if step != finished.step:
            return finished
        others = sum(norm for other, norm in enumerate(sq_norms) if other != number)
        return msgspec.structs.replace(finished, client_sq_norm=finished.client_sq_norm + others)
