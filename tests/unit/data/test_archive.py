"""Hostile archives: nothing lands outside, nothing grows without a limit."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from cutlayer.data.archive import Selection, extract
from cutlayer.errors import StorageError

WANTED = Selection(folder="pkg/data", suffix=".txt", max_bytes=1000)


def _zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_only_selected_members_are_written(tmp_path: Path) -> None:
    members = {"pkg/data/a/1.txt": b"one", "pkg/data/x.py": b"code", "pkg/other/2.txt": b"two"}
    archive = _zip(tmp_path / "a.whl", **members)
    target = tmp_path / "target"
    extract(archive, WANTED, target)
    assert _files(target) == {"a/1.txt": b"one"}


def test_an_archive_within_an_archive_is_read(tmp_path: Path) -> None:
    inner = _tar(tmp_path / "inner.tar.gz", (tarfile.TarInfo("pkg/data/1.txt"), b"one"))
    content = inner.read_bytes()
    outer = _tar(tmp_path / "o.tar.gz", (tarfile.TarInfo("p-1/inner.tar.gz"), content))
    nested = Selection(
        folder="pkg/data", suffix=".txt", max_bytes=1000, inner_archive="p-1/inner.tar.gz"
    )
    extract(outer, nested, tmp_path / "target")
    assert _files(tmp_path / "target") == {"1.txt": b"one"}
    missing = Selection(folder="pkg/data", suffix=".txt", max_bytes=1000, inner_archive="p-1/x")
    with pytest.raises(StorageError, match="holds no p-1/x"):
        extract(outer, missing, tmp_path / "other")


@pytest.mark.parametrize(
    "name", ["pkg/data/../../../evil.txt", "pkg/data/..\\evil.txt", "pkg/data/a/../../b.txt"]
)
@pytest.mark.parametrize("form", ["zip", "tar"])
def test_a_member_that_would_land_outside_is_refused(name: str, form: str, tmp_path: Path) -> None:
    if form == "zip":
        archive = _zip(tmp_path / "a.whl", **{name: b"evil"})
    else:
        archive = _tar(tmp_path / "a.tar.gz", (tarfile.TarInfo(name), b"evil"))
    with pytest.raises(StorageError, match="outside its folder"):
        extract(archive, WANTED, tmp_path / "deep" / "er" / "target")
    assert not list(tmp_path.rglob("*evil.txt"))


def test_an_absolute_member_is_never_wanted(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "a.tar.gz", (tarfile.TarInfo(f"{tmp_path}/evil.txt"), b"evil"))
    with pytest.raises(StorageError, match="holds no"):
        extract(archive, WANTED, tmp_path / "target")
    assert not (tmp_path / "evil.txt").exists()


def test_links_are_passed_over(tmp_path: Path) -> None:
    link = tarfile.TarInfo("pkg/data/link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    plain = tarfile.TarInfo("pkg/data/1.txt")
    archive = _tar(tmp_path / "a.tar.gz", (link, b""), (plain, b"one"))
    extract(archive, WANTED, tmp_path / "target")
    assert _files(tmp_path / "target") == {"1.txt": b"one"}


def test_a_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    archive = _zip(
        tmp_path / "a.whl", **{"pkg/data/1.txt": bytes(900), "pkg/data/2.txt": bytes(200)}
    )
    with pytest.raises(StorageError, match=r"2\.txt' is larger than the 100 bytes allowed"):
        extract(archive, WANTED, tmp_path / "target")


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 broken"])
def test_what_is_no_archive_says_so(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="is damaged"):
        extract(path, WANTED, tmp_path / "target")


def test_a_flipped_byte_inside_a_member_is_noticed(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.whl", **{"pkg/data/1.txt": bytes(range(256)) * 3})
    raw = bytearray(archive.read_bytes())
    raw[60] ^= 0xFF
    archive.write_bytes(raw)
    with pytest.raises(StorageError, match="is damaged"):
        extract(archive, WANTED, tmp_path / "target")


def _chosen(*files: str) -> Selection:
    return Selection(folder="pkg/data", suffix=".txt", max_bytes=1000, files=files)


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_named_files_alone_are_written(form: str, tmp_path: Path) -> None:
    members = {f"pkg/data/{name}": b"x" for name in ("a/1.txt", "b/2.txt", "b/3.txt", "1.txt")}
    if form == "zip":
        archive = _zip(tmp_path / "a.whl", **members)
    else:
        infos = [(tarfile.TarInfo(name), content) for name, content in members.items()]
        archive = _tar(tmp_path / "a.tar.gz", *infos)
    extract(archive, _chosen("b/3.txt", "a/1.txt"), tmp_path / "target")
    assert sorted(_files(tmp_path / "target")) == ["a/1.txt", "b/3.txt"]


def test_a_named_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.whl", **{"pkg/data/1.txt": b"x"})
    with pytest.raises(StorageError, match=r"holds no 2\.txt, b/3\.txt in pkg/data"):
        extract(archive, _chosen("1.txt", "2.txt", "b/3.txt"), tmp_path / "target")
