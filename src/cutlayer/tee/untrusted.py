"""Decoding of what a peer or a file brought: whatever the bytes are, a value or malformed evidence.

It knows no structure: decoders and names come from the callers.
"""

import base64
from collections.abc import Callable
from typing import TypeVar

from cutlayer.tee.refusal import Refusal, refused

__all__ = ["decode_base64url", "decode_untrusted"]

T = TypeVar("T")


def decode_untrusted(decode: Callable[[bytes], T], data: bytes, what: str) -> T:
    """What a decoder of JSON or msgpack finds.

    Args:
        decode: `msgspec`'s, typed.
        data: the bytes.
        what: the beginning of the message.

    Raises:
        AttestationError: malformed.
    """
    try:
        return decode(data)
    except (ValueError, RecursionError) as error:
        # Nested deeper than the decoder descends, also in fields that nobody reads.
        raise refused(Refusal.MALFORMED, f"{what}: {error}") from error


def decode_base64url(text: str) -> bytes:
    """Bytes of base64 in the alphabet of URLs, without padding (RFC 7515).

    Raises:
        ValueError: something else.
    """
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
