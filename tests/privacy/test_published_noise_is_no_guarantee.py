"""Why the product prints "no guarantee": a curious server finds tokens through the noise.

The attack is the plainest one, nearest candidate vector at cut 0. Deeper cuts only make the server
compute its candidates with the public head. Real attacks are stronger; this is a lower bound.
"""

from pathlib import Path

import pytest
import torch

from cutlayer.model.rows import pack
from cutlayer.privacy.boundary import Boundary, BoundaryName
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.run_privacy import open_run_privacy
from cutlayer.wire.codec import decode, get_codec

VOCABULARY, D, LENGTH = 2000, 576, 64


def recovered_share(folder: Path, noise_ratio: float, codec: str) -> float:
    """Share of tokens that a server finds; noise_ratio = mean |noise| / mean |h|."""
    random = torch.Generator().manual_seed(0)
    table_VD = torch.randn(VOCABULARY, D, generator=random)
    tokens_N = torch.randint(VOCABULARY, (LENGTH,), generator=random)
    h_ND = table_VD[tokens_N]
    rule = MECHANISMS.make("gaussian", noise_ratio * float(h_ND.abs().mean()))
    with open_run_privacy(folder, "run-1") as run:
        name = BoundaryName.ACTIVATIONS
        gate = Boundary(name, rule, get_codec(codec), run.ledger, run.secret)
        _, released = gate.release(h_ND, pack([tokens_N.tolist()]), ["row-0"], "base")
    nearest_N = torch.cdist(decode(released.packed), table_VD).argmin(1)
    return float((nearest_N == tokens_N).float().mean())


@pytest.mark.parametrize("codec", ["raw", "fp8"])
@pytest.mark.parametrize("noise_ratio", [0.02, 0.6, 1.5])
def test_noise_up_to_one_and_a_half_times_the_signal_hides_no_token(
    tmp_path: Path, noise_ratio: float, codec: str
):
    assert recovered_share(tmp_path / "run", noise_ratio, codec) == 1.0


def test_control_far_more_noise_than_any_model_bears_does_hide_them(tmp_path: Path):
    assert recovered_share(tmp_path / "run", 50.0, "raw") < 0.1
