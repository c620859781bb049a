"""What a run's private file `run.json` says: names, cut, identity. It locks and writes nothing.

Whoever writes it is `run_state`.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from cutlayer.client.settings import RunSettings
from cutlayer.errors import StorageError
from cutlayer.model.partition import Cut
from cutlayer.storage.files import read_private
from cutlayer.storage.vault import Vault, open_run_vault, open_vault

__all__ = [
    "DEEPEST",
    "RUN_FILE",
    "cut_of",
    "deepest_head",
    "deepest_of",
    "read_note",
    "saved_cut",
]

RUN_FILE = "run.json"
DEEPEST = "deepest head"
"""Under this name: most blocks that the head had, over all re-cuts."""


def saved_cut(settings: RunSettings) -> Cut | None:
    """Where the last re-cut of a run left it; None where there was none. It locks nothing.

    Raises:
        StorageError: the run's file is damaged or open to others.
    """
    known = _known_of(settings)
    return cut_of(known) if "generation" in known else None


def deepest_head(settings: RunSettings) -> int:
    """Most blocks that the head of a run ever had, over all its re-cuts; 0 where it had none yet.

    Raises:
        StorageError: as `saved_cut`.
    """
    return deepest_of(_known_of(settings))


def deepest_of(known: Mapping[str, str]) -> int:
    """`deepest_head` of a file that was read."""
    cut = cut_of(known)
    return max(int(known.get(DEEPEST, "0")), 0 if cut is None else cut.lower)


def _known_of(settings: RunSettings) -> dict[str, str]:
    if not (settings.folder / RUN_FILE).exists():
        return {}
    vault = open_run_vault(settings.folder, open_vault(settings.key_file))
    return read_note(settings.folder, RUN_FILE, vault)


def read_note(folder: Path, name: str, vault: Vault) -> dict[str, str]:
    """A small private table of a run's folder.

    Raises:
        StorageError: it is damaged or open to others.
    """
    path = folder / name
    try:
        return msgspec.json.decode(vault.open(read_private(path), name), type=dict[str, str])
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is damaged; restore it from a copy") from error


def cut_of(known: Mapping[str, str]) -> Cut | None:
    """Where a file that was read says that the run is cut; None where it does not.

    Raises:
        StorageError: it names what is no cut.
    """
    if "cut" not in known:
        return None
    lower, _, upper = known["cut"].partition(":")
    if not (lower.isdecimal() and upper.isdecimal()):
        named = f"{RUN_FILE} names the cut {known['cut']!r:.40}"
        raise StorageError(f"{named}, which is none; restore it from a copy")
    return Cut(int(lower), int(upper))
