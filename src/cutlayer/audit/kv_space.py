"""Keys and values of the trunk's first block: what a server keeps of each vector while it serves.

They are functions of the released vectors, computed here as the server computes them. Positions are
left out: rotating all keys by the same known angle changes no distance.

Shapes: K = vectors, L = vectors of one row, D = hidden size, X = compared values, H = key-value
heads, E = head dimension.
"""

import torch
from torch import Tensor

from cutlayer.audit.calibration import Calibration
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.known_noise import KnownNoise
from cutlayer.audit.token_tree import TokenTree
from cutlayer.model.checkpoint import load_part
from cutlayer.model.partition import Cut, Part, Trunk

__all__ = ["KvSpace"]

_MAX_VECTORS = 2048
"""Public vectors on which the noise of keys and values is measured."""


class KvSpace:
    """Keys and values, whitened by the noise that they inherit from the vectors.

    A norm before the projections divides by the noisy vector's length, so noise also shrinks what
    a vector says: f(x + z) is about g f(x) + e. The factor g and the covariance of e are measured
    on public vectors with noise of the known variance.
    """

    def __init__(self, knowledge: Knowledge, noise: KnownNoise, known: Calibration) -> None:
        """
        Args:
            knowledge: for the trunk's first block.
            noise: the rule's.
            known: public vectors.
        """
        lower = knowledge.cut.lower
        trunk = load_part(knowledge.folder, Cut(lower, lower + 1), Part.TRUNK)
        assert isinstance(trunk, Trunk)
        self._trunk = trunk.eval().requires_grad_(False)
        self.noise = noise
        self.variance = 0.0
        self._gain, self._white_XX = 1.0, None
        if noise.variance > 0:
            self._measure(known)

    def observed(self, h_LD: Tensor) -> Tensor:
        """Keys and values of what was released."""
        return self._whitened(self._kept(h_LD))

    def expected(self, h_KD: Tensor, row_factor: float = 1.0) -> Tensor:
        """Keys and values that a candidate would leave."""
        return self._whitened(self._gain * self._kept(self.noise.clipped(h_KD, row_factor)))

    def _kept(self, h_KD: Tensor) -> Tensor:
        return torch.cat([self._kept_block(block_KD) for block_KD in h_KD.split(256)])

    def _kept_block(self, h_KD: Tensor) -> Tensor:
        num_vectors = len(h_KD)
        tree = TokenTree(self._trunk)
        tree.run(h_KD, torch.zeros(num_vectors, 0, dtype=torch.bool), depth=0)
        states = [x_1HKE[0].transpose(0, 1).flatten(1) for x_1HKE in tree.pending(layer=0)]
        return torch.cat(states, dim=1)

    def _whitened(self, x_KX: Tensor) -> Tensor:
        return x_KX if self._white_XX is None else x_KX @ self._white_XX

    def _measure(self, known: Calibration) -> None:
        vectors_KD = torch.cat([states_LD[1:] for states_LD in known.states_LD])[:_MAX_VECTORS]
        clean_KD = self.noise.clipped(vectors_KD)
        generator = torch.Generator().manual_seed(0)
        noise_KD = torch.randn(clean_KD.shape, generator=generator) * self.noise.variance**0.5
        clean_KX, noisy_KX = self._kept(clean_KD), self._kept(clean_KD + noise_KD)
        self._gain = float((clean_KX * noisy_KX).sum() / clean_KX.square().sum().clamp(min=1e-12))
        error_KX = noisy_KX - self._gain * clean_KX
        covariance_XX = error_KX.T @ error_KX / len(error_KX)
        spread_X, basis_XX = torch.linalg.eigh(covariance_XX)
        spread_X = spread_X.clamp(min=0) + 1e-3 * spread_X.mean() + 1e-12
        self._white_XX = basis_XX / spread_X.sqrt()
        self.variance = 1.0
