"""Fetches one release of a package as an archive, through pip, and checks its hash.

It does not install, unpack or cache. pip is run as a program, so that the owner's index, proxy and
certificate settings hold.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cutlayer.errors import StorageError, TransportError
from cutlayer.storage.files import explain_os_errors

__all__ = ["Release", "download"]

_LINK_TROUBLE = ("connection", "retrying", "timed out", "resolve", "proxy", "certificate", "ssl")


@dataclass(frozen=True, kw_only=True)
class Release:
    """One archive of one version of a package."""

    package: str
    """Name in the registry."""
    version: str
    """Exact version."""
    sha256: str
    """Of the archive, in hex."""
    is_source: bool = False
    """The source archive instead of the wheel."""

    @property
    def requirement(self) -> str:
        """The release as pip writes it."""
        return f"{self.package}=={self.version}"


@contextmanager
def download(release: Release, given: Path | None, timeout_s: float) -> Iterator[Path]:
    """The verified archive, deleted afterwards unless it was given.

    Args:
        release: what to fetch.
        given: the archive, where the owner downloaded it by hand.
        timeout_s: for pip as a whole.

    Raises:
        TransportError: the registry cannot be reached, lacks the release, or is too slow.
        StorageError: the archive has another hash or cannot be written.
    """
    if given is not None:
        _check_hash(given, release)
        yield given
        return
    with explain_os_errors("make a temporary folder"):
        folder = tempfile.TemporaryDirectory(prefix="cutlayer-")
    with folder as name:
        yield _run_pip(release, Path(name), timeout_s)


def _run_pip(release: Release, folder: Path, timeout_s: float) -> Path:
    pinned = folder / "requirements.txt"
    with explain_os_errors(f"write {pinned}"):
        pinned.write_text(f"{release.requirement} --hash=sha256:{release.sha256}\n")
        (folder / "archive").mkdir()
    try:
        done = subprocess.run(
            _pip_command(release),
            # An empty folder: with -m, Python would import a pip.py that lies in the current one.
            cwd=folder / "archive",
            env=_quiet(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TransportError(
            f"{release.requirement} was not fetched within {timeout_s:g} s; check the link, or "
            "download it by hand and give the file"
        ) from error
    if done.returncode != 0:
        _explain_failure(release, done.stderr)
    return _only_file(folder / "archive", release)


def _pip_command(release: Release) -> list[str]:
    form = ["--no-binary", release.package] if release.is_source else ["--only-binary", ":all:"]
    # With --require-hashes pip checks the archive before it looks into it; that matters for a
    # source archive, whose metadata pip gets by running the package's own build script.
    return [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"),
        *(*form, "--requirement", "../requirements.txt", "--dest", "."),
    ]


def _quiet(environment: Mapping[str, str]) -> dict[str, str]:
    # A PIP_REQUIREMENT or PIP_DEST of the owner's shell would fetch other things too.
    unwanted = ("PIP_REQUIREMENT", "PIP_DEST", "PIP_CONSTRAINT", "PIP_TARGET", "PIP_NO_BINARY")
    return {key: value for key, value in environment.items() if key not in unwanted}


def _explain_failure(release: Release, stderr: str) -> None:
    if "DO NOT MATCH THE HASHES" in stderr:
        raise StorageError(
            f"the registry's {release.requirement} has not the pinned SHA-256 {release.sha256}; "
            "do not use it, and ask who runs your package index"
        )
    if "No module named pip" in stderr:
        raise StorageError(f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`")
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")]
    reason = (errors or stderr.splitlines() or ["pip gave no reason"])[-1].strip()
    is_link = any(word in stderr.lower() for word in _LINK_TROUBLE)
    what = "the package registry cannot be reached" if is_link else "pip failed"
    raise TransportError(
        f"cannot fetch {release.requirement}: {what} ({reason[:300]}); check network, proxy and "
        "pip's index settings, or download the file by hand and give it"
    )


def _only_file(folder: Path, release: Release) -> Path:
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise StorageError(f"pip left {len(files)} files for {release.requirement}, expected one")
    _check_hash(files[0], release)
    return files[0]


def _check_hash(path: Path, release: Release) -> None:
    with explain_os_errors(f"read {path}"), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != release.sha256:
        raise StorageError(
            f"{path} has SHA-256 {found}, {release.requirement} must have {release.sha256}; "
            "fetch it again"
        )
