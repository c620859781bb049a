"""Evidence that a package of the public index ships, for machines without the published samples.

Downloaded once into pytest's cache, checked by its digest, never installed or imported.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WHEEL = "omne_attest-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "18e581b52c7ec8fe46bffac136073ff270cb329cbe26b26ce8b6b1dcba7965ad"
TIMEOUT_S = 30


def snp_vectors(folder: Path) -> dict[str, bytes]:
    """Files of the wheel's vectors by name; skips where no index can be reached.

    Args:
        folder: of the cache.
    """
    path = folder / WHEEL
    if not path.exists():
        _download("omne-attest==0.1.0", folder)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == WHEEL_SHA256
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if "/vectors/" in name]
        return {Path(name).name: wheel.read(name) for name in names}


def _download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "0", "--timeout", "5"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index did not answer in time")
    if done.returncode != 0:
        pytest.skip(f"no package index, or no {requirement} in it")
