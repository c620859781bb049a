"""A worker that serves gRPC with torch, confines itself and tells what it can still do.

It is started by `test_confine.py`: arguments are a folder (with model, state and other in it) and
the user to become, or 0. The first line of output is JSON with the report; it ends with stdin.
"""

import ctypes
import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cutlayer.tee.process.confine import ConfinementSettings, confine, confine_files
from cutlayer.tee.process.secret import SecretBytes

KEY = b"held in hidden pages, not in any"
_LIBC = ctypes.CDLL(None, use_errno=True)


def _raw(number: int, *arguments: int) -> None:
    if _LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "refused")


def attempts(folder: Path) -> dict[str, Callable[[], object]]:
    """What a worker might try, by a name; x86-64 numbers where Python has no function."""
    return {
        "socket": socket.socket,
        "socketpair": socket.socketpair,
        "exec": lambda: subprocess.run(["/bin/true"], check=True),
        "fork": os.fork,
        "ptrace": lambda: _raw(101, 16, os.getppid(), 0, 0),
        "process_vm_readv": lambda: _raw(310, os.getppid(), 0, 0, 0, 0, 0),
        "io_uring_setup": lambda: _raw(425, 1, 0),
        "userfaultfd": lambda: _raw(323, 0),
        "bpf": lambda: _raw(321, 0, 0, 0),
        "perf_event_open": lambda: _raw(298, 0, 0, -1, -1, 0),
        "unshare": lambda: _raw(272, 0x10000000),
        "dumpable again": lambda: _checked(_LIBC.prctl(4, 1, 0, 0, 0)),
        # The kernel takes the low half of these numbers; a filter sees all of it.
        "dumpable by a wide number": lambda: _raw(157, 4 | 1 << 32, 1, 0, 0, 0),
        "type into the terminal": lambda: fcntl.ioctl(0, termios.TIOCSTI, b"x"),
        "type by a wide number": lambda: _raw(16, 0, termios.TIOCSTI | 1 << 32, 0),
        "root again": lambda: os.setuid(0),
        "signal to the parent": lambda: os.kill(os.getppid(), 0),
        "read another file": (folder / "other" / "file").read_bytes,
        "list another folder": lambda: os.listdir(folder / "other"),
        "write into the model": lambda: (folder / "model" / "new").write_bytes(b""),
        "new core limit": _core_limit,
    }


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")


def _core_limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def outcome(attempt: Callable[[], object]) -> str:
    """ "done", or the name of the error number."""
    try:
        attempt()
    except OSError as error:
        return os.strerror(error.errno or 0)
    except ValueError as error:
        return str(error)
    return "done"


def work(folder: Path) -> float:
    """What it is there for: read the model, multiply on torch's threads, write state."""
    import torch

    seed = int((folder / "model" / "seed").read_text())
    torch.manual_seed(seed)
    product_NN = torch.randn(256, 256) @ torch.randn(256, 256)
    (folder / "state" / "last").write_text(str(seed))
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    return float(product_NN.sum())


def main() -> None:
    folder, uid = Path(sys.argv[1]), int(sys.argv[2])
    settings = ConfinementSettings(
        readable=[folder / "model"], writable=[folder / "state"], uid=uid or None
    )
    is_early = confine_files(settings)
    import grpc
    import torch

    torch.set_num_threads(2)
    secret, plain = SecretBytes.take(bytearray(KEY)), ctypes.create_string_buffer(KEY)
    tried = attempts(folder)

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if request == b"work":
            return json.dumps(work(folder)).encode()
        return json.dumps({name: outcome(tried[name]) for name in tried}).encode()

    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.method_handlers_generic_handler(
        "worker", {"do": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    report = confine(settings, is_early)
    with secret.view() as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    places = {"secret": address, "plain": ctypes.addressof(plain)}
    facts = {
        "details": report.details(),
        "lines": report.lines(),
        "main": {name: outcome(tried[name]) for name in tried},
        "port": port,
        "places": places if secret.is_hidden else {"plain": places["plain"]},
    }
    print(json.dumps(facts), flush=True)
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    main()
