"""One file an attack; importing this package registers them all (`cutlayer.audit.registry`)."""

from cutlayer.audit.attacks import (
    vocabulary_matching,
)

__all__ = [
    "vocabulary_matching",
]
