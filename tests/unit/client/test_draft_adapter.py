"""The draft adapter learns what a trunk does, disturbs nothing, and survives its file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.client.draft_adapter import (
    Distiller,
    DraftAdapter,
    load_draft_adapter,
    save_draft_adapter,
)
from cutlayer.errors import ConfigError, StorageError
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.partition import Cut
from cutlayer.model.rows import Rows, pack
from cutlayer.storage.vault import NoVault, new_key_file, open_vault
from tests.tiny_models import tiny_llama_folder

WIDTH = 48


def states(num: int, seed: int) -> Tensor:
    """Vectors [N, D] of very different sizes, as a residual stream has them."""
    generator = torch.Generator().manual_seed(seed)
    h_ND = torch.randn(num, WIDTH, generator=generator)
    return h_ND * torch.rand(num, 1, generator=generator).mul(3).exp()


def trunk(h_ND: Tensor) -> Tensor:
    """A change of low rank, not linear in h, that grows with h as a residual stream does."""
    generator = torch.Generator().manual_seed(99)
    inner_DR = torch.randn(WIDTH, 6, generator=generator) / WIDTH**0.5
    outer_RD = torch.randn(6, WIDTH, generator=generator)
    size_N1 = h_ND.square().mean(-1, keepdim=True).sqrt()
    return h_ND + torch.tanh(h_ND / size_N1 @ inner_DR) @ outer_RD * size_N1


def test_an_untrained_adapter_changes_nothing() -> None:
    h_ND = states(5, seed=0)
    assert torch.equal(DraftAdapter(WIDTH)(h_ND), h_ND)
    assert DraftAdapter(WIDTH)(h_ND.bfloat16()).dtype == torch.bfloat16


def test_distillation_finds_most_of_what_the_trunk_does() -> None:
    distiller = Distiller(DraftAdapter(WIDTH, rank=32))
    for call in range(400):
        h_ND = states(512, seed=call)
        distiller.observe(h_ND, trunk(h_ND))
    h_ND = states(512, seed=10_000)
    assert distiller.num_steps == 400
    assert distiller.relative_error(h_ND, trunk(h_ND)) < 0.15


def test_distilled_parts_guess_more_of_what_the_whole_model_says(tmp_path: Path) -> None:
    head, trunk_part, tail = load_parts(tiny_llama_folder(tmp_path), Cut(1, 3))
    distiller = Distiller(DraftAdapter(head.hidden_size))
    generator = torch.Generator().manual_seed(1)

    def through(num_rows: int) -> tuple[Tensor, Tensor, Rows]:
        tokens = torch.randint(0, 256, (num_rows, 64), generator=generator).tolist()
        rows = pack(tokens, [0] * num_rows)
        h_ND = head(rows)
        return h_ND, trunk_part(h_ND, rows.without_tokens()), rows.without_tokens()

    def share_right(h_ND: Tensor, y_ND: Tensor, rows: Rows) -> float:
        return float((tail(h_ND, rows).argmax(-1) == tail(y_ND, rows).argmax(-1)).float().mean())

    with torch.no_grad():
        for _ in range(300):
            h_ND, y_ND, _ = through(8)
            distiller.observe(h_ND, y_ND)
        h_ND, y_ND, rows = through(16)
        before = share_right(h_ND, y_ND, rows)
        after = share_right(distiller.adapter(h_ND), y_ND, rows)
    assert after > 1.5 * before


def test_distillation_works_beside_inference_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    distiller = Distiller(DraftAdapter(WIDTH))
    with torch.inference_mode():
        h_ND = states(512, seed=1)
        distiller.observe(h_ND, trunk(h_ND))
    assert distiller.num_steps == 1
    assert torch.equal(torch.rand(3), expected)


def test_distillation_leaves_the_graph_of_training_alone() -> None:
    distiller = Distiller(DraftAdapter(WIDTH))
    h_ND = states(512, seed=1).requires_grad_()
    y_ND = trunk(h_ND)
    distiller.observe(h_ND, y_ND)
    assert h_ND.grad is None
    y_ND.sum().backward()
    assert h_ND.grad is not None


def test_memory_and_steps_are_bounded_by_the_tokens_seen() -> None:
    distiller = Distiller(DraftAdapter(WIDTH))
    before = distiller._kept_2ND.nbytes
    for call in range(100):
        h_ND = states(100, seed=call)
        distiller.observe(h_ND, h_ND)
    assert distiller.num_steps <= 100 * 100 / 512 + 5
    assert distiller._kept_2ND.nbytes == before


def test_vectors_that_are_not_finite_are_not_learnt_from() -> None:
    distiller = Distiller(DraftAdapter(WIDTH))
    h_ND = states(512, seed=1)
    y_ND = trunk(h_ND)
    y_ND[::2] = torch.nan
    for _ in range(4):
        distiller.observe(h_ND, y_ND)
    assert distiller.num_steps >= 1
    assert all(p.isfinite().all() for p in distiller.adapter.parameters())


def test_one_pair_at_a_time_is_enough_to_learn() -> None:
    distiller = Distiller(DraftAdapter(WIDTH))
    for call in range(64):
        h_1D = states(1, seed=call)
        distiller.observe(h_1D, trunk(h_1D))
    assert distiller.num_steps == 1


def test_pairs_of_another_width_are_refused() -> None:
    distiller = Distiller(DraftAdapter(WIDTH))
    with pytest.raises(ConfigError, match="width 48"):
        distiller.observe(torch.zeros(3, 8), torch.zeros(3, 8))


@pytest.fixture
def learnt() -> DraftAdapter:
    distiller = Distiller(DraftAdapter(WIDTH, rank=7))
    h_ND = states(512, seed=1)
    distiller.observe(h_ND, trunk(h_ND))
    return distiller.adapter


def test_a_saved_adapter_comes_back_and_is_sealed(learnt: DraftAdapter, tmp_path: Path) -> None:
    new_key_file(tmp_path / "key")
    vault = open_vault(tmp_path / "key")
    assert load_draft_adapter(tmp_path, vault, WIDTH) is None
    save_draft_adapter(learnt, tmp_path, vault)
    again = load_draft_adapter(tmp_path, vault, WIDTH)
    assert again is not None
    h_ND = states(9, seed=3)
    assert torch.equal(again(h_ND), learnt(h_ND))
    assert not torch.equal(again(h_ND), h_ND)
    with pytest.raises(StorageError):
        load_draft_adapter(tmp_path, NoVault(), WIDTH)


def test_an_adapter_of_another_model_is_refused(learnt: DraftAdapter, tmp_path: Path) -> None:
    save_draft_adapter(learnt, tmp_path, NoVault())
    with pytest.raises(StorageError, match="delete it and distil again"):
        load_draft_adapter(tmp_path, NoVault(), WIDTH + 1)


@pytest.mark.parametrize("damage", ["cut short", "not finite", "other tensors"])
def test_a_damaged_adapter_is_refused(learnt: DraftAdapter, damage: str, tmp_path: Path) -> None:
    if damage == "not finite":
        torch.nn.init.constant_(learnt.up_DR, torch.nan)
    if damage == "other tensors":
        learnt.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    save_draft_adapter(learnt, tmp_path, NoVault())
    path = tmp_path / "draft_adapter.safetensors"
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StorageError, match="delete it and distil again"):
        load_draft_adapter(tmp_path, NoVault(), WIDTH)
