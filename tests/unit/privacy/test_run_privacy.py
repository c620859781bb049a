"""Secret and ledger belong together."""

from pathlib import Path

import pytest

from cutlayer.errors import StorageError
from cutlayer.privacy.ledger import Release
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.run_privacy import LEDGER_FILE, SECRET_FILE, open_run_privacy
from cutlayer.storage.vault import AesVault

EVENT = MECHANISMS.make("none").event(1)


def use(folder: Path, vault: AesVault | None = None) -> bytes:
    with open_run_privacy(folder, "run-1", vault) as run:
        run.ledger.account("activations", EVENT, "base", [Release(key="0" * 32, num_vectors=1)])
    return (folder / SECRET_FILE).read_bytes()


def test_a_run_keeps_its_secret_and_its_ledger(tmp_path: Path):
    folder = tmp_path / "run"
    secret = use(folder)
    assert use(folder) == secret
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in (SECRET_FILE, LEDGER_FILE):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    with open_run_privacy(folder, "run-1") as run:
        assert run.ledger.summary().num_lines == 1


def test_a_ledger_without_its_secret_is_refused(tmp_path: Path):
    folder = tmp_path / "run"
    use(folder)
    (folder / SECRET_FILE).unlink()
    with pytest.raises(StorageError, match="is missing but the run has released before"):
        open_run_privacy(folder, "run-1")
    assert not (folder / SECRET_FILE).exists()


def test_a_refused_open_releases_the_ledger_file(tmp_path: Path):
    folder = tmp_path / "run"
    secret = use(folder)
    (folder / SECRET_FILE).unlink()
    with pytest.raises(StorageError):
        open_run_privacy(folder, "run-1")
    (folder / SECRET_FILE).write_bytes(secret)
    (folder / SECRET_FILE).chmod(0o600)
    assert use(folder) == secret


def test_both_can_be_encrypted_at_rest(tmp_path: Path):
    folder, vault = tmp_path / "run", AesVault(b"v" * 32)
    use(folder, vault)
    assert b"activations" not in (folder / LEDGER_FILE).read_bytes()
    with open_run_privacy(folder, "run-1", vault) as run:
        assert run.ledger.summary().num_lines == 1
    with pytest.raises(StorageError):
        open_run_privacy(folder, "run-1")
