"""The naive baseline: server-driven, blocking, padded, without any cache. Client and set-up.

What the text of the comparison prescribes, written fairly in ordinary transformers and PEFT code:
fp32, LoRA r = 8 on all linear layers of each part, AdamW, plain TCP. The LM head is applied to the
last token only when generating, as a modern library would. It does not use any of the product.

Training step: (1) the server asks; (2) head forward, {h, mask, positions} up; (3) trunk forward,
the same down; (4) tail forward, backward and step, {gradient, loss} up; (5) trunk backward and
step, {gradient} down; (6) head backward and step. Three round trips. Generation: all three parts
recompute the whole sequence for every token, {h, mask, positions} up and down; two round trips.

Shapes: B = rows, S = padded length, H = hidden size.
"""

import json
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import torch
from torch import Tensor

from benchmarks.isolate import answer, start_isolated
from benchmarks.naive_parts import MASK_FORMS, NaivePart, completion_loss, pad_left
from benchmarks.naive_server import GENERATE, TRAIN, ServerRequest
from benchmarks.naive_wire import NaiveKind, NaiveSocket
from benchmarks.workers import requests

__all__ = [
    "NaiveClient",
    "NaiveGeneration",
    "NaiveRequest",
    "NaiveServer",
    "NaiveTraining",
    "main",
    "sampled_lengths",
]


class NaiveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement by a client process of its own."""

    port: int
    """Of the server, or of the proxy before it."""
    model_folder: str
    lower: int
    upper: int
    rows: list[list[int]]
    """Rows of every training step; for a generation its prompt, alone."""
    mask_form: str
    steps: int = 0
    """Training steps; 0 means generate."""
    new_tokens: int = 0
    lengths_sampled: int | None = 8
    lr: float = 5e-4
    num_threads: int | None = None
    """Torch threads of client and server from this measurement on; None leaves them."""


class NaiveTraining(msgspec.Struct, frozen=True, kw_only=True):
    """What each training step cost; bytes at the client's socket."""

    seconds: tuple[float, ...]
    """From the server's question to the client's last answer."""
    losses: tuple[float, ...]
    bytes_up: tuple[int, ...]
    bytes_down: tuple[int, ...]


class NaiveGeneration(msgspec.Struct, frozen=True, kw_only=True):
    """What a generation cost; sums of all tokens, interpolated between the measured lengths."""

    seconds: float
    bytes_up: float
    bytes_down: float
    tokens: tuple[int, ...]
    """Greedy tokens, one per measured length; a continuation only if every length was measured."""
    measured_lengths: tuple[int, ...]


