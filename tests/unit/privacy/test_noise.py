"""Counter-based noise: deterministic by key, normal, secret."""

import copy
import math
import pickle
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.errors import StorageError
from cutlayer.privacy.noise import (
    NoiseContext,
    RowNoise,
    RunSecret,
    release_key,
    standard_normals,
)
from cutlayer.storage.vault import AesVault

CONTEXT = NoiseContext(boundary="activations", mechanism="gaussian scale=0.02", version="base")
H = np.arange(12, dtype=np.float32).reshape(3, 4)
SECRET = RunSecret(bytes(range(32)))


def test_normals_never_change_between_versions_of_this_software():
    # Golden values: a changed generator would draw new noise over old data after an upgrade.
    normals = standard_normals(bytes(range(32)), 5)
    expected = [-1.1977988, -0.7748929, -0.5237410, -0.5717132, -1.3787607]
    np.testing.assert_allclose(normals, expected, rtol=0, atol=1e-6)


def test_noise_key_never_changes_between_versions_of_this_software():
    key = SECRET.noise_key(CONTEXT, "row-0", 0, H)
    assert key.hex() == "6f92efa494581791e75c23f0781e75697c1c2654cc31e8161395ee466e4bd59c"


def test_normals_are_standard_normal_and_float32():
    count = 400_000
    z = standard_normals(b"k" * 32, count).astype(np.float64)
    assert standard_normals(b"k" * 32, 3).dtype == np.float32
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / count), power
    inside = float((np.abs(z) < 1).mean())
    assert abs(inside - 0.682689) < 5 * math.sqrt(0.6827 * 0.3173 / count)


def test_the_two_halves_of_box_muller_are_uncorrelated():
    count = 400_000
    z = standard_normals(b"k" * 32, count).astype(np.float64)
    half = count // 2
    for a, b in ((z[:half], z[half:]), (z[:-1], z[1:]), (z[:half] ** 2 - 1, z[half:] ** 2 - 1)):
        scale = a.std() * b.std() * math.sqrt(len(a))
        assert abs(float((a * b).sum()) / scale) < 5


@given(count=st.integers(1, 700), key=st.binary(min_size=32, max_size=32))
def test_the_same_key_gives_the_same_finite_values(count: int, key: bytes):
    first = standard_normals(key, count)
    assert first.shape == (count,)
    assert np.isfinite(first).all()
    assert np.abs(first).max() < 8.6
    assert first.tobytes() == standard_normals(key, count).tobytes()


def test_different_keys_give_unrelated_values():
    z = [standard_normals(bytes([i]) * 32, 100_000).astype(np.float64) for i in range(3)]
    for a, b in ((z[0], z[1]), (z[0], z[2]), (z[1], z[2])):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(100_000)


def test_every_part_of_the_context_changes_the_key():
    keys = {
        SECRET.noise_key(CONTEXT, "row-0", 0, H),
        SECRET.noise_key(replace(CONTEXT, boundary="gradients"), "row-0", 0, H),
        SECRET.noise_key(replace(CONTEXT, mechanism="gaussian scale=0.05"), "row-0", 0, H),
        SECRET.noise_key(replace(CONTEXT, version="step-1"), "row-0", 0, H),
        SECRET.noise_key(CONTEXT, "row-1", 0, H),
        SECRET.noise_key(CONTEXT, "row-0", 1, H),
        SECRET.noise_key(CONTEXT, "row-0", 0, H + np.float32(1e-6)),
        SECRET.noise_key(CONTEXT, "row-0", 0, np.ascontiguousarray(H.reshape(4, 3))),
        RunSecret(bytes(32)).noise_key(CONTEXT, "row-0", 0, H),
    }
    assert len(keys) == 9


def test_field_borders_cannot_be_shifted():
    a = SECRET.noise_key(replace(CONTEXT, version="ab"), "c", 0, H)
    b = SECRET.noise_key(replace(CONTEXT, version="a"), "bc", 0, H)
    assert a != b


def test_packed_rows_get_the_noise_that_they_get_alone():
    keys = [bytes([i]) * 32 for i in range(3)]
    together = RowNoise(keys, (2, 1, 3)).standard_normal(6, 5)
    alone = [
        RowNoise([k], (n,)).standard_normal(n, 5) for k, n in zip(keys, (2, 1, 3), strict=True)
    ]
    assert together[:2].equal(alone[0])
    assert together[2:3].equal(alone[1])
    assert together[3:].equal(alone[2])


def test_a_release_key_names_without_telling_the_noise_key():
    key = SECRET.noise_key(CONTEXT, "row-0", 0, H)
    name = release_key(key)
    assert len(bytes.fromhex(name)) == 16
    assert name == release_key(key)
    assert name not in key.hex()
    assert name != release_key(SECRET.noise_key(CONTEXT, "row-1", 0, H))


def test_noise_is_fast_enough_to_disappear_beside_the_model():
    def best_ms(count: int) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            standard_normals(b"k" * 32, count)
            times.append(time.perf_counter() - start)
        return 1000 * min(times)

    # 3x the promised 30 ms and 1 ms: a busy machine must not fail a correct build.
    assert best_ms(1024 * 576) < 90
    assert best_ms(576) < 3


def test_a_secret_is_saved_for_its_owner_alone_and_comes_back(tmp_path: Path):
    path = tmp_path / "run.secret"
    secret = RunSecret.new()
    secret.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == 32
    again = RunSecret.load(path)
    assert again.noise_key(CONTEXT, "r", 0, H) == secret.noise_key(CONTEXT, "r", 0, H)


def test_two_new_secrets_differ():
    a, b = RunSecret.new(), RunSecret.new()
    assert a.noise_key(CONTEXT, "r", 0, H) != b.noise_key(CONTEXT, "r", 0, H)


def test_a_secret_is_never_overwritten(tmp_path: Path):
    path = tmp_path / "run.secret"
    RunSecret.new().save(path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="keeps one secret"):
        RunSecret.new().save(path)
    assert path.read_bytes() == before


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path):
    path = tmp_path / "run.secret"
    RunSecret.new().save(path)
    path.chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        RunSecret.load(path)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_cut_or_grown_secret_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "run.secret"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(StorageError, match=f"holds {size} bytes"):
        RunSecret.load(path)


def test_a_secret_can_be_encrypted_at_rest(tmp_path: Path):
    path, vault = tmp_path / "run.secret", AesVault(b"v" * 32)
    SECRET.save(path, vault)
    assert bytes(range(32)) not in path.read_bytes()
    again = RunSecret.load(path, vault)
    assert again.noise_key(CONTEXT, "r", 0, H) == SECRET.noise_key(CONTEXT, "r", 0, H)
    with pytest.raises(StorageError, match="encrypted"):
        RunSecret.load(path)


def test_a_secret_shows_itself_nowhere():
    shown = f"{SECRET} {SECRET!r} {[SECRET]}"
    assert bytes(range(32)).hex() not in shown
    assert repr(bytes(range(32)))[2:20] not in shown
    assert not hasattr(SECRET, "__dict__")
    with pytest.raises(TypeError, match="not serialised"):
        pickle.dumps(SECRET)
    with pytest.raises(TypeError, match="not serialised"):
        copy.deepcopy(SECRET)
