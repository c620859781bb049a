"""A kit that was changed in any way is refused."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cutlayer.errors import CutlayerError, PermissionRefused, StorageError
from cutlayer.identity.authority import Authority, approve
from cutlayer.identity.certificates import load_certificates
from cutlayer.identity.install import install
from cutlayer.identity.keys import load_key
from cutlayer.identity.kit import open_kit, show_kit, write_kit
from cutlayer.identity.request import request
from cutlayer.storage.files import write_atomic
from tests.unit.identity.conftest import Federation


def _kit_of(federation: Federation, name: str = "mercy") -> Path:
    federation.join(name)
    return next((federation.authority.folder / "kits").glob(f"{name}-*"))


def _unpack(kit: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(kit) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _pack(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_kit_holds_no_secret_and_reads_alike_as_zip_and_folder(
    federation: Federation, tmp_path: Path
) -> None:
    kit = _kit_of(federation)
    files = _unpack(kit)
    assert sorted(files) == [
        "authority.pem",
        "certificate.pem",
        "kit.json",
        "kit.sig",
        "revoked.pem",
    ]
    assert not any(b"PRIVATE" in data for data in files.values())
    (tmp_path / "folder").mkdir()
    for name, data in files.items():
        write_atomic(tmp_path / "folder" / name, data)
    assert show_kit(tmp_path / "folder") == show_kit(kit)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("kit.json", b'"train"', b'"serve"'),
        ("kit.json", b'"mercy"', b'"mallo"'),
        ("kit.json", b'"server_address": null', b'"server_address": "evil:1"'),
        ("kit.sig", b"M", b"N"),
        ("certificate.pem", b"-----BEGIN", b"\n-----BEGIN"),
        ("authority.pem", b"-----BEGIN", b"\n-----BEGIN"),
    ],
)
def test_changed_file_is_refused(
    federation: Federation, tmp_path: Path, name: str, old: bytes, new: bytes
) -> None:
    files = _unpack(_kit_of(federation))
    changed = files[name].replace(old, new, 1)
    assert changed != files[name]
    bad = _pack(tmp_path / "bad.zip", {**files, name: changed})
    with pytest.raises(PermissionRefused, match="ask"):
        open_kit(bad)


def test_files_of_two_kits_do_not_mix(
    make_federation: Callable[[str], Federation], tmp_path: Path
) -> None:
    one = make_federation("one")
    first, second = _unpack(_kit_of(one)), _unpack(_kit_of(one, "other"))
    foreign = _unpack(_kit_of(make_federation("two")))
    for name in ("certificate.pem", "kit.json", "kit.sig"):
        with pytest.raises(PermissionRefused):
            open_kit(_pack(tmp_path / "bad.zip", {**first, name: second[name]}))
    for name in foreign:
        with pytest.raises(CutlayerError):
            open_kit(_pack(tmp_path / "bad.zip", {**first, name: foreign[name]}))


def test_member_cannot_issue_kits_itself(federation: Federation, tmp_path: Path) -> None:
    insider = federation.join("mercy")
    (tmp_path / "fake").mkdir(mode=0o700)
    write_atomic(tmp_path / "fake" / "revoked.pem", (insider / "revoked.pem").read_bytes())
    fake = Authority(
        folder=tmp_path / "fake",
        certificate=load_certificates(insider / "certificate.pem")[0],
        key=load_key(insider / "key.pem"),  # type: ignore[arg-type]
        now=federation.clock,
    )
    asked = request(tmp_path / "b", "boss")
    kit = approve(fake, asked.path, ["administer"], 30, fingerprint=asked.fingerprint)
    with pytest.raises(PermissionRefused, match="did not issue"):
        install(kit, tmp_path / "b", fake.fingerprint)


def test_note_that_says_more_than_its_certificate_is_refused(
    federation: Federation, tmp_path: Path
) -> None:
    files, note = _unpack(_kit_of(federation)), show_kit(_kit_of(federation, "other"))
    own = open_kit(next((federation.authority.folder / "kits").glob("mercy-*"))).note
    for wrong in (
        msgspec.structs.replace(own, roles=("administer",)),
        msgspec.structs.replace(own, serial=note.serial),
        msgspec.structs.replace(own, authority_fingerprint=note.key_fingerprint),
    ):
        signed = {name: files[name] for name in files if name.endswith(".pem")}
        write_kit(tmp_path / "bad.zip", wrong, federation.authority.key, signed)
        with pytest.raises(PermissionRefused, match="does not describe"):
            open_kit(tmp_path / "bad.zip")


def test_incomplete_or_malformed_kit_is_refused(federation: Federation, tmp_path: Path) -> None:
    kit = _kit_of(federation)
    files, data = _unpack(kit), kit.read_bytes()
    for name in files:
        rest = {other: content for other, content in files.items() if other != name}
        with pytest.raises(StorageError, match=name):
            open_kit(_pack(tmp_path / "bad.zip", rest))
    for bad in (b"", b"hello", data[: len(data) // 2]):
        (tmp_path / "bad.zip").write_bytes(bad)
        with pytest.raises(StorageError, match="not a complete zip"):
            open_kit(tmp_path / "bad.zip")
    with pytest.raises(StorageError, match="check the path"):
        open_kit(tmp_path / "missing.zip")


def test_zip_bomb_is_refused_without_unpacking_it(federation: Federation, tmp_path: Path) -> None:
    files = _unpack(_kit_of(federation))
    bomb = _pack(tmp_path / "bad.zip", {**files, "certificate.pem": bytes(20 << 20)})
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(StorageError, match="too large"):
        open_kit(bomb)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(data=st.data())
def test_no_flipped_byte_changes_what_is_granted(
    federation: Federation, tmp_path: Path, data: st.DataObject
) -> None:
    if not (federation.folder / "mercy").exists():
        federation.join("mercy")
    kit = next((federation.authority.folder / "kits").glob("mercy-*"))
    raw, granted = bytearray(kit.read_bytes()), show_kit(kit)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "bad.zip").write_bytes(raw)
    try:
        assert show_kit(tmp_path / "bad.zip") == granted
    except CutlayerError:
        return


def test_paths_in_a_zip_are_never_followed(federation: Federation, tmp_path: Path) -> None:
    files = _unpack(_kit_of(federation))
    kit = open_kit(_pack(tmp_path / "odd.zip", {**files, "../evil": b"x"}))
    assert set(kit.files) == set(files)
    assert not (tmp_path.parent / "evil").exists()