class NaiveServer:
    """A running server process that owns the trunk; a context manager.

    Args:
        model_folder: plain transformers model folder.
        lower: first block of the trunk; at least 1.
        upper: one past its last block.
        num_threads: torch threads of the server.
        num_clients: connections to wait for; they take steps in turn.
    """

    def __init__(
        self, model_folder: Path, lower: int, upper: int, num_threads: int, num_clients: int = 1
    ) -> None:
        request = ServerRequest(
            model_folder=str(model_folder), lower=lower, upper=upper, num_clients=num_clients
        )
        self._process = start_isolated("benchmarks.naive_server", request, num_threads)
        assert self._process.stdout is not None
        self.port = int(json.loads(self._process.stdout.readline())["port"])

    def close(self) -> None:
        """Wait for the clients to have left, or end the process."""
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> "NaiveServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class NaiveClient:
    """Head and tail, and one blocking connection to the server (or to a proxy before it).

    Args:
        port: port on 127.0.0.1.
        model_folder: plain transformers model folder.
        lower: number of the head's blocks; at least 1.
        upper: first block of the tail; less than the number of blocks.
    """

    def __init__(self, port: int, model_folder: Path, lower: int, upper: int) -> None:
        self._head = NaivePart(model_folder, range(lower))
        self._tail = NaivePart(model_folder, range(upper, self._head.num_blocks))
        self._socket = NaiveSocket(socket.create_connection(("127.0.0.1", port)))

    def train_steps(
        self, rows: Sequence[Sequence[int]], steps: int, mask_form: str, lr: float = 5e-4
    ) -> NaiveTraining:
        """Take optimizer steps, each on all the rows; the loss is over all their tokens."""
        batch = pad_left(rows)
        mask, positions_BS = MASK_FORMS[mask_form], batch.positions_BS
        optimizers = [
            torch.optim.AdamW(part.trainable(), lr=lr) for part in (self._head, self._tail)
        ]

        def step() -> float:
            sent = mask.make(batch.is_real_BS)
            used = mask.use(sent, batch.tokens_BS.shape[1])
            h_BSH = self._head(batch.tokens_BS, used, positions_BS)
            y_BSH = self._exchange(h_BSH, sent, positions_BS).requires_grad_()
            loss = completion_loss(self._tail, self._tail(y_BSH, used, positions_BS), batch)
            torch.autograd.backward(loss)
            _apply(optimizers[1])
            assert y_BSH.grad is not None
            self._socket.send(NaiveKind.GRADIENT, y_BSH.grad, value=loss.item())
            torch.autograd.backward(h_BSH, self._socket.receive(NaiveKind.GRADIENT).tensors[0])
            _apply(optimizers[0])
            return loss.item()

        done = self._run([step] * steps, TRAIN, mask_form, lr)
        return NaiveTraining(
            seconds=done.seconds,
            losses=done.values,
            bytes_up=done.bytes_up,
            bytes_down=done.bytes_down,
        )

    def generate(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        mask_form: str,
        lengths_sampled: int | None = 8,
    ) -> NaiveGeneration:
        """Generate greedily, or only the tokens at evenly spaced lengths and sum from them.

        Args:
            prompt: token ids.
            new_tokens: tokens to generate; the first needs the prompt alone.
            mask_form: key of `MASK_FORMS`.
            lengths_sampled: how many lengths to measure; None measures every token.
        """
        lengths = sampled_lengths(len(prompt), new_tokens, lengths_sampled)
        tokens: list[int] = []

        def step_at(length: int) -> Callable[[], float]:
            def step() -> float:
                # Unmeasured tokens are stood in for by the prompt: time depends on length alone.
                known = (list(prompt) + tokens + list(prompt) * length)[:length]
                tokens.append(self._next_token(known, mask_form))
                return tokens[-1]

            return step

        done = self._run([step_at(length) for length in lengths], GENERATE, mask_form)
        wanted = np.arange(len(prompt), len(prompt) + new_tokens)
        return NaiveGeneration(
            seconds=float(np.interp(wanted, lengths, done.seconds).sum()),
            bytes_up=float(np.interp(wanted, lengths, done.bytes_up).sum()),
            bytes_down=float(np.interp(wanted, lengths, done.bytes_down).sum()),
            tokens=tuple(tokens),
            measured_lengths=tuple(lengths),
        )

    def close(self) -> None:
        """Leave; the server ends with its last client."""
        self._socket.close()

    def __enter__(self) -> "NaiveClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @torch.no_grad()
    def _next_token(self, tokens: Sequence[int], mask_form: str) -> int:
        batch, mask = pad_left([tokens]), MASK_FORMS[mask_form]
        sent = mask.make(batch.is_real_BS)
        used = mask.use(sent, len(tokens))
        h_BSH = self._head(batch.tokens_BS, used, batch.positions_BS)
        y_BSH = self._exchange(h_BSH, sent, batch.positions_BS)
        hidden_BSH = self._tail(y_BSH, used, batch.positions_BS)
        assert self._tail.lm_head is not None
        return int(self._tail.lm_head(hidden_BSH[:, -1]).argmax())

    def _exchange(self, h_BSH: Tensor, mask: Tensor, positions_BS: Tensor) -> Tensor:
        self._socket.send(NaiveKind.HIDDEN, h_BSH, mask, positions_BS)
        return self._socket.receive(NaiveKind.HIDDEN).tensors[0]

    def _run(
        self, steps: Sequence[Callable[[], float]], mode: int, mask_form: str, lr: float = 0.0
    ) -> "_Done":
        threads = torch.get_num_threads()
        job = torch.tensor([mode, list(MASK_FORMS).index(mask_form), len(steps), threads])
        self._socket.send(NaiveKind.JOB, job, value=lr)
        values, up, down = [], [], []
        for step in steps:
            sent, received = self._socket.bytes_sent, self._socket.bytes_received
            self._socket.receive(NaiveKind.ASK)
            values.append(step())
            self._socket.send(NaiveKind.DONE)
            up.append(self._socket.bytes_sent - sent)
            down.append(self._socket.bytes_received - received)
        seconds = tuple(self._socket.receive(NaiveKind.END).tensors[0].tolist())
        return _Done(tuple(values), seconds, tuple(up), tuple(down))


@dataclass(frozen=True)
class _Done:
    values: tuple[float, ...]
    seconds: tuple[float, ...]
    bytes_up: tuple[int, ...]
    bytes_down: tuple[int, ...]


def sampled_lengths(prompt_length: int, new_tokens: int, count: int | None) -> list[int]:
    """Sequence lengths at which to measure single tokens: evenly spaced, both ends included."""
    last = prompt_length + new_tokens - 1
    if count is None or count >= new_tokens:
        return list(range(prompt_length, last + 1))
    return [round(x) for x in np.linspace(prompt_length, last, count)]


def _apply(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Answer `NaiveRequest`s from stdin with `NaiveTraining` or `NaiveGeneration`, until it closes.

    The connection and the weights stay while the server is the same one.
    """
    client: NaiveClient | None = None
    port = 0
    for request in requests(NaiveRequest):
        if client is None or port != request.port:
            if client is not None:
                client.close()
            folder = Path(request.model_folder)
            client = NaiveClient(request.port, folder, request.lower, request.upper)
            port = request.port
        if request.num_threads is not None:
            torch.set_num_threads(request.num_threads)
        answer(_train(client, request) if request.steps else _generate(client, request))
    if client is not None:
        client.close()


def _train(client: NaiveClient, request: NaiveRequest) -> NaiveTraining:
    return client.train_steps(request.rows, request.steps, request.mask_form, request.lr)


def _generate(client: NaiveClient, request: NaiveRequest) -> NaiveGeneration:
    (prompt,) = request.rows
    return client.generate(prompt, request.new_tokens, request.mask_form, request.lengths_sampled)


if __name__ == "__main__":
    main()
