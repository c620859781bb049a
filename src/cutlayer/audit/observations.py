"""Evidence from a recording: frames paired by call, decoded, cut into rows, joined over calls.

It attacks nothing and knows no truth; beside the evidence it keeps digests of what left, by which
the owner finds the truth again (`truth`).

Shapes: N = vectors of a call, L = vectors of one row, D = hidden size.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cutlayer.audit.evidence import Evidence, Observation, Update
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.session_rows import SessionRows
from cutlayer.client.truth_file import vector_digests
from cutlayer.errors import DataError, ProtocolError, SpecMismatch
from cutlayer.wire.codec import decode
from cutlayer.wire.federation_messages import SendUpdate, round_run_id
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Backward, CloseSession, Decode, Forward, Kind
from cutlayer.wire.recording import Recording, RecordingHeader

__all__ = ["Recorded", "check_model", "read_evidence"]

_REPLIES = (Kind.FORWARD_DONE, Kind.BACKWARD_DONE, Kind.DECODED)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Evidence, and what the owner needs to find the truth of it."""

    header: RecordingHeader
    evidence: Evidence
    digests: tuple[tuple[bytes, ...], ...] = field(repr=False)
    """Per observation `vector_digests` of what was released."""
    rounds: Mapping[int, tuple[int, ...]]
    """By round of a plain update the observations that took part in it."""


@dataclass(kw_only=True)
class _Call:
    """One FORWARD with what followed it."""

    header: Forward
    digests: list[bytes]
    h_ND: Tensor
    y_ND: Tensor | None = None
    gradient_ND: Tensor | None = None
    input_gradient_ND: Tensor | None = None


def read_evidence(recording: Recording) -> Recorded:
    """Everything that a recording tells an attacker.

    Raises:
        StorageError: the file cannot be read.
        ProtocolError: a frame is malformed, or its tensors do not fit its header.
        DataError: nothing of use was recorded.
    """
    frames = [recorded.frame for recorded in recording.frames()]
    replies = {frame.call_id: frame for frame in frames if frame.kind in _REPLIES}
    training, sessions, updates = _Training(), SessionRows(), _Updates()
    for frame in frames:
        reply, header = replies.get(frame.call_id), frame.header
        if isinstance(header, Forward):
            training.forward(frame, header, reply)
        elif isinstance(header, Backward):
            training.backward(frame, header, reply)
        elif isinstance(header, Decode):
            _decode(sessions, frame, header, reply)
        elif isinstance(header, CloseSession):
            sessions.close(header.session_id, header.rows)
        elif isinstance(header, SendUpdate):
            updates.take(frame, header)
    return _joined(recording, training, sessions, updates)


def check_model(recorded: Recorded, knowledge: Knowledge) -> None:
    """Refuse evidence about another model than the one that the attacker knows.

    Raises:
        SpecMismatch: another cut, or a part with another digest; says which.
    """
    spec, cut = recorded.header.spec, knowledge.cut
    if (spec.get("lower"), spec.get("upper")) != (cut.lower, cut.upper):
        raise SpecMismatch(
            f"the recording is of the cut {spec.get('lower')}:{spec.get('upper')}, the attacker's "
            f"is {cut.lower}:{cut.upper}; give it the recording's"
        )
    head, tail = knowledge.parts
    own = {**head.leaves, **tail.leaves}
    different = sorted(n for n, leaf in recorded.header.leaves.items() if own.get(n) != leaf)
    if different:
        raise SpecMismatch(
            f"the recording is of another model than {knowledge.folder.path.name}: it differs in "
            f"{', '.join(name[:40] for name in different[:5])}; name the recorded model"
        )


