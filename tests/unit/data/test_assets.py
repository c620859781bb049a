"""The cache: filled once, checked always, mended when damaged."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from cutlayer.data.archive import Selection
from cutlayer.data.assets import ASSETS, Asset, cache_folder, content_digest, fetch, is_cached
from cutlayer.data.download import Release
from cutlayer.errors import ConfigError, StorageError

CONTENT = {"a.txt": b"one", "sub/b.txt": b"two"}


def _content_sha256(content: dict[str, bytes]) -> str:
    lines = [f"{hashlib.sha256(content[name]).hexdigest()}  {name}\n" for name in sorted(content)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in CONTENT.items():
            file.writestr(f"pkg/{name}", content)
    return path


@pytest.fixture
def tiny(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A small asset, known while the test runs."""
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    asset = Asset(
        name="tiny",
        release=Release(package="tiny", version="1.0", sha256=sha256),
        selection=Selection(folder="pkg", suffix=".txt", max_bytes=100),
        result="a.txt",
        content_sha256=_content_sha256(CONTENT),
        licence="none",
        about="for tests",
    )
    monkeypatch.setitem(ASSETS, "tiny", asset)
    return asset


def test_a_sound_copy_is_used_again(tiny: Asset, archive: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert not is_cached("tiny", cache)
    path = fetch("tiny", cache, archive)
    assert path == cache / "assets" / "tiny-1.0" / "a.txt"
    assert path.read_bytes() == b"one"
    assert is_cached("tiny", cache)
    archive.unlink()
    assert fetch("tiny", cache, archive) == path


@pytest.mark.parametrize("damage", ["changed", "missing", "added"])
def test_a_damaged_copy_is_fetched_again(
    damage: str, tiny: Asset, archive: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    path = fetch("tiny", cache, archive)
    if damage == "changed":
        path.write_bytes(b"One")
    elif damage == "missing":
        path.unlink()
    else:
        (path.parent / "more.txt").write_bytes(b"x")
    assert not is_cached("tiny", cache)
    fetch("tiny", cache, archive)
    assert path.read_bytes() == b"one"
    assert sorted(p.name for p in path.parent.rglob("*.txt")) == ["a.txt", "b.txt"]


def test_content_that_differs_from_the_pin_is_never_cached(
    tiny: Asset, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**vars(tiny), "content_sha256": "0" * 64}
    monkeypatch.setitem(ASSETS, "tiny", Asset(**fields))
    cache = tmp_path / "cache"
    with pytest.raises(StorageError, match="asset tiny: the content's SHA-256 is"):
        fetch("tiny", cache, archive)
    assert not (cache / "assets" / "tiny-1.0").exists()


def test_an_unknown_asset_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no asset 'smolm'; the assets are aclsum, bbcnews"):
        fetch("smolm", tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLAYER_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.setenv("CUTLAYER_CACHE", "")
    monkeypatch.setenv("HOME", "/home/owner")
    assert cache_folder() == Path("/home/owner/.cache/cutlayer")


def test_the_content_digest_sees_names_and_bytes(tmp_path: Path) -> None:
    for name, content in CONTENT.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert content_digest(tmp_path) == _content_sha256(CONTENT)
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert content_digest(tmp_path) != _content_sha256(CONTENT)


def test_the_model_pin_is_the_hash_of_its_one_file() -> None:
    model = ASSETS["smollm2"]
    line = f"b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  {model.result}\n"
    assert model.content_sha256 == hashlib.sha256(line.encode()).hexdigest()


def test_every_asset_is_pinned_by_version_and_two_hashes() -> None:
    for name, asset in ASSETS.items():
        assert name == asset.name
        assert asset.release.version
        assert len(asset.release.sha256) == len(asset.content_sha256) == 64


def test_the_evaluation_asset_takes_its_five_files_alone() -> None:
    selection = ASSETS["evaluation"].selection
    assert len(selection.files) == 5
    assert all(name.endswith(selection.suffix) for name in selection.files)
