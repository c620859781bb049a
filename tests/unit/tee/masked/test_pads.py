"""Pads: uniform, never twice, and not shared by two copies of a process."""

import math
import os

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor, nn

from cutlayer.tee.masked.field import PRIME, words
from cutlayer.tee.masked.pads import SEED_BYTES, PadStream, Seeds, expand, here, replace_excess
from tests.masked_worlds import HostileAccelerator, masked, pooled_place

NUM_BINS = 64
# 1 in 10,000 by chance; seeds are fresh, so each statistic may fail once in so many runs.
CHI_SQUARE_63 = 113.0
KOLMOGOROV = 2.23
SIGMAS = 4.0


def _seen(x: Tensor) -> Tensor:
    accelerator = HostileAccelerator()
    layer = nn.Linear(x.shape[1], 3, bias=False)
    with torch.no_grad():
        masked(layer, pooled_place(accelerator))(x)
    return accelerator.seen[0]


def _chi_square(values: Tensor) -> float:
    counts = np.bincount(values.flatten().numpy() // (PRIME // NUM_BINS + 1), minlength=NUM_BINS)
    width = PRIME // NUM_BINS + 1
    sizes = np.minimum(width, PRIME - width * np.arange(NUM_BINS))
    wanted = values.numel() * sizes / PRIME
    return float(((counts - wanted) ** 2 / wanted).sum())


def _kolmogorov(values: Tensor) -> float:
    shares = np.sort(values.flatten().numpy().astype(np.float64) / PRIME)
    steps = np.arange(1, len(shares) + 1) / len(shares)
    gap = max(np.abs(steps - shares).max(), np.abs(shares - steps + 1 / len(shares)).max())
    return float(gap * math.sqrt(len(shares)))


@pytest.mark.parametrize("kind", ["zeros", "equal", "large", "random"])
def test_masked_values_are_uniform_whatever_the_input(kind: str) -> None:
    torch.manual_seed(0)
    inputs = {
        "zeros": torch.zeros(128, 512),
        "equal": torch.ones(128, 512),
        "large": torch.full((128, 512), -1e30),
        "random": torch.randn(128, 512),
    }
    seen = _seen(inputs[kind])
    assert int(seen.min()) >= 0
    assert int(seen.max()) < PRIME
    assert _chi_square(seen) < CHI_SQUARE_63
    assert _kolmogorov(seen) < KOLMOGOROV
    for bit in range(31):
        ones = ((seen >> bit) & 1).double()
        assert abs(float(ones.mean()) - 0.5) * 2 * math.sqrt(seen.numel()) < SIGMAS + 1


def test_masked_values_tell_nothing_of_the_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 512)
    seen = _seen(x).double() / PRIME - 0.5
    for shown in (seen, seen.abs(), (seen * 2**20) % 1):
        pair = torch.stack([x.flatten().double(), shown.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) * math.sqrt(x.numel()) < SIGMAS
    # Two rows with one input differ by a uniform residue, too.
    same = _seen(torch.ones(2, 40000)).to(torch.int64)
    assert _chi_square((same[0] - same[1]) % PRIME) < CHI_SQUARE_63


def test_uniform_tests_can_fail() -> None:
    torch.manual_seed(0)
    narrow = (torch.randn(60000) * 1e8 + 1e9).to(torch.int64).clamp_(0, PRIME - 1)
    assert _chi_square(narrow) > CHI_SQUARE_63
    assert _kolmogorov(narrow) > KOLMOGOROV


def test_a_stream_is_aes_ctr_whatever_the_pieces() -> None:
    seed = os.urandom(SEED_BYTES)
    raw = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(4 * 300000))
    wanted = np.frombuffer(raw, dtype="<u4") & np.uint32(PRIME)
    whole = expand(seed, 3, 100000)
    assert np.array_equal(words(whole).reshape(-1), wanted)
    stream, pieces = PadStream(seed), torch.empty(3, 100000, dtype=torch.int32)
    for start, end in ((0, 1), (1, 3)):
        stream.fill(words(pieces[start:end]))
    assert torch.equal(pieces, whole)


def test_the_one_excess_value_is_drawn_anew() -> None:
    piece = np.array([5, PRIME, 7, PRIME], dtype=np.uint32)
    instead = iter([[PRIME, 11], [13]])
    replace_excess(piece, lambda count: np.array(next(instead), dtype=np.uint32))
    assert piece.tolist() == [5, 13, 7, 11]


def test_seeds_are_never_drawn_twice() -> None:
    seeds, others = Seeds(), Seeds()
    drawn = [place.draw() for place in (seeds, others) for _ in range(2000)]
    assert len(set(drawn)) == 4000
    assert all(len(seed) == SEED_BYTES for seed in drawn)


def test_a_forked_child_draws_other_seeds_in_another_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Even where the operating system gave both copies the same bytes at the same time.
    monkeypatch.setattr("os.urandom", lambda count: bytes(count))
    monkeypatch.setattr("time.time_ns", lambda: 0)
    monkeypatch.setattr("time.monotonic_ns", lambda: 0)
    seeds = Seeds()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, seeds.draw() + bytes([seeds.epoch]))
        os._exit(0)
    told = os.read(reading, 100)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    assert told[:SEED_BYTES] != seeds.draw()
    assert told[SEED_BYTES] == seeds.epoch + 1


@pytest.mark.parametrize("change", [("other boot", 0.0, 0.0), ("boot", 5.0, 0.0), ("boot", 0, 9.0)])
def test_a_copy_that_wakes_up_elsewhere_is_in_another_epoch(
    change: tuple[str, float, float],
) -> None:
    place = ("boot", 0.0, 0.0)
    seeds = Seeds(lambda: place)
    before = seeds.current_epoch()
    place = ("boot", 0.3, 0.0)
    assert seeds.current_epoch() == before
    place = change
    assert seeds.current_epoch() > before


def test_this_machine_does_not_look_like_a_snapshot() -> None:
    seeds = Seeds()
    before = seeds.epoch
    for _ in range(50):
        seeds.draw()
    assert seeds.epoch == before
    assert here()[0] == here()[0] != ""


def test_a_new_epoch_can_be_asked_for() -> None:
    seeds = Seeds()
    before = seeds.epoch
    seeds.renew()
    assert seeds.epoch == before + 1