class _Training:
    """FORWARDs and BACKWARDs; one that was repeated after a lost connection counts once."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self._awaiting: dict[tuple[str, int, int], _Call] = {}

    def forward(self, frame: Frame, header: Forward, reply: Frame | None) -> None:
        h_ND = _tensor(frame, "h", sum(header.lengths))
        call = _Call(header=header, digests=vector_digests(frame.tensors["h"]), h_ND=h_ND)
        call = self._same_as_before(call)
        if call.y_ND is None and reply is not None:
            call.y_ND = _tensor(reply, "y", h_ND.shape[0])
        if not header.is_evaluation:
            self._awaiting[header.run_id, header.step, header.micro] = call

    def backward(self, frame: Frame, header: Backward, reply: Frame | None) -> None:
        call = self._awaiting.get((header.run_id, header.step, header.micro))
        if call is None:
            return
        call.gradient_ND = _tensor(frame, "grad", call.h_ND.shape[0])
        if reply is not None and "grad" in reply.tensors:
            call.input_gradient_ND = _tensor(reply, "grad", call.h_ND.shape[0])

    def _same_as_before(self, call: _Call) -> _Call:
        one = call.header
        for known in reversed(self.calls[-64:]):
            other = known.header
            if (other.run_id, other.step, other.micro) == (one.run_id, one.step, one.micro) and (
                known.digests == call.digests
            ):
                return known
        self.calls.append(call)
        return call


class _Updates:
    """Federated updates that left in the open."""

    def __init__(self) -> None:
        self.found: dict[int, Update] = {}
        self.run_ids: dict[int, str] = {}

    def take(self, frame: Frame, header: SendUpdate) -> None:
        if "masked" in frame.tensors:
            return
        tensors = {name: decode(x).float() for name, x in frame.tensors.items()}
        self.found[header.round] = Update(round=header.round, tensors=tensors)
        run_id = round_run_id(header.federation, header.round, header.attempt)
        self.run_ids[header.round] = run_id


def _decode(sessions: SessionRows, frame: Frame, header: Decode, reply: Frame | None) -> None:
    h_ND = _tensor(frame, "h", sum(header.lengths))
    y_ND = None if reply is None else _tensor(reply, "y", h_ND.shape[0])
    digests, begin = vector_digests(frame.tensors["h"]), 0
    if not len(header.rows) == len(header.lengths) == len(header.positions):
        raise ProtocolError("a DECODE of the recording has lists of different lengths")
    for row, length, position in zip(header.rows, header.lengths, header.positions, strict=True):
        end = begin + length
        y_LD = None if y_ND is None else y_ND[begin:end]
        name = (header.session_id, row)
        sessions.add(name, position, h_ND[begin:end], y_LD, digests[begin:end])
        begin = end


def _joined(
    recording: Recording, training: _Training, sessions: SessionRows, updates: _Updates
) -> Recorded:
    made: list[tuple[Observation, Sequence[bytes]]] = []
    members: dict[str, list[int]] = {}
    for call in training.calls:
        for pair in _rows_of(call):
            members.setdefault(call.header.run_id, []).append(len(made))
            made.append(pair)
    made += sessions.finish()
    if not made and not updates.found:
        raise DataError(
            f"{recording.path}: none of its {recording.num_frames} frames carries activations, "
            "gradients or a plain update; record a run that trains or generates"
        )
    numbered = (replace(seen, number=number) for number, (seen, _) in enumerate(made))
    run_ids = updates.run_ids.items()
    return Recorded(
        header=recording.header,
        evidence=Evidence(observations=tuple(numbered), updates=tuple(updates.found.values())),
        digests=tuple(tuple(digests) for _, digests in made),
        rounds={number: tuple(members.get(run_id, ())) for number, run_id in run_ids},
    )


def _rows_of(call: _Call) -> Iterable[tuple[Observation, Sequence[bytes]]]:
    header, begin = call.header, 0
    for length in header.lengths:
        end = begin + length
        seen = Observation(
            number=0,
            phase="evaluation" if header.is_evaluation else "training",
            step=header.step,
            start=0,
            h_LD=call.h_ND[begin:end],
            y_LD=_part(call.y_ND, begin, end),
            gradient_LD=_part(call.gradient_ND, begin, end),
            input_gradient_LD=_part(call.input_gradient_ND, begin, end),
        )
        yield seen, call.digests[begin:end]
        begin = end


def _part(x_ND: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if x_ND is None else x_ND[begin:end]


def _tensor(frame: Frame, name: str, num_vectors: int) -> Tensor:
    if name not in frame.tensors:
        raise ProtocolError(f"a {frame.kind.name} of the recording has no tensor {name!r}")
    x_ND = decode(frame.tensors[name]).to(torch.float32)
    if x_ND.ndim != 2 or x_ND.shape[0] != num_vectors:
        raise ProtocolError(
            f"a {frame.kind.name} of the recording has a tensor of shape {list(x_ND.shape)} where "
            f"{num_vectors} vectors belong"
        )
    return x_ND
