"""Whether two sides hold parts of one model. It does not load parts or talk over the wire."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress

from cutlayer.errors import ModelError, SpecMismatch
from cutlayer.model.folder import HubFolder, ModelFolder
from cutlayer.model.manifest import (
    MANIFEST_NAME,
    Manifest,
    manifest_of,
    merge,
    read_manifest,
    write_manifest,
)

__all__ = ["agree", "hash_leaves", "known_manifest"]


def known_manifest(folder: ModelFolder, loaded: Mapping[str, str]) -> Manifest:
    """Every leaf that this side can vouch for or was told by the model's manifest file.

    A complete local folder without a manifest file gets one now; a hub model is not downloaded
    whole for it, so there only the loaded leaves are known.

    Args:
        folder: where the part was loaded from.
        loaded: leaves recomputed while loading.

    Raises:
        SpecMismatch: the files are not the ones that the manifest describes.
    """
    if (folder.path / MANIFEST_NAME).exists():
        return merge(Manifest(dict(loaded)), read_manifest(folder.path))
    if isinstance(folder, HubFolder):
        return Manifest(dict(loaded))
    whole = manifest_of(folder)
    with suppress(ModelError):  # a read-only folder: computed again next time
        write_manifest(whole, folder.path)
    return merge(Manifest(dict(loaded)), whole)


def agree(mine: Manifest, theirs: Mapping[str, str], expected_root: str | None) -> Manifest:
    """All leaves that both sides know together, checked against a pinned digest.

    Args:
        mine: leaves that this side recomputed from its own files.
        theirs: leaves that the other side claims.
        expected_root: model digest that this side's owner pinned, in hex; None accepts any.

    Raises:
        SpecMismatch: a shared leaf differs, a leaf is malformed or known to neither side, or the
            digest is not the pinned one.
    """
    try:
        whole = merge(mine, Manifest(dict(theirs)))
        root = whole.root()
    except ValueError as error:
        raise SpecMismatch(f"the other side's model manifest is malformed: {error}") from error
    if expected_root is not None and root != expected_root.lower():
        raise SpecMismatch(
            f"the model's digest is {root}, the settings expect {expected_root}; "
            "use the model that was agreed on, or correct model.digest"
        )
    return whole


def hash_leaves(leaves: Mapping[str, str]) -> str:
    """One name for the parts that a side holds, in hex; no Merkle root, as leaves are missing."""
    return hashlib.sha256(json.dumps(dict(leaves), sort_keys=True).encode()).hexdigest()
