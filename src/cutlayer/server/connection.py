"""One client's connection: handshake, rights, quota; frames to calls, results to frames.

It does not compute (`host`, on the runner thread) nor touch sockets (`wire`).
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cutlayer.errors import PermissionRefused, ProtocolError
from cutlayer.federation.cuts import Greeting
from cutlayer.metrics import ServerMetrics
from cutlayer.model.cut import Cut
from cutlayer.server.attestation import ServerAttestation, peer_attestation
from cutlayer.server.audit import Audit
from cutlayer.server.batches import JointWork, TrunkCall, TrunkResult, work_kind
from cutlayer.server.federation_calls import FEDERATION_KINDS, FederationCalls, start_call
from cutlayer.server.handshake import ServedModel, agree_on
from cutlayer.server.host import TrunkHost
from cutlayer.server.quota import DailyQuota
from cutlayer.server.recut import Moved
from cutlayer.server.runner import Runner
from cutlayer.storage.audit_log import AuditEvent
from cutlayer.tee.private_model.label import What
from cutlayer.tee.private_model.source import ExportGate
from cutlayer.wire.channel import Peer
from cutlayer.wire.codec import decode, get_codec
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import (
    Backward,
    BackwardDone,
    CloseSession,
    Commit,
    Committed,
    Decode,
    Decoded,
    Forward,
    ForwardDone,
    Header,
    Hello,
    Kind,
    OpenRun,
    OpenSession,
    PullAdapter,
    RunOpened,
    SessionClosed,
    SessionOpened,
    TrunkAdapter,
)
from cutlayer.wire.recut_messages import Recut, RecutDone, named_tensors, split_tensors
from cutlayer.wire.spec import Spec

__all__ = ["ClientConnection", "ServerDesk"]

H = TypeVar("H", bound=Header)
_ADAPTERS = (Kind.TRUNK_ADAPTER, Kind.RECUT_DONE)
Reply = tuple[Kind, Header, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ServerDesk:
    """What all connections of a server share."""

    model: ServedModel
    host: TrunkHost
    runner: Runner
    quota: DailyQuota
    audit: Audit
    metrics: ServerMetrics
    federation: FederationCalls | None
    attestation: ServerAttestation | None = None
    exports: ExportGate


@dataclass(frozen=True)
class _Rule:
    """How one frame kind is answered."""

    role: str
    tensor: str | None
    """Name of the tensor that must come along."""
    answer: "Callable[[ClientConnection, Frame], Reply] | None"
    """Bookkeeping, which runs alone; or"""
    join: "Callable[[Frame, TrunkResult], Reply] | None" = None
    """what to answer with the result of a call that may be shared."""


class ClientConnection:
    """Implements `wire.channel.Connection` for one peer."""

    def __init__(
        self,
        peer: Peer,
        desk: ServerDesk,
    ) -> None:
        self._peer = peer
        self._federation = desk.federation
        self._model = desk.model
        self._host = desk.host
        self._runner = desk.runner
        self._quota = desk.quota
        self._audit = desk.audit
        self._metrics = desk.metrics
        self._exports = desk.exports
        self._root = ""
        self._cut: Cut | None = None
        self._greeting: Greeting | None = None
        self._attestation = peer_attestation(desk.attestation, peer)
        self._futures: set[Future[Frame]] = set()
        self._spec: Spec | None = None
        self._runner.arrive(peer.name)

    def submit(self, frame: Frame) -> "Future[Frame]":
        """Start answering a frame; the future fails with one of our errors.

        Raises:
            ProtocolError: a kind that a client does not send, or a call before HELLO.
            PermissionRefused: the certificate lacks the role, or the day's quota is used up.
            AttestationError: the client has to prove what it runs first.
        """
        if isinstance(frame.header, Hello):
            return _done(self._welcome(frame.header))
        if self._spec is None:
            raise ProtocolError(f"{frame.kind.name} before HELLO; the handshake comes first")
        shown = self._attestation.answer(frame)
        if shown is not None:
            return _done(shown)
        self._metrics.bytes.labels("up").inc(_num_bytes(frame))
        if frame.kind in FEDERATION_KINDS:
            call = start_call(
                self._federation, self._peer, frame, self._quota, self._audit, self._greeting
            )
            return self._kept(frame.kind, call)
        rule = _RULES.get(frame.kind)
        if rule is None:
            raise ProtocolError(f"{frame.kind.name} is not for a server")
        self._require(rule.role)
        brings_adapter = frame.kind is Kind.RECUT
        num_tokens = 0 if brings_adapter else self._checked_tokens(frame, rule.tensor)
        self._quota.charge(self._peer.name, _num_bytes(frame), num_tokens)
        self._metrics.tokens.labels(frame.kind.name).inc(num_tokens)
        future = self._runner.submit(self._peer.name, num_tokens, self._work(rule, frame))
        return self._kept(frame.kind, future)

    def close(self) -> None:
        """The stream ended. Runs and sessions outlive it: the client may come back."""
        for future in list(self._futures):
            future.cancel()
        self._runner.leave(self._peer.name)
        if self._spec is not None and self._federation is not None:
            self._federation.lost(self._peer)
        self._audit.record(AuditEvent.DISCONNECTED, self._peer)

    def _kept(self, kind: Kind, future: "Future[Frame]") -> "Future[Frame]":
        """Counted when it is done, cancelled when the connection ends."""
        arrived_s = time.monotonic()
        self._futures.add(future)
        future.add_done_callback(lambda done: self._count(kind, arrived_s, done))
        return future

    def _count(self, kind: Kind, arrived_s: float, done: "Future[Frame]") -> None:
        self._futures.discard(done)
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._metrics.bytes.labels("down").inc(_num_bytes(done.result()))
        outcome = "ok" if error is None else type(error).__name__
        self._metrics.calls.labels(kind.name, outcome).inc()
        self._metrics.seconds.labels(kind.name).observe(time.monotonic() - arrived_s)

    def _work(self, rule: _Rule, frame: Frame) -> Callable[[], Frame] | JointWork[Frame]:
        """What the runner's thread is to do; only a joint answer may share a call of the trunk."""
        answer, join = rule.answer, rule.join
        if join is None:
            assert answer is not None
            return lambda: self._packed(*answer(self, frame))
        return JointWork(
            kind=work_kind(frame.header),
            prepare=lambda: self._trunk_call(rule, frame),
            compute=self._host.run_together,
            finish=lambda result: self._packed(*join(frame, result)),
            joint=lambda: self._host.joint_of(self._peer.name, frame.header),
            abandon=lambda: self._host.abandon(self._peer.name, frame.header),
        )

    def _trunk_call(self, rule: _Rule, frame: Frame) -> TrunkCall:
        header = frame.header
        assert rule.tensor is not None
        assert isinstance(header, Forward | Backward | Decode)
        # Decoded here, on the runner's thread: waiting calls keep their wire size.
        tensor = decode(frame.tensors[rule.tensor]).to(torch.float32)
        return TrunkCall(owner=self._peer.name, header=header, tensor=tensor)

    def _packed(self, kind: Kind, header: Header, tensors: Mapping[str, Tensor]) -> Frame:
        assert self._spec is not None
        # An adapter is no activation: it travels as it is.
        codec = get_codec("raw" if kind in _ADAPTERS else self._spec.codec_down)
        packed = {name: codec.encode(x) for name, x in tensors.items()}
        return Frame(kind=kind, header=header, tensors=packed)

    def _welcome(self, hello: Hello) -> Frame:
        agreement = agree_on(self._model, hello)
        welcome = self._attestation.welcome(hello, agreement.welcome)
        if self._spec is None:
            self._audit.record(AuditEvent.CONNECTED, self._peer, spec=agreement.root)
            if self._federation is not None:
                self._federation.arrived(self._peer)
        self._spec, self._root, self._cut = agreement.theirs, agreement.root, agreement.cut
        self._greeting = agreement.greeting(self._model)
        return Frame(kind=Kind.WELCOME, header=welcome)

    def _checked_tokens(self, frame: Frame, name: str | None) -> int:
        """Tokens of a call, by what its tensor claims; nothing is decoded yet."""
        if set(frame.tensors) != ({name} if name else set()):
            raise ProtocolError(
                f"{frame.kind.name} carries tensors {sorted(frame.tensors)}, expected {name}"
            )
        if name is None:
            return 0
        shape = frame.tensors[name].shape
        if len(shape) != 2 or not 1 <= shape[0] <= self._host.max_call_tokens:
            raise ProtocolError(
                f"{frame.kind.name} has a tensor of shape {shape}; this server takes [N, D] with "
                f"at most {self._host.max_call_tokens} tokens: lower train.micro_batch_tokens"
            )
        return shape[0]

    def _require(self, role: str) -> None:
        if role not in self._peer.roles:
            self._audit.record(AuditEvent.REFUSED, self._peer, error=PermissionRefused.__name__)
            raise PermissionRefused(
                f"certificate of {self._peer.name} has roles {sorted(self._peer.roles)}, "
                f"not {role}; ask the federation's owner for a certificate with it"
            )

    def _open_run(self, frame: Frame) -> Reply:
        call = _header(frame, OpenRun)
        assert self._cut is not None
        step = self._host.open_run(self._peer.name, call, self._cut)
        self._audit.record(AuditEvent.RUN_OPENED, self._peer, run=call.run_id, step=step)
        return Kind.RUN_OPENED, RunOpened(step=step), {}

    def _commit(self, frame: Frame) -> Reply:
        call = _header(frame, Commit)
        step = self._host.commit(self._peer.name, call)
        if call.save:
            self._audit.record(AuditEvent.RUN_SAVED, self._peer, run=call.run_id, step=step)
        return Kind.COMMITTED, Committed(step=step), {}

    def _pull_adapter(self, frame: Frame) -> Reply:
        call = _header(frame, PullAdapter)
        self._exports.require(self._root, What.ADAPTER, self._peer.name)
        state = self._host.pull_adapter(self._peer.name, call.run_id, call.step)
        self._audit.record(AuditEvent.ADAPTER_PULLED, self._peer, run=call.run_id, step=call.step)
        return Kind.TRUNK_ADAPTER, TrunkAdapter(step=call.step), state

    def _recut(self, frame: Frame) -> Reply:
        call, who = _header(frame, Recut), self._peer.name
        came = split_tensors({name: decode(packed) for name, packed in frame.tensors.items()})
        if came is None:
            raise ProtocolError(f"RECUT carries tensors {sorted(frame.tensors)[:3]}")
        went = self._host.recut(
            who,
            call,
            Moved(weights=came[0], moments=came[1]),
            lambda: self._exports.require(self._root, What.ADAPTER, who),
        )
        run = call.new_run_id
        self._audit.record(AuditEvent.RUN_SAVED, self._peer, run=run, step=call.step)
        if went.weights:
            self._audit.record(AuditEvent.ADAPTER_PULLED, self._peer, run=run, step=call.step)
        tensors = named_tensors(went.weights, went.moments)
        return Kind.RECUT_DONE, RecutDone(step=call.step), tensors

    def _open_session(self, frame: Frame) -> Reply:
        call = _header(frame, OpenSession)
        assert self._cut is not None
        session = self._host.open_session(self._peer.name, call, self._cut)
        self._audit.record(AuditEvent.SESSION_OPENED, self._peer, run=call.run_id, step=call.step)
        header = SessionOpened(session_id=session.session_id, ttl_s=self._host.session_ttl_s)
        return Kind.SESSION_OPENED, header, {}

    def _close_session(self, frame: Frame) -> Reply:
        call = _header(frame, CloseSession)
        freed = self._host.close_session(self._peer.name, call)
        if not call.rows:
            self._audit.record(AuditEvent.SESSION_CLOSED, self._peer)
        return Kind.CLOSED, SessionClosed(bytes_freed=freed), {}


