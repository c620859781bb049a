"""One file an attack; importing this package registers them all (`cutlayer.audit.registry`)."""

from cutlayer.audit.attacks import (
    kv_reuse,
    nearest_embedding,
    repeat_averaging,
    smashed_data_matching,
    vocabulary_matching,
)

__all__ = [
    "kv_reuse",
    "nearest_embedding",
    "repeat_averaging",
    "smashed_data_matching",
    "vocabulary_matching",
]
