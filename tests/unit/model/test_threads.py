"""Threads of decode steps, and of everything else."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cutlayer.model.checkpoint import load_parts
from cutlayer.model.folder import resolve_model
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.partition import Cut
from cutlayer.model.rows import Rows
from cutlayer.model.threads import with_threads
from tests.tiny_models import tiny_llama_folder


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_number_is_put_back_after_an_error() -> None:
    def fail() -> None:
        with with_threads(1):
            assert torch.get_num_threads() == 1
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("num_tokens", "is_cached", "wanted"), [(1, 1, 1), (40, 1, 2), (1, 0, 2)])
def test_few_cached_tokens_alone_are_computed_with_fewer_threads(
    tmp_path: Path, num_tokens: int, is_cached: bool, wanted: int
) -> None:
    _, trunk, _ = load_parts(
        resolve_model(str(tiny_llama_folder(tmp_path))), Cut(1, 3), "float32", "cpu"
    )
    trunk.decode_threads = 1
    seen: list[int] = []
    trunk.base.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    caches = [RowCache(2, 64)] if is_cached else None
    trunk(torch.zeros(num_tokens, trunk.hidden_size), Rows(lengths=(num_tokens,)), caches)
    assert seen == [wanted]
    assert torch.get_num_threads() == 2
