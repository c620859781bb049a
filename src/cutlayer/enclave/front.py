"""Trunk servers between an owner's blocks and the enclave's, frozen: hidden states go through them.

It does not train them: what they compute of a row never changes, so each row goes through once
(`feeding`). Rows of generation are `client.chain_rows`'.

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

from collections.abc import Sequence

from torch import Tensor

from cutlayer.client.chain_calls import ChainHop
from cutlayer.client.chain_checks import ChainChecks
from cutlayer.client.chain_rows import ChainRows
from cutlayer.client.far_rows import SessionRows
from cutlayer.client.link import Link
from cutlayer.enclave.remote import RemoteEnclave
from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Boundary

__all__ = ["EnclaveChain", "FrontHops"]


class FrontHops:
    """The servers in the middle, the lowest first; used from one thread."""

    def __init__(self, hops: Sequence[ChainHop]) -> None:
        """
        Args:
            hops: with their gates.
        """
        self.hops = tuple(hops)

    def through(self, h_ND: Tensor, rows: Rows, names: Sequence[str], version: str) -> Tensor:
        """Whole rows through all servers.

        Args:
            h_ND: what the owner's blocks make of them.
            rows: their layout, from position 0.
            names: their identifiers, for the gates.
            version: identifier of the owner's blocks.

        Returns:
            What the last server makes of them [N, D].
        """
        for hop in self.hops:
            _, released = hop.training.activations.release(h_ND, rows, names, version)
            far = hop.trunk.session_rows(None, None, version)
            numbers = range(rows.num_rows)
            try:
                for number, length in zip(numbers, rows.lengths, strict=True):
                    far.open_row(number, length)
                h_ND = far.finish(far.begin(released, numbers, [0] * rows.num_rows))
            finally:
                far.close()
        return h_ND


class EnclaveChain(RemoteEnclave):
    """An enclave behind servers in the middle, as one other side."""

    def __init__(self, link: Link, vocab_size: int, front: FrontHops, gate: Boundary) -> None:
        """
        Args:
            link: to the enclave.
            vocab_size: V.
            front: the servers before it.
            gate: of a generation, in front of the enclave.
        """
        super().__init__(link, vocab_size)
        self._trunks = [hop.trunk for hop in front.hops]
        self._gates = [*(hop.generation for hop in front.hops[1:]), gate]
        self.checks = ChainChecks([*(trunk.checks for trunk in self._trunks), self.checks])

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent to all of them."""
        return super().bytes_sent + sum(trunk.bytes_sent for trunk in self._trunks)

    @property
    def bytes_received(self) -> int:
        """Bytes of frames received from all of them."""
        return super().bytes_received + sum(trunk.bytes_received for trunk in self._trunks)

    def session_rows(self, run_id: str | None, step: int | None, version: str) -> SessionRows:
        """See `RemoteTrunk.session_rows`; the servers in the middle compute as the base model."""
        middle = [trunk.session_rows(None, None, version) for trunk in self._trunks]
        inside = super().session_rows(run_id, step, version)
        return ChainRows([*middle, inside], self._gates, version)

    def interrupt(self) -> None:
        """See `RemoteTrunk.interrupt`."""
        for trunk in self._trunks:
            trunk.interrupt()
        super().interrupt()

    def resume(self) -> None:
        """See `RemoteTrunk.resume`."""
        for trunk in self._trunks:
            trunk.resume()
        super().resume()

    def close(self) -> None:
        """End all connections."""
        for trunk in self._trunks:
            trunk.close()
        super().close()
