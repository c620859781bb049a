"""Files survive crashes and full disks, and stay private."""

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer.errors import DataError, StorageError
from cutlayer.storage import files
from cutlayer.storage.files import (
    private_folder,
    read_private,
    remove_leftovers,
    replace_folder,
    settle_folder,
    write_atomic,
)


def test_written_file_has_content_and_mode_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        write_atomic(tmp_path / "a", b"one")
        write_atomic(tmp_path / "b", iter([b"two", b"", b"three"]), mode=0o644)
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_bytes() == b"one"
    assert (tmp_path / "b").read_bytes() == b"twothree"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o644


def test_failing_chunks_leave_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise DataError("no more")

    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(DataError):
        write_atomic(tmp_path / "a", chunks())
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_missing_folder_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        write_atomic(tmp_path / "nowhere" / "a", b"x")


def test_replaced_folder_is_the_new_one_alone_and_private(tmp_path: Path) -> None:
    target = tmp_path / "save"
    replace_folder(target, lambda f: write_atomic(f / "old", b"1"))
    replace_folder(target, lambda f: (f / "new").write_bytes(b"2") and None)
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["save"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o700


def test_fill_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise DataError("stop")

    target = tmp_path / "save"
    replace_folder(target, lambda f: write_atomic(f / "old", b"1"))
    with pytest.raises(DataError):
        replace_folder(target, fail)
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["save"]


def test_folder_is_replaced_in_steps_where_no_exchange_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    target = tmp_path / "save"
    for name in ("a", "b"):
        replace_folder(target, lambda f, name=name: write_atomic(f / name, b""))
    assert os.listdir(target) == ["b"]
    assert os.listdir(tmp_path) == ["save"]


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ({"save": "old", ".save.cutlayer-new": "new"}, "new"),
        ({".save.cutlayer-old": "old", ".save.cutlayer-new": "new"}, "new"),
        ({"save": "new", ".save.cutlayer-old": "old"}, "new"),
        ({".save.cutlayer-old": "old"}, "old"),
        ({"save": "old", ".save.cutlayer-tmp": "half"}, "old"),
    ],
)
def test_settling_ends_every_interrupted_exchange(
    tmp_path: Path, present: dict[str, str], expected: str
) -> None:
    for name, content in present.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / content).touch()
    settle_folder(tmp_path / "save")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["save"]
    assert os.listdir(tmp_path / "save") == [expected]


_WRITER = """
import sys
from pathlib import Path
from cutlayer.storage.files import replace_folder, write_atomic
target = Path(sys.argv[1])
number = 0
while True:
    def fill(folder):
        for part in range(4):
            (folder / str(part)).write_text(str(number))
    replace_folder(target / "folder", fill)
    write_atomic(target / "file", str(number).encode() * 1000)
    number += 1
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.011, 0.017, 0.029])
def test_killed_writer_leaves_whole_folder_and_whole_file(tmp_path: Path, delay_s: float) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        done = [b"1", *process.stdout.read().split()]
    settle_folder(tmp_path / "folder")
    remove_leftovers(tmp_path)
    numbers = {(tmp_path / "folder" / str(part)).read_text() for part in range(4)}
    assert len(numbers) == 1
    assert int(numbers.pop()) >= int(done[-1]) - 1
    content = (tmp_path / "file").read_bytes()
    assert content == content[: len(content) // 1000] * 1000
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def _with_file_limit(code: str, folder: Path) -> str:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], preexec_fn=limit, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


_TOO_LARGE = """
import sys
from pathlib import Path
from cutlayer.errors import StorageError
from cutlayer.storage.files import replace_folder, write_atomic
folder = Path(sys.argv[1])
for action in (
    lambda: write_atomic(folder / "file", (b"x" * 9999 for _ in range(9))),
    lambda: replace_folder(folder / "sub", lambda f: (f / "a").write_bytes(b"x" * 99999) and None),
):
    try:
        action()
        print("written")
    except StorageError as error:
        print(error)
"""


def test_no_space_is_a_storage_error_and_loses_nothing(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"old")
    replace_folder(tmp_path / "sub", lambda f: write_atomic(f / "a", b"old"))
    lines = _with_file_limit(_TOO_LARGE, tmp_path).splitlines()
    assert len(lines) == 2
    assert all("free space" in line and str(tmp_path) in line for line in lines)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "sub" / "a").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["file", "sub"]


@pytest.mark.system
def test_full_disk_keeps_what_was_saved(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        write_atomic(tmp_path / "file", b"o" * 1000)
        replace_folder(tmp_path / "sub", lambda f: write_atomic(f / "a", b"old"))
        with pytest.raises(StorageError, match=r"No space left.*free space"):
            write_atomic(tmp_path / "file", b"x" * 1_000_000)
        with pytest.raises(StorageError, match=r"No space left.*free space"):
            replace_folder(tmp_path / "sub", lambda f: write_atomic(f / "a", b"x" * 1_000_000))
        assert (tmp_path / "file").read_bytes() == b"o" * 1000
        assert (tmp_path / "sub" / "a").read_bytes() == b"old"
        assert sorted(os.listdir(tmp_path)) == ["file", "sub"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_private_folder_is_created_closed(tmp_path: Path) -> None:
    path = private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert private_folder(path) == path


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_open_folder_is_refused_with_the_command_that_closes_it(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(StorageError, match=f"{mode:04o}.*chmod 700 {path}"):
        private_folder(path)


def test_file_in_place_of_a_private_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(StorageError, match="is a file"):
        private_folder(tmp_path / "a")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_private_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    write_atomic(tmp_path / "key", b"secret")
    assert read_private(tmp_path / "key") == b"secret"
    (tmp_path / "key").chmod(mode)
    with pytest.raises(StorageError, match="chmod 600") as caught:
        read_private(tmp_path / "key")
    assert "secret" not in str(caught.value)


def test_pipe_in_place_of_a_private_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key", 0o600)
    with pytest.raises(StorageError, match="not a plain file"):
        read_private(tmp_path / "key")


def test_missing_private_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"key.*check the path"):
        read_private(tmp_path / "key")
