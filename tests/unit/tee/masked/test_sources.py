"""Pads made ahead: each once, none from before a fork or a snapshot, and a named end."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cutlayer.errors import CacheFull
from cutlayer.tee.masked.dealer_key import DealerKey
from cutlayer.tee.masked.field import PRIME, Words
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.offload import Pad, PadSource
from cutlayer.tee.masked.pads import Seeds
from cutlayer.tee.masked.quantise import quantise_weight
from cutlayer.tee.masked.remote import RemoteDealing, WorkerLink
from cutlayer.tee.masked.sources import Dealer, Pool, PoolLimits
from cutlayer.tee.masked.worker import Worker
from tests.masked_worlds import answering

WIDTH = 10


def _pool(waits: bool = False, seeds: Seeds | None = None, num_tokens: int = 40) -> Pool:
    torch.manual_seed(0)
    pool = Pool(PoolLimits(num_tokens=num_tokens, waits=waits, idle_s=0.01), seeds)
    pool.hold("layer", quantise_weight(torch.randn(4, WIDTH), 16))
    return pool


def _words(pad: Pad, num_tokens: int) -> Words:
    found = np.empty((num_tokens, WIDTH), dtype=np.uint32)
    pad.fill(found)
    return found


def test_every_row_of_the_pool_is_given_once() -> None:
    pool = _pool()
    assert pool.fill() == 2 * 64
    sizes = [1, 7, 30, 2, 20]
    given = np.concatenate([_words(pool.take("layer", size, False), size) for size in sizes])
    assert len(np.unique(given)) == given.size
    assert pool.num_ready("layer", False) == 4
    assert pool.num_ready("layer", True) == 64


def test_an_empty_pool_is_a_named_error_that_says_when_to_ask_again() -> None:
    pool = _pool()
    with pytest.raises(CacheFull, match="pad pool exhausted: 0 of 3") as caught:
        pool.take("layer", 3, False)
    assert caught.value.retry_after_s is not None
    pool.fill()
    pool.take("layer", 3, False)


def test_an_empty_pool_makes_what_is_missing_where_it_may_wait() -> None:
    pool = _pool(waits=True)
    pool.fill_some()
    pool.fill_some()
    pad = pool.take("layer", 50, False)
    assert len(np.unique(_words(pad, 50))) == 50 * WIDTH
    assert pad.unmask_NM().shape == (50, 8)


def test_a_pad_cannot_be_read_twice() -> None:
    pool = _pool(waits=True)
    pad = pool.take("layer", 2, False)
    _words(pad, 2)
    with pytest.raises(AssertionError, match="once"):
        _words(pad, 1)


def test_a_forked_child_has_no_pad_of_its_parent() -> None:
    pool = _pool()
    pool.fill()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ready = pool.num_ready("layer", False)
        pool.fill_some()
        pool.fill_some()
        os.write(writing, bytes([ready]) + _words(pool.take("layer", 30, False), 30).tobytes())
        os._exit(0)
    told = b""
    while len(told) < 1 + 30 * WIDTH * 4 and (got := os.read(reading, 4096)):
        told += got
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    assert told[0] == 0
    theirs = np.frombuffer(told[1:], dtype=np.uint32)
    ours = _words(pool.take("layer", 64, False), 64)
    assert len(theirs) == 30 * WIDTH
    assert not np.isin(theirs, ours).any()


def test_a_restored_snapshot_has_no_pad_from_before() -> None:
    place = ("boot", 0.0, 0.0)
    pool = _pool(seeds=Seeds(lambda: place))
    pool.fill()
    assert pool.num_ready("layer", False) == 64
    place = ("boot", 60.0, 0.0)
    assert pool.num_ready("layer", False) == 0
    with pytest.raises(CacheFull):
        pool.take("layer", 1, False)


def test_pads_are_made_while_nothing_else_goes_on() -> None:
    pool = _pool()
    pool.start()
    deadline_s = time.monotonic() + 20
    while pool.num_ready("layer", True) < 40 or pool.num_ready("layer", False) < 40:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    pool.close()


@pytest.mark.parametrize("kind", ["pool", "dealer"])
@pytest.mark.parametrize("transpose", [False, True])
def test_what_a_source_gives_takes_its_own_pad_off(
    kind: str, transpose: bool, tmp_path: Path
) -> None:
    """Conformance of pad sources."""
    torch.manual_seed(0)
    weight = quantise_weight(torch.randn(4, WIDTH), 16)
    multiplier = Multiplier()
    multiplier.hold("layer", weight)
    key = DealerKey.load(tmp_path / "key")
    with answering(Worker("dealer", Multiplier(), key).serve) as open_:
        link = WorkerLink("a:1", "dealer", 5.0, key.public_hex, open_=open_)
        source: PadSource = _pool(waits=True) if kind == "pool" else Dealer(RemoteDealing(link))
        source.hold("layer", weight)
        seen = set()
        for _ in range(3):
            pad = source.take("layer", 5, transpose)
            found = np.empty((5, 4 if transpose else WIDTH), dtype=np.uint32)
            pad.fill(found)
            pad_NK = torch.from_numpy(found.astype(np.int32))
            wanted = multiplier.unmask_of("layer", pad_NK, transpose)
            assert torch.equal(pad.unmask_NM(), wanted)
            assert int(pad_NK.min()) >= 0
            assert int(pad_NK.max()) < PRIME
            seen.add(found.tobytes())
        assert len(seen) == 3
        source.close()
