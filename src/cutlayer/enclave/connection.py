"""One owner's connection to an enclave: what a trunk server answers, and rows, logits, gradients.

It does not compute (`desk`, `server.host`). Handshake, rights, quota, runs, sessions and rounds are
those of `server.connection`, which this one extends; hidden states of a trunk are refused here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from cutlayer.enclave.desk import EnclaveDesk
from cutlayer.enclave.row_store import HeldRow, RowSet
from cutlayer.errors import PermissionRefused, ProtocolError
from cutlayer.server.batches import JointWork, TrunkCall, TrunkResult
from cutlayer.server.connection import ClientConnection, ServerDesk
from cutlayer.server.federation_calls import FEDERATION_KINDS
from cutlayer.server.scheduler import WorkKind
from cutlayer.wire.channel import Peer
from cutlayer.wire.codec import decode
from cutlayer.wire.enclave_messages import (
    AskRows,
    DecodeLogits,
    LearnLogits,
    Logits,
    LogitsLearnt,
    PutRows,
    RowsMissing,
    RowsPut,
    RowsScored,
    ScoreRows,
)
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import Backward, Decode, Kind

__all__ = ["EnclaveConnection"]

H = TypeVar("H", bound=Header)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OF_A_TRUNK = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.DECODE})


@dataclass(frozen=True)
class _Rule:
    role: str
    tensor: str | None
    """Name of the tensor that comes along; LEARN_LOGITS may come without."""
    start: "Callable[[EnclaveConnection, Frame], Future[Frame]]"


class EnclaveConnection(ClientConnection):
    """Implements `wire.channel.Connection` for one owner."""

    def __init__(self, peer: Peer, desk: ServerDesk, inside: EnclaveDesk) -> None:
        """
        Args:
            peer: the owner.
            desk: as every server's connections have it.
            inside: rows and the LM head.
        """
        super().__init__(peer, desk)
        self._inside = inside
        inside.rows.sweep(inside.clock())

    def submit(self, frame: Frame) -> "Future[Frame]":
        """Start answering a frame; see `ClientConnection.submit`."""
        if frame.kind in _OF_A_TRUNK:
            raise ProtocolError(
                f"{frame.kind.name} is for a trunk server; this is an enclave, which holds all "
                "later blocks: use `cutlayer enclave train` and its settings"
            )
        if frame.kind in FEDERATION_KINDS and self._federation is None:
            raise ProtocolError(
                f"{frame.kind.name}: this enclave has no [rounds]; remove that section from the "
                "owner's settings, or ask the operator"
            )
        rule = _RULES.get(frame.kind)
        if rule is None:
            return super().submit(frame)
        if self._spec is None:
            raise ProtocolError(f"{frame.kind.name} before HELLO; the handshake comes first")
        # Raises where this owner has to prove what it runs first.
        self._attestation.answer(frame)
        num_bytes = sum(packed.num_bytes for packed in frame.tensors.values())
        self._metrics.bytes.labels("up").inc(num_bytes)
        self._require(rule.role)
        if not set(frame.tensors) <= {rule.tensor}:
            raise ProtocolError(
                f"{frame.kind.name} carries tensors {sorted(frame.tensors)[:3]}, not {rule.tensor}"
            )
        self._quota.charge(self._peer.name, num_bytes)
        return self._kept(frame.kind, rule.start(self, frame))

    def close(self) -> None:
        """See `ClientConnection.close`; rows outlive it, for a while."""
        super().close()
        self._inside.rows.sweep(self._inside.clock())

    def _ask(self, frame: Frame) -> "Future[Frame]":
        call = _header(frame, AskRows)
        missing = self._inside.rows.missing(self._set(call), call.row_ids, self._inside.clock())
        return self._now(Kind.ROWS_MISSING, RowsMissing(row_ids=missing))

    def _put(self, frame: Frame) -> "Future[Frame]":
        call = _header(frame, PutRows)
        _check_rows(call, self._inside.part.vocab_size)
        if call.targets and not self._inside.takes_labels:
            raise PermissionRefused(
                "this server proves nothing and was not set to take labels (shared_labels): keep "
                'them with labels = "client", or ask its operator'
            )
        self._check_hidden(frame, call.lengths)
        rows = _held_rows(call, _kept_form(frame))
        held = self._inside.rows.put(self._set(call), rows, self._inside.clock())
        return self._now(Kind.ROWS_PUT, RowsPut(held_bytes=held))

    def _score(self, frame: Frame) -> "Future[Frame]":
        call, inside, owner = _header(frame, ScoreRows), self._inside, self._peer.name
        if not call.row_ids:
            raise ProtocolError("SCORE_ROWS without rows")
        rows = inside.rows.get(self._set(call), call.row_ids, inside.clock())
        num_tokens = sum(len(row.h_LD) for row in rows)
        self._require_room(num_tokens)
        if not call.has_loss_inside:
            self._require_logits(sum(len(row.places) for row in rows))

        def finish(result: TrunkResult) -> Frame:
            assert result.tensor is not None
            scored = inside.scored(owner, call, rows, result.tensor)
            header = RowsScored(
                step=call.step, micro=call.micro, loss_sum=scored.loss_sum, sq_norm=scored.sq_norm
            )
            return self._packed(Kind.ROWS_SCORED, header, _named("logits", scored.logits_SV))

        return self._joint(
            frame,
            num_tokens,
            JointWork(
                kind=WorkKind.EVALUATE if call.is_evaluation else WorkKind.FORWARD,
                prepare=lambda: inside.forward_call(owner, call, rows),
                compute=self._host.run_together,
                finish=finish,
            ),
        )

    def _learn(self, frame: Frame) -> "Future[Frame]":
        call, inside, owner = _header(frame, LearnLogits), self._inside, self._peer.name
        header = Backward(
            run_id=call.run_id, step=call.step, micro=call.micro, is_last=call.is_last
        )

        def prepare() -> TrunkCall:
            packed = frame.tensors.get("grad")
            grad_SV = None if packed is None else decode(packed).float()
            return inside.backward_call(owner, call, grad_SV)

        def finish(result: TrunkResult) -> Frame:
            sq_norm = result.trunk_sq_norm
            learnt = LogitsLearnt(step=call.step, micro=call.micro, sq_norm=sq_norm)
            return self._packed(Kind.LOGITS_LEARNT, learnt, {})

        return self._joint(
            frame,
            inside.num_tokens(owner, call),
            JointWork(
                kind=WorkKind.BACKWARD,
                prepare=prepare,
                compute=self._host.run_together,
                finish=finish,
                joint=lambda: self._host.joint_of(owner, header),
            ),
        )

    def _decode(self, frame: Frame) -> "Future[Frame]":
        call, inside, owner = _header(frame, DecodeLogits), self._inside, self._peer.name
        if len(call.num_logits) != len(call.lengths) or not all(
            0 <= wanted <= length
            for wanted, length in zip(call.num_logits, call.lengths, strict=False)
        ):
            raise ProtocolError("num_logits of DECODE_LOGITS does not fit its lengths")
        header = Decode(
            session_id=call.session_id,
            rows=call.rows,
            lengths=call.lengths,
            positions=call.positions,
            max_lengths=call.max_lengths,
        )
        self._check_hidden(frame, call.lengths)
        self._require_logits(sum(call.num_logits))

        def finish(result: TrunkResult) -> Frame:
            assert result.tensor is not None
            found = inside.logits_of(result.tensor, call.lengths, call.num_logits)
            return self._packed(Kind.LOGITS, Logits(), _named("logits", found))

        return self._joint(
            frame,
            sum(call.lengths),
            JointWork(
                kind=WorkKind.DECODE,
                prepare=lambda: TrunkCall(
                    owner=owner, header=header, tensor=decode(frame.tensors["h"]).float()
                ),
                compute=self._host.run_together,
                finish=finish,
                abandon=lambda: self._host.abandon(owner, header),
            ),
        )

    def _joint(self, frame: Frame, num_tokens: int, work: JointWork[Frame]) -> "Future[Frame]":
        # Each of these answers tells of the weights inside, so vectors count as often as they do.
        self._quota.charge(self._peer.name, 0, num_tokens)
        self._metrics.tokens.labels(frame.kind.name).inc(num_tokens)
        return self._runner.submit(self._peer.name, num_tokens, work)

    def _now(self, kind: Kind, header: Header) -> "Future[Frame]":
        future: Future[Frame] = Future()
        future.set_result(Frame(kind=kind, header=header))
        return future

    def _set(self, call: AskRows | PutRows | ScoreRows) -> RowSet:
        if not _NAME.fullmatch(call.row_set) or not _DIGEST.fullmatch(call.front):
            raise ProtocolError("row_set is no plain name, or front is no SHA-256 in hex")
        return RowSet(owner=self._peer.name, row_set=call.row_set, front=call.front)

    def _check_hidden(self, frame: Frame, lengths: list[int]) -> None:
        """Refuse vectors that do not fit their rows, by what the tensor claims."""
        shape = frame.tensors["h"].shape if "h" in frame.tensors else ()
        wanted = (sum(lengths), self._inside.part.hidden_size)
        if shape != wanted or min(lengths, default=0) < 1:
            raise ProtocolError(f"{frame.kind.name} has a tensor {shape}, its rows say {wanted}")
        self._require_room(wanted[0])

    def _require_room(self, num_tokens: int) -> None:
        if num_tokens > self._host.max_call_tokens:
            raise ProtocolError(
                f"a call of {num_tokens} tokens; this enclave takes {self._host.max_call_tokens}: "
                "lower train.micro_batch_rows or train.micro_batch_tokens"
            )

    def _require_logits(self, num_places: int) -> None:
        """Refuse what no frame could carry, before it fills the memory of all owners."""
        num_values, most = num_places * self._inside.part.vocab_size, self._inside.max_logits
        if num_values > most:
            raise ProtocolError(
                f"the logits of {num_places} places are {num_values} values; this enclave's frames "
                f"hold {most} (listen.max_frame_bytes): lower train.micro_batch_rows or "
                'train.micro_batch_tokens, or set labels = "enclave"'
            )


_RULES: Mapping[Kind, _Rule] = {
    Kind.ASK_ROWS: _Rule("train", None, EnclaveConnection._ask),
    Kind.PUT_ROWS: _Rule("train", "h", EnclaveConnection._put),
    Kind.SCORE_ROWS: _Rule("train", None, EnclaveConnection._score),
    Kind.LEARN_LOGITS: _Rule("train", "grad", EnclaveConnection._learn),
    Kind.DECODE_LOGITS: _Rule("generate", "h", EnclaveConnection._decode),
}


def _kept_form(frame: Frame) -> Tensor:
    """The activations as they are kept: bf16 loses nothing of what came as bf16."""
    packed = frame.tensors["h"]
    h_ND = decode(packed)
    return h_ND.to(torch.bfloat16) if packed.codec == "bf16" else h_ND


def _held_rows(call: PutRows, h_ND: Tensor) -> dict[int, HeldRow]:
    targets: Sequence[tuple[int, ...] | None] = [tuple(row) for row in call.targets]
    targets = targets or [None] * len(call.row_ids)
    pieces = zip(call.row_ids, h_ND.split(call.lengths), call.places, targets, strict=True)
    return {
        # Copied: a view would keep the whole frame, and its neighbours, in memory.
        row_id: HeldRow(h_LD=h_LD.clone(), places=tuple(places), targets=wanted)
        for row_id, h_LD, places, wanted in pieces
    }


def _check_rows(call: PutRows, vocab_size: int) -> None:
    """Refuse numbers that do not fit together.

    Raises:
        ProtocolError: says which; never a value.
    """
    num_rows = len(call.row_ids)
    if not num_rows == len(call.lengths) == len(call.places) or not num_rows:
        raise ProtocolError("row_ids, lengths and places of PUT_ROWS differ in number")
    if len(set(call.row_ids)) != num_rows or min(call.row_ids) < 0:
        raise ProtocolError("PUT_ROWS has a row twice, or a negative row id")
    for places, length in zip(call.places, call.lengths, strict=True):
        inside = not places or (places[0] >= 0 and places[-1] < length - 1)
        if not inside or any(a >= b for a, b in pairwise(places)):
            raise ProtocolError("places of PUT_ROWS are not ascending, or beyond their row")
    if not call.targets:
        return
    fits = len(call.targets) == num_rows and all(
        len(wanted) == len(places) and all(0 <= token < vocab_size for token in wanted)
        for wanted, places in zip(call.targets, call.places, strict=False)
    )
    if not fits:
        raise ProtocolError("targets of PUT_ROWS do not fit its places or the vocabulary")


def _named(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    return {} if tensor is None or not len(tensor) else {name: tensor}


def _header(frame: Frame, kind: type[H]) -> H:
    assert isinstance(frame.header, kind)
    return frame.header
