"""Generation over an enclave: vectors of the front go in, logits of the last places come back.

Rows, replays and undoing are `client.session`'s, streams and sampling `client.decoder`'s: this is
only what differs where the tail is not here.

Shapes: N = new tokens of all rows of a call, S = places whose logits are wanted, V = vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from cutlayer.client.generate import Generator
from cutlayer.client.session import Feed, GenerationSession, Pending, SplitModel
from cutlayer.client.settings import GenerationSettings
from cutlayer.enclave.remote import LogitsCall, RemoteEnclave
from cutlayer.privacy.boundary import Released

__all__ = ["EnclaveGenerator", "EnclaveSession"]


class EnclaveSession(GenerationSession):
    """Rows whose later blocks, with their caches, are in the enclave."""

    def __init__(self, model: SplitModel, enclave: RemoteEnclave) -> None:
        """Nothing is sent before the first call.

        Args:
            model: the front and the gate; its tail is never called.
            enclave: the same that the model has as its trunk.
        """
        super().__init__(model)
        self._enclave = enclave

    def _send(self, feeds: Sequence[Feed], released: Released) -> LogitsCall:
        numbers = [feed.row for feed in feeds]
        session_id, limits = self._opened(), self._limits(numbers)
        wanted = [feed.num_logits for feed in feeds]
        return self._enclave.decode_logits(released, session_id, numbers, limits, wanted)

    def _tail(self, pending: Pending, y_ND: Tensor) -> Tensor:
        """The reply is what the tail would have made."""
        for feed in pending.feeds:
            self._rows[feed.row].is_open = True
        return y_ND


class EnclaveGenerator(Generator):
    """One front and one adapter inside, ready to generate."""

    def __init__(
        self,
        model: SplitModel,
        enclave: RemoteEnclave,
        settings: GenerationSettings,
        context_length: int,
    ) -> None:
        """
        Args:
            model: as `EnclaveSession`.
            enclave: as `EnclaveSession`.
            settings: how streams share.
            context_length: tokens of a row at most.
        """
        super().__init__(model, settings, context_length)
        self._enclave = enclave

    def session(self) -> EnclaveSession:
        """Rows with caches here and inside, for whoever wants the logits themselves."""
        return EnclaveSession(self._model, self._enclave)
