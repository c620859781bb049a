"""How long a step, a prompt and a token take at a cut: the client's own order of work, replayed.

Client, server and both directions of the link are queues of one; the loop is `SplitStep.gradients`
in numbers. It measures nothing.
"""

from collections import deque
from dataclasses import dataclass

from cutlayer.model.partition import Cut, Part
from cutlayer.planner.measurements import BlockSpeed, EndsSpeed, LinkSpeed, Measurements
from cutlayer.planner.shapes import ModelShapes
from cutlayer.planner.traffic import Traffic, TrafficModel
from cutlayer.planner.workload import Workload

__all__ = ["Seconds", "TimeModel"]

_WARM_STEPS = 2
"""The commit of a step travels with the next one: the third is like all others."""
_PIECES_IN_FLIGHT = 3
"""Pieces of a long prompt that are under way at once."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds per 1,000 tokens; None where a number that it needs is unknown."""

    training: float | None
    prefill: float | None
    decode: float | None
    """Of all streams together."""
    client_share: float | None
    """Of a training step: how much of it the client computes; the rest it waits."""


@dataclass(frozen=True, kw_only=True)
class _Micro:
    """What one micro-batch takes at each place."""

    head_s: float
    trunk_forward_s: float
    tail_s: float
    trunk_backward_s: float
    head_backward_s: float
    forward: Traffic
    backward: Traffic


