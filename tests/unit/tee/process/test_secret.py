"""Keys in hidden pages: never copied by accident, zeroed when closed."""

import copy
import ctypes
import os
import pickle
import sys
from pathlib import Path

import pytest

from cutlayer.errors import StorageError
from cutlayer.tee.process import secret as room
from cutlayer.tee.process.secret import SecretBytes, has_secret_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages of Linux")
KEY = bytes(range(32))


def test_taking_bytes_zeroes_their_source() -> None:
    source = bytearray(KEY)
    with SecretBytes.take(source) as secret:
        assert secret.matches(KEY)
        assert not secret.matches(KEY[::-1])
        assert len(secret) == 32
    assert source == bytes(32)


def test_the_kernel_hides_the_pages_where_it_can() -> None:
    with SecretBytes.random(32) as secret:
        assert secret.is_hidden == has_secret_memory()


def test_random_secrets_differ() -> None:
    with SecretBytes.random(5000) as one, SecretBytes.random(5000) as two, two.view() as view:
        assert not one.matches(bytes(view))
        assert any(view[4096:])


def test_closing_zeroes_the_pages_and_ends_their_use(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of ordinary pages, which a second map of the same file lets us look at afterwards.
    descriptor = os.memfd_create("page")
    monkeypatch.setattr(room, "system_call", lambda *_: os.dup(descriptor))
    secret = SecretBytes.take(bytearray(KEY))
    assert os.pread(descriptor, 32, 0) == KEY
    secret.close()
    secret.close()
    assert os.pread(descriptor, 32, 0) == bytes(32)
    os.close(descriptor)
    with pytest.raises(StorageError, match="was closed"):
        secret.view()


def test_forgetting_a_secret_zeroes_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.memfd_create("page")
    monkeypatch.setattr(room, "system_call", lambda *_: os.dup(descriptor))
    secret = SecretBytes.take(bytearray(KEY))
    del secret
    assert os.pread(descriptor, 32, 0) == bytes(32)
    os.close(descriptor)


def test_a_secret_is_not_printed_pickled_or_copied() -> None:
    with SecretBytes.take(bytearray(KEY)) as secret:
        assert f"{secret} {secret!r}" == "SecretBytes(32 bytes) SecretBytes(32 bytes)"
        for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="not copied"):
                duplicate(secret)


def test_a_child_process_does_not_get_the_pages() -> None:
    with SecretBytes.take(bytearray(KEY)) as secret, secret.view() as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        maps = Path("/proc/self/smaps").read_text()
        pages = maps[maps.index(f"{address:x}-") :]
        flags = pages[pages.index("VmFlags:") :].partition("\n")[0].split()
        # Not copied by a fork.
        assert "dc" in flags


def test_without_hidden_memory_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(room, "system_call", refuse)
    assert not has_secret_memory()
    with SecretBytes.take(bytearray(KEY)) as secret:
        assert not secret.is_hidden
        assert secret.matches(KEY)
