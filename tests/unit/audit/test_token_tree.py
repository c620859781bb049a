"""A tree of tokens gives the states that each path gives alone."""

from pathlib import Path

import pytest
import torch

from cutlayer.audit.token_tree import TokenTree
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.partition import Cut
from cutlayer.model.rows import pack
from tests.tiny_models import tiny_model

CUT = Cut(lower=2, upper=3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "granite"])
def test_every_path_has_the_states_of_its_row(family: str, tmp_path: Path) -> None:
    head, trunk, _ = load_parts(tiny_model(family, tmp_path)[0], CUT)
    paths = [[5, 9, 11, 2, 7, 7, 30, 31], [5, 9, 40, 3, 8, 7, 1, 2]]
    tree, behind = TokenTree(head), TokenTree(trunk)
    seen_KM = torch.zeros(2, 0, dtype=torch.bool)
    for depth, tokens in enumerate(zip(*paths, strict=True)):
        h_KD = tree.run(torch.tensor(tokens), seen_KM, depth)
        y_KD = behind.run(h_KD, seen_KM, depth)
        for one in (tree, behind):
            one.keep(torch.tensor([0, 1]))
        seen_KM = torch.cat([seen_KM, torch.eye(2, dtype=torch.bool)], dim=1)
    rows = pack(paths)
    expected_ND = head(rows)
    places = torch.tensor(rows.offsets[1:]) - 1
    assert torch.allclose(h_KD, expected_ND[places], atol=1e-4)
    assert torch.allclose(y_KD, trunk(expected_ND, rows)[places], atol=1e-4)


def test_forgotten_nodes_leave_the_others_as_they_were(tmp_path: Path) -> None:
    head, _, _ = load_parts(tiny_model("llama", tmp_path)[0], CUT)
    tree = TokenTree(head)
    tree.run(torch.tensor([5, 6, 7]), torch.zeros(3, 0, dtype=torch.bool), 0)
    tree.keep(torch.tensor([0, 1, 2]))
    tree.select(torch.tensor([2, 0]))
    assert tree.num_nodes == 2
    h_KD = tree.run(torch.tensor([9]), torch.tensor([[True, False]]), 1)
    assert torch.allclose(h_KD, head(pack([[7, 9]]))[1:], atol=1e-5)
