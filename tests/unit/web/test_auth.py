"""The token and the gate."""

import stat
from pathlib import Path

import pytest

from cutlayer.errors import ConfigError, StorageError
from cutlayer.web import auth
from cutlayer.web.auth import Gate, ensure_token, read_token

TOKEN = "t" * 40


def _gate(now_s: float = 1000.0, token: str = TOKEN) -> Gate:
    return Gate(token, login_s=100.0, now_s=lambda: now_s)


def test_a_missing_token_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "http.token"
    token = ensure_token(path)
    assert len(token) >= auth.MIN_TOKEN_CHARS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_token(path) == token
    assert ensure_token(tmp_path / "other.token") != token


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "http.token"
    ensure_token(path)
    path.chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        ensure_token(path)


@pytest.mark.parametrize("content", [b"", b"secret\n", b"\xff" * 40, b"a" * 20 + b"\n" + b"a" * 20])
def test_a_file_that_holds_no_token_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "http.token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="holds no token"):
        ensure_token(path)


def test_reading_a_token_does_not_make_one(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="check the path"):
        read_token(tmp_path / "http.token")
    assert not list(tmp_path.iterdir())


def test_only_the_token_opens_the_gate() -> None:
    gate = _gate()
    assert gate.is_token(TOKEN)
    assert not any(gate.is_token(wrong) for wrong in ("", TOKEN[:-1], TOKEN + "t", "é" * 40))


def test_a_bearer_header_needs_scheme_and_token() -> None:
    gate = _gate()
    assert gate.is_bearer(f"Bearer {TOKEN}")
    assert gate.is_bearer(f"bearer  {TOKEN} ")
    for wrong in (None, "", TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer wrong"):
        assert not gate.is_bearer(wrong)


@pytest.mark.parametrize("given", ["", "short", "x" * 40, TOKEN])
def test_tokens_are_compared_in_constant_time(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []
    original = auth.compare_digest

    def spy(first: bytes, second: bytes) -> bool:
        seen.append((first, second))
        return original(first, second)

    monkeypatch.setattr(auth, "compare_digest", spy)
    gate = _gate()
    gate.is_bearer(f"Bearer {given}")
    gate.is_bearer(given)
    gate.is_cookie("1.forged")
    assert len(seen) == 3
    assert seen[0] == (given.encode(), TOKEN.encode())


def test_a_cookie_outlives_a_restart_until_it_expires() -> None:
    cookie = _gate(now_s=1000).new_cookie()
    assert TOKEN not in cookie
    assert _gate(now_s=1099).is_cookie(cookie)
    assert not _gate(now_s=1100).is_cookie(cookie)
    assert not _gate(token="u" * 40).is_cookie(cookie)


@pytest.mark.parametrize(
    "forged", [None, "", ".", "9999999999", "9999999999.", "x.y", "²." + "0" * 64]
)
def test_a_forged_cookie_is_refused(forged: str | None) -> None:
    assert not _gate().is_cookie(forged)


def test_a_cookie_with_a_later_date_is_refused() -> None:
    _, _, signature = _gate().new_cookie().partition(".")
    assert not _gate().is_cookie(f"9999999999.{signature}")


def test_two_servers_of_one_host_have_cookies_of_different_names() -> None:
    assert _gate().cookie_name != _gate(token="u" * 40).cookie_name
