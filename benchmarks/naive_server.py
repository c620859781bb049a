"""The naive baseline's server: it owns the trunk, drives every step and waits for every answer.

Run as a process: one JSON request on stdin (`ServerRequest`), then one JSON line with the port on
stdout; it ends when its last client has left. One client after the other, one step of each in
turn; no overlap, no cache, no batching across clients.
"""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from benchmarks.isolate import read_request
from benchmarks.naive_parts import MASK_FORMS, NaivePart
from benchmarks.naive_wire import NaiveKind, NaiveSocket, listen

__all__ = ["GENERATE", "TRAIN", "ServerRequest", "main", "serve"]

TRAIN, GENERATE = 0, 1
"""Modes of a job."""


class ServerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the process serves."""

    model_folder: str
    lower: int
    upper: int
    num_clients: int = 1
    """Connections to wait for before the first step."""


class _Job:
    """What one client asked for, and the time each of its steps took."""

    def __init__(self, trunk: NaivePart, peer: NaiveSocket) -> None:
        message = peer.receive(NaiveKind.JOB)
        mode, form, self.num_steps, num_threads = message.tensors[0].tolist()
        torch.set_num_threads(num_threads)
        self._trunk, self._peer = trunk, peer
        self._use_mask = list(MASK_FORMS.values())[form].use
        self._step: Callable[[], None] = self._train if mode == TRAIN else self._generate
        self._optimizer = torch.optim.AdamW(trunk.trainable(), lr=message.value)
        self.seconds: list[float] = []

    def step(self) -> None:
        """Run one step, from the question to the client's last answer."""
        begin_s = time.perf_counter()
        self._peer.send(NaiveKind.ASK)
        self._step()
        self._peer.receive(NaiveKind.DONE)
        self.seconds.append(time.perf_counter() - begin_s)

    def finish(self) -> None:
        """Tell the client how long each step took."""
        self._peer.send(NaiveKind.END, torch.tensor(self.seconds, dtype=torch.float64))

    def _train(self) -> None:
        h_BSH, mask, positions_BS = self._peer.receive(NaiveKind.HIDDEN).tensors
        h_BSH.requires_grad_()
        y_BSH = self._forward(h_BSH, mask, positions_BS)
        self._peer.send(NaiveKind.HIDDEN, y_BSH, mask, positions_BS)
        torch.autograd.backward(y_BSH, self._peer.receive(NaiveKind.GRADIENT).tensors[0])
        self._optimizer.step()
        self._optimizer.zero_grad()
        assert h_BSH.grad is not None
        self._peer.send(NaiveKind.GRADIENT, h_BSH.grad)

    def _generate(self) -> None:
        h_BSH, mask, positions_BS = self._peer.receive(NaiveKind.HIDDEN).tensors
        with torch.no_grad():
            y_BSH = self._forward(h_BSH, mask, positions_BS)
        self._peer.send(NaiveKind.HIDDEN, y_BSH, mask, positions_BS)

    def _forward(self, h_BSH: Tensor, mask: Tensor, positions_BS: Tensor) -> Tensor:
        y_BSH: Tensor = self._trunk(h_BSH, self._use_mask(mask, h_BSH.shape[1]), positions_BS)
        return y_BSH


def serve(listener: socket.socket, trunk: NaivePart, num_clients: int) -> None:
    """Serve jobs, one of every client at a time and one step of each in turn, until they leave."""
    peers = [NaiveSocket(listener.accept()[0]) for _ in range(num_clients)]
    while True:
        try:
            jobs = [_Job(trunk, peer) for peer in peers]
        except ConnectionError:
            return
        _run_in_turn(jobs)


def _run_in_turn(jobs: list[_Job]) -> None:
    for number in range(max(job.num_steps for job in jobs)):
        for job in jobs:
            if number < job.num_steps:
                job.step()
    for job in jobs:
        job.finish()


def main() -> None:
    """Read the request from stdin, load the trunk, say the port, serve."""
    request = read_request(ServerRequest)
    trunk = NaivePart(Path(request.model_folder), range(request.lower, request.upper))
    with listen() as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        serve(listener, trunk, request.num_clients)


if __name__ == "__main__":
    main()
