"""Evidence from inside an AWS Nitro enclave: one request to its security module, `/dev/nsm`.

The request, the ioctl's layout and the reply are tested; the device itself never was: no enclave
has been at hand. It verifies nothing.
"""

import ctypes
import fcntl
import os
from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.nitro_document import decode_reply, encode_request

__all__ = ["MAX_REPLY_BYTES", "NSM_REQUEST", "NitroAttester", "ask_module"]

MAX_REPLY_BYTES = 0x3000
"""The module's own limit."""


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """What the ioctl reads and writes: the request's place, and the reply's."""

    _fields_ = (("request", _IoVector), ("reply", _IoVector))


NSM_REQUEST = 3 << 30 | ctypes.sizeof(_Message) << 16 | 0x0A << 8
"""The ioctl's number: read and write, the message's size, type 0x0A, command 0
(linux/include/uapi/linux/nsm.h and the crate aws-nitro-enclaves-nsm-api)."""


@ATTESTERS.register("nitro")
class NitroAttester:
    """Asks the enclave's security module for a document."""

    def attest(self, settings: AttesterSettings, report_data: bytes) -> Evidence:
        """A fresh document whose `user_data` is `report_data`.

        Raises:
            ConfigError: this is no Nitro enclave, or its module refused.
        """
        reply = ask_module(settings.root / "dev" / "nsm", encode_request(report_data))
        return Evidence(platform=Platform.NITRO, body=decode_reply(reply))


def ask_module(path: Path, request: bytes) -> bytes:
    """One request to a Nitro security module.

    Args:
        path: the device.
        request: CBOR.

    Raises:
        ConfigError: no such device, or it does not know the request.
    """
    place_in = ctypes.create_string_buffer(request, len(request))
    place_out = ctypes.create_string_buffer(MAX_REPLY_BYTES)
    message = _Message(
        request=_IoVector(ctypes.addressof(place_in), len(request)),
        reply=_IoVector(ctypes.addressof(place_out), MAX_REPLY_BYTES),
    )
    try:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, NSM_REQUEST, message)
        finally:
            os.close(device)
    except OSError as error:
        raise ConfigError(
            f"{path} is no Nitro security module: {error.strerror}; does this run in an enclave?"
        ) from error
    return place_out.raw[: min(message.reply.length, MAX_REPLY_BYTES)]
