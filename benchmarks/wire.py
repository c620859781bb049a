"""The wire alone: echo over gRPC with mutual TLS between two processes, and each codec's time.

It runs no model. `python -m benchmarks.wire --json`
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from benchmarks.report import Arguments, Value, emit, median, parse_arguments, print_table
from cutlayer.identity.certificates import identify
from cutlayer.identity.provision import local
from cutlayer.wire import codec
from cutlayer.wire.channel import Peer
from cutlayer.wire.endpoints import ConnectionSettings, ListenSettings, TlsFiles
from cutlayer.wire.frame import Frame, frame_bytes
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.grpc_listener import GrpcListener
from cutlayer.wire.messages import Decode, Decoded, Kind

SIZES = {"4kb": 4 << 10, "64kb": 64 << 10, "2mb": 2 << 20, "16mb": 16 << 20}
CODEC_ROWS, HIDDEN = 910, 576
_SERVER = "import sys; from benchmarks.wire import serve; serve(sys.argv[1])"


class EchoService:
    """Sends each tensor back from another thread, as a runner would."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def connect(self, peer: Peer) -> "EchoService":
        """Any peer."""
        return self

    def submit(self, frame: Frame) -> Future[Frame]:
        """Echo."""
        reply = Frame(Kind.DECODED, Decoded(), {"y": frame.tensors["h"]})
        return self._pool.submit(lambda: reply)

    def close(self) -> None:
        """Nothing to give back."""


def serve(folder: str) -> None:
    """Run the echo server until standard input ends; prints its port."""
    settings = ListenSettings(address="127.0.0.1:0", tls=_files(Path(folder)))
    listener = GrpcListener(EchoService(), settings, identify=identify)
    listener.start()
    print(listener.port, flush=True)
    sys.stdin.read()
    listener.stop()


def main(arguments: Arguments) -> dict[str, Value]:
    """Measure, print, return the figures."""
    torch.set_num_threads(1)
    result = {**measure_echo(arguments.is_smoke), **measure_codecs(arguments.is_smoke)}
    emit(result, arguments)
    return result


def measure_echo(is_smoke: bool) -> dict[str, Value]:
    """Median milliseconds of a round trip per tensor size, and the overhead of a decode step."""
    with tempfile.TemporaryDirectory() as name:
        folders = local(Path(name))
        command = [sys.executable, "-c", _SERVER, str(folders.server)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            settings = ConnectionSettings(
                address=f"localhost:{int(process.stdout.readline())}",
                tls=_files(folders.clients["client"]),
            )
            with closing(GrpcChannel(settings)) as channel:
                found = {
                    f"echo_{size}_ms": _echo_ms(channel, num_bytes, 5 if is_smoke else 60)
                    for size, num_bytes in SIZES.items()
                }
            process.communicate()
    print_table("echo, mutual TLS", ("size", "ms"), list(found.items()))
    step = _step(torch.ones(1, HIDDEN), "fp8")
    overhead: dict[str, Value] = {
        "decode_overhead_bytes": frame_bytes(step) - step.tensors["h"].num_bytes
    }
    return {**found, **overhead}


def measure_codecs(is_smoke: bool) -> dict[str, Value]:
    """Milliseconds to encode and to decode 2 MB of float32 on one thread."""
    x = torch.randn(CODEC_ROWS, HIDDEN)
    found: dict[str, Value] = {}
    for name in codec.CODECS:
        packed = codec.encode(x, name)
        repeats = 3 if is_smoke else 50
        found[f"{name}_encode_ms"] = _median_ms(partial(codec.encode, x, name), repeats)
        found[f"{name}_decode_ms"] = _median_ms(partial(codec.decode, packed), repeats)
        found[f"{name}_bytes_per_value"] = packed.num_bytes / x.numel()
    print_table("codecs, 2 MB of float32", ("figure", "value"), list(found.items()))
    return found


def _echo_ms(channel: GrpcChannel, num_bytes: int, repeats: int) -> float:
    step = _step(torch.randn(1, num_bytes // 4), "raw")
    return _median_ms(lambda: channel.call(step).result(), repeats)


def _step(x: torch.Tensor, codec_name: str) -> Frame:
    header = Decode(session_id="f" * 32, rows=[0], lengths=[1], positions=[300])
    return Frame(Kind.DECODE, header, {"h": codec.encode(x, codec_name)})


def _median_ms(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start_s = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - start_s))
    return median(times, skip=1)


def _files(folder: Path) -> TlsFiles:
    return TlsFiles(
        certificate=folder / "certificate.pem",
        key=folder / "key.pem",
        authority=folder / "authority.pem",
    )


if __name__ == "__main__":
    main(parse_arguments(__doc__ or ""))
