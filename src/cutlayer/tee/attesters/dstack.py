"""Evidence of a container under dstack: `POST /GetQuote` on its Unix socket.

The quote is TDX's; the measurements of the compose file stand in rtmr3. Collateral comes from the
files of the settings. It reads no event log: a policy pins registers.
"""

import json
import socket
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import msgspec

from cutlayer.errors import ConfigError
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence, Platform

__all__ = ["DstackAttester"]

_SOCKET = "var/run/dstack.sock"
_TIMEOUT_S = 30.0
_MAX_ANSWER_BYTES = 4 << 20
_REPORT_DATA_BYTES = 64


@ATTESTERS.register("dstack")
class DstackAttester:
    """One request, one connection."""

    def attest(self, settings: AttesterSettings, report_data: bytes) -> Evidence:
        """A quote over `report_data`, zeros after it.

        Raises:
            ConfigError: nobody answers there, or not with a quote.
        """
        path = settings.root / _SOCKET
        wanted = report_data.ljust(_REPORT_DATA_BYTES, b"\0").hex()
        try:
            answer = _post(path, json.dumps({"report_data": wanted}).encode())
            body = bytes.fromhex(msgspec.json.decode(answer, type=_Answer).quote)
        except (OSError, HTTPException) as error:
            raise ConfigError(
                f"no quote from {path}: {error}; is this a dstack container with its socket "
                "mounted?"
            ) from error
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(
                f"{path} answered with something that is no quote: {error}"
            ) from error
        return Evidence(platform=Platform.TDX, body=body)


class _Answer(msgspec.Struct):
    """dstack says more; the quote has what a verifier needs."""

    quote: str


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("dstack", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Open the socket; HTTPConnection calls it before the first request."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def _post(path: Path, body: bytes) -> bytes:
    connection = _UnixConnection(path)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/GetQuote", body=body, headers=headers)
        response = connection.getresponse()
        answer = response.read(_MAX_ANSWER_BYTES + 1)
    finally:
        connection.close()
    if response.status != 200:
        raise ConfigError(f"{path} refused to make a quote: HTTP {response.status}")
    if len(answer) > _MAX_ANSWER_BYTES:
        raise ConfigError(f"{path} answered with more than {_MAX_ANSWER_BYTES} bytes")
    return answer
