"""One byte form of plain values, for what is hashed or signed. It hashes and signs nothing."""

import json

__all__ = ["canonical_json"]


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and without spaces, ASCII.

    Args:
        value: tables, lists, texts, numbers, true, false, None.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
