"""The mean of products B A of LoRA factors, as factors of the same rank again.

It does not know members or rounds.

Shapes: M = members, R = rank, O = rows of B, I = columns of A.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["refactored"]

_NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are rounding errors of float32 factors."""


def refactored(
    factors: Sequence[tuple[float, Tensor, Tensor]], spare_RI: Tensor
) -> tuple[Tensor, Tensor]:
    """Balanced factors B' A' of the best rank-R approximation of sum_i p_i B_i A_i.

    With the singular value decomposition U S V^T of the sum, cut to R terms, B' = U sqrt(S) and
    A' = sqrt(S) V^T: no other matrix of rank R is nearer in the Frobenius norm (Eckart and Young,
    1936), and nothing is lost where the sum's rank is at most R. The dense O x I sum is never
    made: QR of the stacked factors leaves a decomposition of a (M R) x (M R) matrix.

    Args:
        factors: (p_i, B_i [O, R], A_i [R, I]) of every member, in a fixed order.
        spare_RI: rows for directions that the sum does not use. Their B' is zero, so the product
            is unchanged, but a zero row of A' as well could never be trained again.

    Returns:
        B' [O, R] and A' [R, I] in float32.
    """
    rank, num_columns = spare_RI.shape
    b_OK = torch.cat([p * b_OR.double() for p, b_OR, _ in factors], dim=1)
    a_KI = torch.cat([a_RI.double() for _, _, a_RI in factors], dim=0)
    left, right = torch.linalg.qr(b_OK), torch.linalg.qr(a_KI.T)
    u, values, vt = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    num_used = min(rank, int((values > _NEGLIGIBLE * values.max().clamp_min(1e-300)).sum()))
    u_OS, v_IS = left.Q @ u[:, :num_used], right.Q @ vt[:num_used].T
    signs_S, roots_S = _signs(u_OS), values[:num_used].sqrt()
    b_OR = torch.zeros(len(b_OK), rank, dtype=torch.float64)
    b_OR[:, :num_used] = u_OS * (signs_S * roots_S)
    a_RI = spare_RI.double().clone().reshape(rank, num_columns)
    a_RI[:num_used] = (v_IS * (signs_S * roots_S)).T
    return b_OR.float(), a_RI.float()


def _signs(u_OS: Tensor) -> Tensor:
    """Signs that make each column's largest value positive: a decomposition leaves them open."""
    if u_OS.shape[1] == 0:
        return torch.ones(0, dtype=u_OS.dtype)
    largest_S = u_OS.abs().argmax(0)
    return torch.where(u_OS[largest_S, torch.arange(u_OS.shape[1])] < 0, -1.0, 1.0).double()