class TimeModel:
    """Predicts times at any cut of one model, from the numbers of one plan."""

    def __init__(self, shapes: ModelShapes, workload: Workload, numbers: Measurements) -> None:
        self._num_blocks = shapes.num_blocks
        self._workload, self._numbers = workload, numbers
        self._traffic = TrafficModel(shapes, workload)
        parts = workload.adapter.parts
        self._head_trains, self._trunk_trains = Part.HEAD in parts, Part.TRUNK in parts

    def at(self, cut: Cut) -> Seconds:
        """Of this cut."""
        numbers = self._numbers
        if numbers.link is None or numbers.ends is None:
            return Seconds(training=None, prefill=None, decode=None, client_share=None)
        step = self._step(cut, numbers.ends, numbers.link)
        return Seconds(
            training=None if step is None else step[0] / self._workload.tokens_per_step * 1000,
            prefill=self._prefill(cut, numbers.ends, numbers.link),
            decode=self._decode(cut, numbers.ends, numbers.link),
            client_share=None if step is None else min(1.0, step[1] / step[0]),
        )

    def _step(self, cut: Cut, ends: EndsSpeed, link: LinkSpeed) -> tuple[float, float] | None:
        """Seconds of a step, and those in which the client computes."""
        client, server = self._numbers.client, self._numbers.server
        if None in (client.forward_s, client.backward_s, server.forward_s, server.backward_s):
            return None
        micros = self._micros(cut, client, server, ends)
        own = client.optimizer_s * (cut.lower + self._num_blocks - cut.upper)
        far = server.optimizer_s * (cut.upper - cut.lower) * self._trunk_trains
        replay = _Replay(link, self._workload.in_flight)
        begin_s = 0.0
        for number in range(1 + _WARM_STEPS):
            begin_s = replay.now_s
            replay.server_free_s += far if number else 0.0
            replay.step(micros)
            replay.now_s += own
        busy = sum(m.head_s + m.tail_s + m.head_backward_s for m in micros) + own
        return replay.now_s - begin_s, busy

    def _micros(
        self, cut: Cut, client: BlockSpeed, server: BlockSpeed, ends: EndsSpeed
    ) -> list[_Micro]:
        sizes = self._workload.micro_batches
        trunk, tail = cut.upper - cut.lower, self._num_blocks - cut.upper
        goes_back = self._head_trains and cut.lower > 0
        trunk_learns = self._trunk_trains or goes_back
        assert client.forward_s is not None
        assert client.backward_s is not None
        assert server.forward_s is not None
        assert server.backward_s is not None
        found = []
        for number, num_rows in enumerate(sizes):
            thousands = num_rows * self._workload.mean_length / 1000
            both = client.forward_s + client.backward_s
            backward = server.backward_s * trunk + server.codec_s
            found.append(
                _Micro(
                    head_s=thousands * (ends.head_s + cut.lower * client.forward_s),
                    trunk_forward_s=thousands * (trunk * server.forward_s + server.codec_s),
                    tail_s=thousands * (ends.tail_s + tail * both),
                    trunk_backward_s=thousands * backward if trunk_learns else 0.0,
                    head_backward_s=thousands * cut.lower * client.backward_s * goes_back,
                    forward=self._traffic.forward(num_rows, number == 0),
                    backward=self._traffic.backward(num_rows, number == len(sizes) - 1, cut.lower),
                )
            )
        return found

    def _prefill(self, cut: Cut, ends: EndsSpeed, link: LinkSpeed) -> float | None:
        """One prompt; pieces of a long one overlap, so that the slowest place decides."""
        client, server = self._numbers.client, self._numbers.server
        if client.prefill_s is None or server.prefill_s is None:
            return None
        workload, own = self._workload, cut.lower + self._num_blocks - cut.upper
        pieces = -(-workload.prompt_tokens // workload.prefill_tokens)
        thousands = workload.prompt_tokens / 1000
        local_s = thousands * own * client.prefill_s + pieces * ends.prefill_s
        far_s = thousands * (cut.upper - cut.lower) * server.prefill_s
        crossing = self._traffic.prompt()
        up_s, down_s = _transfer(crossing.up, link), _transfer(crossing.down, link)
        if pieces == 1:
            total_s = local_s + far_s + up_s + down_s + link.rtt_s
        else:
            stages = (local_s, far_s, up_s, down_s, pieces * link.rtt_s / _PIECES_IN_FLIGHT)
            rest = (sum(stages[:4]) + link.rtt_s) / pieces
            total_s = max(stages) * (pieces - 1) / pieces + rest
        return total_s / thousands

    def _decode(self, cut: Cut, ends: EndsSpeed, link: LinkSpeed) -> float | None:
        client, server = self._numbers.client, self._numbers.server
        if client.decode_s is None or server.decode_s is None:
            return None
        own = cut.lower + self._num_blocks - cut.upper
        crossing = self._traffic.token()
        one_s = own * client.decode_s + (cut.upper - cut.lower) * server.decode_s + ends.decode_s
        one_s += link.rtt_s + _transfer(crossing.up + crossing.down, link)
        return 1000 * one_s / self._workload.streams


class _Replay:
    """Clocks of the client, the server and both directions."""

    def __init__(self, link: LinkSpeed, in_flight: int) -> None:
        self.now_s = self.server_free_s = 0.0
        self._link, self._in_flight = link, in_flight
        self._up_free_s = self._down_free_s = 0.0

    def step(self, micros: list[_Micro]) -> None:
        """The order of `SplitStep.gradients`."""
        ahead: deque[tuple[_Micro, float]] = deque()
        behind: deque[tuple[_Micro, float]] = deque()
        for micro in micros:
            self.now_s += micro.head_s
            ahead.append((micro, self._call(micro.forward, micro.trunk_forward_s)))
            if len(ahead) == self._in_flight:
                behind.append(self._tail(*ahead.popleft()))
            if len(behind) == self._in_flight:
                self._head_backward(*behind.popleft())
        while ahead:
            behind.append(self._tail(*ahead.popleft()))
        while behind:
            self._head_backward(*behind.popleft())

    def _tail(self, micro: _Micro, back_s: float) -> tuple[_Micro, float]:
        self.now_s = max(self.now_s, back_s) + micro.tail_s
        if not micro.backward.up:
            return micro, self.now_s
        return micro, self._call(micro.backward, micro.trunk_backward_s)

    def _head_backward(self, micro: _Micro, back_s: float) -> None:
        self.now_s = max(self.now_s, back_s) + micro.head_backward_s

    def _call(self, crossing: Traffic, work_s: float) -> float:
        """When the answer of a call that leaves now is here."""
        half_s = self._link.rtt_s / 2
        self._up_free_s = max(self._up_free_s, self.now_s) + _transfer(crossing.up, self._link)
        arrived_s = self._up_free_s + half_s
        self.server_free_s = max(self.server_free_s, arrived_s) + work_s
        sent_s = max(self._down_free_s, self.server_free_s) + _transfer(crossing.down, self._link)
        self._down_free_s = sent_s
        return sent_s + half_s


def _transfer(num_bytes: int, link: LinkSpeed) -> float:
    return 0.0 if link.mbit_per_s is None else 8 * num_bytes / (link.mbit_per_s * 1e6)
