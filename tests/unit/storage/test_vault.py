"""Sealed bytes open under the same key and context alone."""

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.errors import StorageError
from cutlayer.storage import vault as vault_module
from cutlayer.storage.vault import (
    AesVault,
    NoVault,
    is_sealed,
    new_key_file,
    open_run_vault,
    open_vault,
)

_VAULT = AesVault(b"k" * 32)


@given(data=st.binary(max_size=300), context=st.text(max_size=20))
def test_sealed_bytes_open_again(data: bytes, context: str) -> None:
    sealed = _VAULT.seal(data, context)
    assert is_sealed(sealed)
    assert _VAULT.open(sealed, context) == data
    assert _VAULT.seal(data, context) != sealed


def test_values_of_several_chunks_open_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault_module, "_CHUNK_BYTES", 10)
    for size in (0, 9, 10, 11, 20, 35):
        data = bytes(range(size))
        assert _VAULT.open(_VAULT.seal(data, "c"), "c") == data


def test_chunks_can_be_neither_dropped_nor_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault_module, "_CHUNK_BYTES", 10)
    sealed = _VAULT.seal(b"0123456789" * 3, "c")
    head, chunks = sealed[:44], [sealed[44 + 26 * i : 70 + 26 * i] for i in range(3)]
    for kept in ([0, 1], [0], [1, 0, 2], [0, 2], [0, 1, 2, 2], []):
        with pytest.raises(StorageError):
            _VAULT.open(head + b"".join(chunks[i] for i in kept), "c")


@given(st.data())
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    sealed = bytearray(_VAULT.seal(b"some text", "c"))
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StorageError):
        _VAULT.open(bytes(sealed), "c")


def test_moved_value_is_refused() -> None:
    with pytest.raises(StorageError, match="moved"):
        _VAULT.open(_VAULT.seal(b"x", "line 1"), "line 2")


def test_wrong_key_is_named_by_id_without_the_key() -> None:
    with pytest.raises(StorageError, match="set the storage key that sealed it") as caught:
        AesVault(b"w" * 32).open(_VAULT.seal(b"x", "c"), "c")
    assert (b"w" * 32).hex() not in str(caught.value)
    assert (b"k" * 4).hex() not in repr(_VAULT)


def test_plain_and_sealed_values_are_not_confused() -> None:
    assert NoVault().open(NoVault().seal(b"plain", "c"), "c") == b"plain"
    with pytest.raises(StorageError, match="is encrypted"):
        NoVault().open(_VAULT.seal(b"x", "c"), "c")
    with pytest.raises(StorageError, match="not encrypted"):
        _VAULT.open(b"plain", "c")


def test_key_comes_from_a_private_file_or_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "storage.key"
    new_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("TEST_KEY", path.read_text())
    sealed = open_vault(key_file=path).seal(b"x", "c")
    assert open_vault(key_variable="TEST_KEY").open(sealed, "c") == b"x"
    assert isinstance(open_vault(), NoVault)
    with pytest.raises(StorageError, match="exists"):
        new_key_file(path)
    path.chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        open_vault(key_file=path)


@pytest.mark.parametrize("text", ["", "abc", "zz" * 32, "ab" * 31, "ab" * 33, "ü" * 64])
def test_malformed_key_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TEST_KEY", text)
    with pytest.raises(StorageError, match="TEST_KEY must hold 64 hex digits") as caught:
        open_vault(key_variable="TEST_KEY")
    assert not text or text not in str(caught.value)


def test_missing_variable_and_two_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="NO_SUCH is not set"):
        open_vault(key_variable="NO_SUCH")
    with pytest.raises(StorageError, match="not both"):
        open_vault(key_file=tmp_path / "k", key_variable="K")


def test_each_run_has_its_own_key_under_the_owners(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first, second = (open_run_vault(folder, _VAULT) for folder in folders)
    sealed = first.seal(b"x", "c")
    assert open_run_vault(folders[0], _VAULT).open(sealed, "c") == b"x"
    with pytest.raises(StorageError, match="key that sealed it"):
        second.open(sealed, "c")
    with pytest.raises(StorageError, match="key that sealed it"):
        open_run_vault(folders[0], AesVault(b"w" * 32))
    with pytest.raises(StorageError, match="is encrypted"):
        open_run_vault(folders[0], NoVault())
    (tmp_path / "c").mkdir()
    assert isinstance(open_run_vault(tmp_path / "c", NoVault()), NoVault)
