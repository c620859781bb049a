"""The measured client of `benchmarks.planner`, and the echo that serves a large one.

One process trains, says what it held at most, and then generates. It does not predict or compare.
"""

import sys
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks.isolate import answer, read_request
from benchmarks.split import SplitRequest, client_settings, new_trainer
from benchmarks.workers import peak_bytes
from cutlayer import Client
from cutlayer.client.session import Feed, GenerationSession
from cutlayer.client.train import Report
from cutlayer.identity.certificates import identify
from cutlayer.identity.provision import member_files
from cutlayer.planner.echo import EchoService
from cutlayer.wire.endpoints import ListenSettings, TlsFiles
from cutlayer.wire.grpc_listener import GrpcListener

__all__ = ["EchoRequest", "PlannedClient", "PlannedUse", "Request", "main"]

_DECODE_STEPS, _PROMPTS = 12, 5


class PlannedClient(msgspec.Struct, frozen=True, kw_only=True):
    """One cut to measure."""

    split: SplitRequest
    dtype: str = "float32"
    prompt_tokens: int = 0
    """Tokens of the prompt; 0 does not generate."""


class EchoRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Serve an echo."""

    kit: str


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is to be."""

    client: PlannedClient | None = None
    echo: EchoRequest | None = None


class PlannedUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the client needed."""

    peak_bytes: int
    """Peak resident set after training and its last save."""
    step_s: tuple[float, ...]
    prefill_s: tuple[float, ...] = ()
    decode_s: tuple[float, ...] = ()
    bytes_up: int = 0
    """Frames of all steps but the first, and of nothing else."""
    bytes_down: int = 0


class _Steps:
    """Times steps, and counts bytes from the end of the first to the end of the last."""

    def __init__(self, client: Client) -> None:
        self._trunk = client.trunk
        self.seconds: list[float] = []
        self.bytes: list[tuple[int, int]] = []
        self._began_s = time.perf_counter()

    def on_step(self, report: Report) -> None:
        now_s = time.perf_counter()
        self.seconds.append(now_s - self._began_s)
        self._began_s = now_s
        self.bytes.append((self._trunk.bytes_sent, self._trunk.bytes_received))


def _measure(request: PlannedClient) -> PlannedUse:
    with tempfile.TemporaryDirectory() as folder:
        settings = client_settings(request.split, folder)
        model = settings.model.model_copy(update={"dtype": request.dtype})
        with Client(settings.model_copy(update={"model": model})) as client:
            steps = _Steps(client)
            new_trainer(client, request.split).run(steps.on_step)
            peak = peak_bytes()
            prefill, decode = _generate(client, request.prompt_tokens)
    (first_up, first_down), (last_up, last_down) = steps.bytes[0], steps.bytes[-1]
    return PlannedUse(
        peak_bytes=peak,
        step_s=tuple(steps.seconds),
        prefill_s=tuple(prefill),
        decode_s=tuple(decode),
        bytes_up=last_up - first_up,
        bytes_down=last_down - first_down,
    )


def _generate(client: Client, prompt_tokens: int) -> tuple[list[float], list[float]]:
    prefill: list[float] = []
    decode: list[float] = []
    if not prompt_tokens:
        return prefill, decode
    limit = prompt_tokens + _DECODE_STEPS
    tokens = [1 + place % 100 for place in range(prompt_tokens)]
    session = client.session([limit])
    # The first prompt of a session opens it, which costs a round trip of its own.
    for row in range(_PROMPTS):
        row = session.open_row(limit) if row else row
        prefill.append(_timed(session, row, tokens))
        decode += [_timed(session, row, [place]) for place in range(1, _DECODE_STEPS)]
    session.close()
    return prefill, decode


def _timed(session: GenerationSession, row: int, tokens: list[int]) -> float:
    began_s = time.perf_counter()
    session.step([Feed(row=row, tokens=tokens)])
    return time.perf_counter() - began_s


def _echo(request: EchoRequest) -> None:
    files = member_files(Path(request.kit))
    tls = TlsFiles(certificate=files.certificate, key=files.key, authority=files.authority)
    settings = ListenSettings(address="127.0.0.1:0", tls=tls)
    listener = GrpcListener(EchoService({}), settings, identify=identify)
    listener.start()
    print(listener.port, flush=True)
    sys.stdin.readline()
    listener.stop()


def main() -> None:
    """Be what the request on stdin asks for."""
    request = read_request(Request)
    if request.echo is not None:
        _echo(request.echo)
    if request.client is not None:
        answer(_measure(request.client))


if __name__ == "__main__":
    main()
