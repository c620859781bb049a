"""A member's call as a broken or lying member might send it: well-formed bytes, wrong content.

It does not flip bits on the wire: TLS finds those, and the connection breaks.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np

from cutlayer.wire.federation_messages import EnterRound, Join, ShareKeys, ShareSecrets, Unmask
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import Backward, Commit, Forward, OpenRun
from cutlayer.wire.packed import Packed

__all__ = ["corrupted"]


def corrupted(frame: Frame, pick: float) -> Frame:
    """The same call with something wrong.

    Args:
        frame: the call.
        pick: from 0 to 1: chooses what.
    """
    ways: list[Callable[[], Frame]] = [lambda: replace(frame, header=_wrong_header(frame.header))]
    if frame.tensors:
        ways += [lambda: _with_tensors(frame, _spoilt), lambda: _with_tensors(frame, _halved)]
    return ways[int(pick * len(ways))]()


def _wrong_header(header: Header) -> Header:
    change = msgspec.structs.replace
    if isinstance(header, Join):
        return change(header, fingerprint={**header.fingerprint, "tokenizer": "another"})
    if isinstance(header, EnterRound):
        return change(header, digest="00" * 32)
    if isinstance(header, ShareKeys):
        return change(header, cipher_key=_flipped(header.cipher_key))
    if isinstance(header, ShareSecrets):
        return change(header, sealed={k: _flipped(x) for k, x in header.sealed.items()})
    if isinstance(header, Unmask):
        return change(header, seed_shares={k: _flipped(x) for k, x in header.seed_shares.items()})
    if isinstance(header, Forward | Backward | Commit):
        return change(header, run_id=f"{header.run_id}9")
    if isinstance(header, OpenRun):
        return change(header, adapter={**header.adapter, "rank": 2})
    attempt = getattr(header, "attempt", None)
    return header if attempt is None else change(header, attempt=attempt + 7)


def _with_tensors(frame: Frame, change: Callable[[Packed], Packed]) -> Frame:
    return replace(frame, tensors={name: change(x) for name, x in frame.tensors.items()})


def _spoilt(packed: Packed) -> Packed:
    """NaN where values are meant, any ring elements where masked ones are."""
    if packed.dtype == "float32" and packed.codec == "raw":
        buffers = tuple(bytes(np.full(len(b) // 4, np.nan, "<f4")) for b in packed.buffers)
    else:
        buffers = tuple(random.Random(0).randbytes(len(buffer)) for buffer in packed.buffers)
    return replace(packed, buffers=buffers)


def _halved(packed: Packed) -> Packed:
    """Half of the rows."""
    if not packed.shape or packed.shape[0] < 2:
        return packed
    half = packed.shape[0] // 2
    kept = tuple(bytes(b)[: len(b) * half // packed.shape[0]] for b in packed.buffers)
    return replace(packed, shape=(half, *packed.shape[1:]), buffers=kept)


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data
