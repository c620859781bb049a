"""Generation over an enclave: vectors of the front go in, logits of the last places come back.

Rows and undoing are `client.session`'s, replays `client.far_rows`', streams and sampling
`client.decoder`'s: this is only what differs where the tail is not here.
"""

from torch import Tensor

from cutlayer.client.generate import Generator
from cutlayer.client.session import GenerationSession, Pending

__all__ = ["EnclaveGenerator", "EnclaveSession"]


class EnclaveSession(GenerationSession):
    """Rows whose later blocks, with their caches, are in the enclave."""

    def _tail(self, pending: Pending, y_ND: Tensor) -> Tensor:
        """The reply is what the tail would have made."""
        return y_ND


class EnclaveGenerator(Generator):
    """One front and one adapter inside, ready to generate."""

    def session(self) -> EnclaveSession:
        """Rows with caches here and inside, for whoever wants the logits themselves."""
        return EnclaveSession(self._model)