def _forwarded(frame: Frame, result: TrunkResult) -> Reply:
    call = _header(frame, Forward)
    return Kind.FORWARD_DONE, ForwardDone(step=call.step, micro=call.micro), _named("y", result)


def _went_back(frame: Frame, result: TrunkResult) -> Reply:
    call, sq_norm = _header(frame, Backward), result.trunk_sq_norm
    header = BackwardDone(step=call.step, micro=call.micro, trunk_sq_norm=sq_norm)
    return Kind.BACKWARD_DONE, header, _named("grad", result)


def _decoded(frame: Frame, result: TrunkResult) -> Reply:
    return Kind.DECODED, Decoded(), _named("y", result)


def _named(name: str, result: TrunkResult) -> dict[str, Tensor]:
    return {} if result.tensor is None else {name: result.tensor}


_RULES: Mapping[Kind, _Rule] = {
    Kind.OPEN_RUN: _Rule("train", None, ClientConnection._open_run),
    Kind.FORWARD: _Rule("train", "h", None, _forwarded),
    Kind.BACKWARD: _Rule("train", "grad", None, _went_back),
    Kind.COMMIT: _Rule("train", None, ClientConnection._commit),
    Kind.PULL_ADAPTER: _Rule("train", None, ClientConnection._pull_adapter),
    Kind.RECUT: _Rule("train", None, ClientConnection._recut),
    Kind.OPEN_SESSION: _Rule("generate", None, ClientConnection._open_session),
    Kind.DECODE: _Rule("generate", "h", None, _decoded),
    Kind.CLOSE_SESSION: _Rule("generate", None, ClientConnection._close_session),
}


def _header(frame: Frame, kind: type[H]) -> H:
    assert isinstance(frame.header, kind)
    return frame.header


def _num_bytes(frame: Frame) -> int:
    return sum(packed.num_bytes for packed in frame.tensors.values())


def _done(frame: Frame) -> "Future[Frame]":
    future: Future[Frame] = Future()
    future.set_result(frame)
    return future
