"""The enclave as an owner sees it: one method per call, over a link that repeats what is open.

Only `Released` tensors can be sent, and labels only where they may leave. It does not compute or
decide what to do when rows, a step or a session are lost: those errors reach the caller.

Shapes: N = tokens of all rows of a call, D = hidden size, S = wanted places, V = vocabulary.
"""

from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from cutlayer.client.far_rows import FarRows, SessionRows
from cutlayer.client.link import Link, PendingCall, header_of
from cutlayer.client.remote_trunk import RemoteTrunk, required_sq_norm
from cutlayer.client.returned import ReturnChecks
from cutlayer.client.settings import CheckSettings
from cutlayer.errors import ProtocolError
from cutlayer.privacy.boundary import Released
from cutlayer.privacy.history import ReleasedHistory
from cutlayer.wire.codec import decode
from cutlayer.wire.enclave_messages import (
    AskRows,
    DecodeLogits,
    LearnLogits,
    LogitsLearnt,
    PutRows,
    RowsMissing,
    RowsPut,
    RowsScored,
    ScoreRows,
)
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Kind

__all__ = ["LogitsCall", "RemoteEnclave", "learnt_sq_norm"]


class LogitsCall(PendingCall):
    """A call in flight whose reply has logits: another shape than what was sent."""

    def __init__(self, call: PendingCall, num_places: int, vocab_size: int) -> None:
        """
        Args:
            call: the call itself.
            num_places: S.
            vocab_size: V.
        """
        self._call, self._shape = call, (num_places, vocab_size)

    @property
    def future(self) -> "Future[Frame]":  # type: ignore[override]  # it changes with repeats
        """Of the call, as it was last sent."""
        return self._call.future

    def result(self) -> Frame:
        """See `PendingCall.result`."""
        return self._call.result()

    def forget(self) -> None:
        """See `PendingCall.forget`."""
        self._call.forget()

    def tensor(self, name: str) -> Tensor:
        """The logits [S, V], float32, under whatever name they are asked for."""
        packed = self.result().tensors.get("logits")
        came = (0, self._shape[1]) if packed is None else packed.shape
        if came != self._shape:
            raise ProtocolError(f"the enclave sent {name} of shape {came}, wanted {self._shape}")
        if packed is None:
            return torch.zeros(self._shape)
        return decode(packed).float()


class RemoteEnclave(RemoteTrunk):
    """The enclave's calls over one link; used from one thread."""

    def __init__(self, link: Link, vocab_size: int) -> None:
        """
        Args:
            link: to the enclave.
            vocab_size: V.
        """
        # What an attested enclave computes is what was measured; no profile is kept of it.
        super().__init__(link, ReturnChecks(CheckSettings(profile=False)))
        self._vocab_size = vocab_size

    def missing(self, call: AskRows) -> list[int]:
        """Rows that have to be put."""
        reply = header_of(self._link.send(Kind.ASK_ROWS, call).result(), RowsMissing)
        if not set(reply.row_ids) <= set(call.row_ids):
            raise ProtocolError("the enclave asks for rows that nobody spoke of")
        return reply.row_ids

    def put(self, released: Released, call: PutRows) -> PendingCall:
        """Put rows; `require_put` tells whether they are there."""
        return self._link.send(Kind.PUT_ROWS, call, {"h": released.packed})

    def require_put(self, call: PendingCall) -> int:
        """Wait for `put`; the bytes that the enclave now holds of this owner.

        Raises:
            CacheFull: there is no room for them; says what to do.
        """
        return header_of(call.result(), RowsPut).held_bytes

    def score(self, call: ScoreRows, num_places: int) -> LogitsCall:
        """Compute rows that are there; without a loss inside, the reply has logits [S, V]."""
        sent = self._link.send(Kind.SCORE_ROWS, call)
        return LogitsCall(sent, num_places, self._vocab_size)

    def learn(self, released: Released | None, call: LearnLogits) -> PendingCall:
        """Send the gradient at a micro-batch's logits; None where it had no scored place."""
        tensors = {} if released is None else {"grad": released.packed}
        return self._link.send(Kind.LEARN_LOGITS, call, tensors)

    def session_rows(self, run_id: str | None, step: int | None, version: str) -> SessionRows:
        """See `RemoteTrunk.session_rows`."""
        return _EnclaveRows(self, run_id, step)

    def decode(
        self,
        released: Released,
        session_id: str,
        rows: Sequence[int],
        max_lengths: Sequence[int] = (),
    ) -> LogitsCall:
        """Send vectors of some rows without wanting logits: what is cached again after a loss."""
        return self.decode_logits(released, session_id, rows, max_lengths, [0] * len(rows))

    def decode_logits(
        self,
        released: Released,
        session_id: str,
        rows: Sequence[int],
        max_lengths: Sequence[int],
        num_logits: Sequence[int],
    ) -> LogitsCall:
        """Send vectors of some rows; the reply has logits [S, V].

        Args:
            released: what follows the rows' cached vectors.
            session_id: from `open_session`.
            rows: numbers of the rows, ascending.
            max_lengths: token limits of rows that are to be opened, 0 for others; none for none.
            num_logits: per row, after how many of its last tokens logits are wanted.
        """
        call = DecodeLogits(
            session_id=session_id,
            rows=list(rows),
            lengths=list(released.rows.lengths),
            positions=list(released.rows.starts),
            max_lengths=list(max_lengths),
            num_logits=list(num_logits),
        )
        sent = self._link.send(Kind.DECODE_LOGITS, call, {"h": released.packed})
        return LogitsCall(sent, sum(num_logits), self._vocab_size)

    def check(
        self,
        released: Released,
        y_ND: Tensor,
        past: Sequence[ReleasedHistory],
        run_id: str | None,
        step: int | None,
    ) -> None:
        """Nothing: what computes was attested, and nobody here could compute it again."""


class _EnclaveRows(FarRows):
    """Rows that are answered with logits of their last places."""

    def __init__(self, enclave: RemoteEnclave, run_id: str | None, step: int | None) -> None:
        super().__init__(enclave, run_id, step)
        self._enclave = enclave

    def _ask(
        self,
        released: Released,
        session_id: str,
        rows: Sequence[int],
        max_lengths: Sequence[int],
        num_logits: Sequence[int],
    ) -> LogitsCall:
        return self._enclave.decode_logits(released, session_id, rows, max_lengths, num_logits)


def learnt_sq_norm(reply: Frame) -> float:
    """The squared gradient norm from the reply that ends a step's last micro-batch."""
    header = reply.header
    sent = header.sq_norm if isinstance(header, LogitsLearnt | RowsScored) else None
    return required_sq_norm(sent, "the enclave")
