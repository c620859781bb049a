"""Real pip, against a folder of archives in the registry's place."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from cutlayer.data.download import Release, download
from cutlayer.errors import StorageError, TransportError


def make_wheel(folder: Path, member: str, content: bytes) -> Path:
    """A wheel of `cutlayer-test-asset` 1.0 with one file."""
    path = folder / "cutlayer_test_asset-1.0-py3-none-any.whl"
    info = "cutlayer_test_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: cutlayer-test-asset\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def _release(path: Path, *, is_source: bool = False, sha256: str = "") -> Release:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    return Release(
        package="cutlayer-test-asset", version="1.0", sha256=sha256 or found, is_source=is_source
    )


def test_the_archive_comes_verified_and_is_gone_afterwards(registry: Path) -> None:
    wheel = make_wheel(registry, "pkg/a.txt", b"one")
    with download(_release(wheel), None, timeout_s=60) as path:
        assert path.read_bytes() == wheel.read_bytes()
    assert not path.exists()


def test_a_wrong_hash_is_a_storage_error(registry: Path) -> None:
    wheel = make_wheel(registry, "pkg/a.txt", b"one")
    release = _release(wheel, sha256="0" * 64)
    with pytest.raises(StorageError, match="has not the pinned SHA-256"):
        download(release, None, timeout_s=60).__enter__()


def test_a_tampered_source_archive_never_runs(registry: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    code = f"open({str(marker)!r}, 'w')".encode()
    path = registry / "cutlayer-test-asset-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("cutlayer-test-asset-1.0/setup.py")
        info.size = len(code)
        archive.addfile(info, io.BytesIO(code))
    release = _release(path, is_source=True, sha256="0" * 64)
    with pytest.raises(StorageError, match="has not the pinned SHA-256"):
        download(release, None, timeout_s=60).__enter__()
    assert not marker.exists()


def test_a_missing_package_says_what_to_do(registry: Path) -> None:
    release = Release(package="cutlayer-test-asset", version="1.0", sha256="0" * 64)
    with pytest.raises(TransportError, match=r"pip failed \(ERROR: No matching .*by hand"):
        download(release, None, timeout_s=60).__enter__()


def test_an_unreachable_registry_says_so(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")
    release = Release(package="cutlayer-test-asset", version="1.0", sha256="0" * 64)
    with pytest.raises(TransportError, match="the package registry cannot be reached"):
        download(release, None, timeout_s=60).__enter__()


def test_a_registry_that_hangs_meets_the_deadline(registry: Path) -> None:
    release = Release(package="cutlayer-test-asset", version="1.0", sha256="0" * 64)
    with pytest.raises(TransportError, match=r"was not fetched within 0\.01 s"):
        download(release, None, timeout_s=0.01).__enter__()


def test_a_given_archive_is_checked_and_kept(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "pkg/a.txt", b"one")
    with download(_release(wheel), wheel, timeout_s=0) as path:
        assert path == wheel
    assert wheel.exists()
    with pytest.raises(StorageError, match="must have 0000"):
        download(_release(wheel, sha256="0" * 64), wheel, timeout_s=0).__enter__()
    with pytest.raises(StorageError, match="cannot read"):
        download(_release(wheel), tmp_path / "nothing.whl", timeout_s=0).__enter__()
