"""Where a worker listens: `unix:PATH` or `HOST:PORT`. It sends nothing."""

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from cutlayer.errors import ConfigError, TransportError

__all__ = ["check_address", "connect", "listen"]

_UNIX = "unix:"


def check_address(address: str) -> str:
    """The address, if it is one.

    Raises:
        ValueError: it is not.
    """
    _, separator, port = address.rpartition(":")
    if address.startswith(_UNIX):
        is_good = len(address) > len(_UNIX)
    else:
        is_good = bool(separator) and port.isdecimal() and int(port) < 2**16
    if not is_good:
        raise ValueError(f"{address!r} is no worker's address; write unix:PATH or HOST:PORT")
    return address


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket and its address, with the port that was taken.

    A Unix socket is open to its owner alone.

    Raises:
        ConfigError: the address is taken or not ours.
    """
    try:
        if address.startswith(_UNIX):
            return _listen_unix(Path(address.removeprefix(_UNIX))), address
        host, _, port = address.rpartition(":")
        listener = socket.create_server((host.strip("[]"), int(port)))
        return listener, f"{host}:{listener.getsockname()[1]}"
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from error


def connect(address: str, timeout_s: float) -> socket.socket:
    """A connection to a worker.

    Raises:
        TransportError: nobody answers there.
    """
    try:
        if address.startswith(_UNIX):
            return _connect_unix(address.removeprefix(_UNIX), timeout_s)
        host, _, port = address.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout_s)
    except OSError as error:
        raise TransportError(
            f"no worker answers at {address} ({error.strerror or error}); start it with `cutlayer "
            "masked worker`"
        ) from error


def _connect_unix(path: str, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _listen_unix(path: Path) -> socket.socket:
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            _check_abandoned(path)
            path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen()
    return listener


def _check_abandoned(path: Path) -> None:
    """A killed worker leaves its socket behind; one that answers is in use."""
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
