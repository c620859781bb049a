"""Rows written down as an owner would have them: `train.jsonl` and `heldout.jsonl` in a folder.

It chooses no rows and reads none (`sources`).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from cutlayer.storage.files import explain_os_errors, write_atomic

__all__ = ["write_row_files"]

Fields = Mapping[str, object]


def write_row_files(
    folder: Path, train: Iterable[Fields], heldout: Iterable[Fields]
) -> tuple[Path, Path]:
    """Write both files, one JSON object per line; the folder is made if need be.

    Args:
        folder: gets the two files.
        train: columns of every training row; a value that JSON lacks is written as its text.
        heldout: the same of every held-out row.

    Returns:
        Paths of the training and the held-out rows.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    with explain_os_errors(f"create folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, rows in zip(paths, (train, heldout), strict=True):
        # Escaped, so that half a surrogate pair comes back to the reader, who names its row.
        lines = [json.dumps(dict(row), default=str) + "\n" for row in rows]
        write_atomic(path, "".join(lines).encode())
    return paths
