"""A row that leaves at another cut, under the same names, leaves with noise of its own.

A run that goes back to a saved step repeats rows at the same version of the weights. If a re-cut
came in between, they leave from another block: one noise for both would show their difference.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.model.checkpoint import load_client_parts
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut
from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Boundary, BoundaryName
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.run_privacy import open_run_privacy
from cutlayer.wire.codec import get_codec
from tests.tiny_models import tiny_llama_folder

LENGTH = 64
ROWS = Rows(lengths=(LENGTH,), tokens_N=torch.arange(LENGTH))


def _at(model: Path, cut: Cut) -> Tensor:
    """What the head of a cut makes of the row."""
    head, _ = load_client_parts(resolve_model(str(model), None), cut, "float32", "cpu")
    with torch.no_grad():
        h_ND: Tensor = head(ROWS)
    return h_ND


def _noise(gate: Boundary, h_ND: Tensor) -> Tensor:
    noised_ND, _ = gate.release(h_ND, ROWS, ["row-0"], "step5")
    return (noised_ND - h_ND).flatten()


@pytest.mark.parametrize("boundary", [BoundaryName.ACTIVATIONS, BoundaryName.GENERATION])
def test_the_noise_of_two_cuts_is_independent(tmp_path: Path, boundary: BoundaryName) -> None:
    model = tiny_llama_folder(tmp_path)
    h_ND, deeper_ND = _at(model, Cut(1, 3)), _at(model, Cut(2, 3))
    rule = MECHANISMS.make("gaussian", 1.0, None)
    with open_run_privacy(tmp_path / "run", "run-1") as run:
        gate = Boundary(boundary, rule, get_codec("raw"), run.ledger, run.secret)
        first, second = _noise(gate, h_ND), _noise(gate, deeper_ND)
        # The control: the same vectors again, as after a move of the upper cut, are a replay.
        assert torch.equal(_noise(gate, h_ND), first)
        assert run.ledger.summary().num_vectors == {str(boundary): 2 * LENGTH}
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < 5 / len(first) ** 0.5
    # One noise for both would leave the difference bare: it would be known without any error.
    left = float((first - second).square().mean())
    assert left == pytest.approx(float(first.square().mean() + second.square().mean()), rel=0.1)
