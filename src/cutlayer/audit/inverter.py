"""A recurrent network that reads tokens off released vectors, tied to the public embedding.

It does not make its training vectors (`inverter_data`) nor train itself (`inverter_fit`).

Shapes: B = rows, L = vectors of the longest row, N = vectors of all rows, D = hidden size,
V = vocabulary, C = candidate tokens, G = outputs of the recurrent layer.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

__all__ = ["HIDDEN_SIZE", "Inverter", "LinearInverse", "fit_linear_inverse"]

HIDDEN_SIZE = 256
"""Units per direction, as published; one direction alone gets twice as many."""
_MAX_INPUT = 20.0
"""In standard deviations: a row's first vector is an outlier in many models."""
_SHARE_OF_VARIANCE = 1e-3
"""Ridge of the two covariances, as a share of their mean variance."""


@dataclass(frozen=True, kw_only=True)
class LinearInverse:
    """The best decoder under x = B e_v + noise: the score of token v is z . e_v + bias_v.

    Source: linear discriminant analysis with the public embedding rows as class coordinates:
        z = B^T S^-1 (x - m), bias_v = -1/2 e_v^T B^T S^-1 B e_v with S the residual covariance.
    """

    weight_DD: Tensor = field(repr=False)
    """From standardised vectors to z."""
    offset_D: Tensor = field(repr=False)
    """What is added to z."""
    bias_V: Tensor = field(repr=False)
    """Per token."""


def fit_linear_inverse(x_ND: Tensor, tokens_N: Tensor, embedding_VD: Tensor) -> LinearInverse:
    """Fit in closed form.

    Args:
        x_ND: standardised vectors.
        tokens_N: the token to read off each.
        embedding_VD: public embedding.
    """
    e_ND = embedding_VD[tokens_N]
    x_mean_D, e_mean_D = x_ND.mean(0), e_ND.mean(0)
    x_ND, e_ND = x_ND - x_mean_D, e_ND - e_mean_D
    forward_DD = torch.linalg.solve(_covariance(e_ND), e_ND.T @ x_ND / len(x_ND))
    residual_DD = _covariance(x_ND - e_ND @ forward_DD)
    # Rows of `forward_DD` are embedding dimensions: x = e @ forward + noise.
    weight_DD = torch.linalg.solve(residual_DD, forward_DD.T)
    fisher_DD = forward_DD @ weight_DD
    return LinearInverse(
        weight_DD=weight_DD,
        offset_D=fisher_DD @ e_mean_D - x_mean_D @ weight_DD,
        bias_V=-0.5 * torch.einsum("vd,vd->v", embedding_VD @ fisher_DD, embedding_VD),
    )


def _covariance(x_ND: Tensor) -> Tensor:
    covariance_DD = x_ND.T @ x_ND / len(x_ND)
    ridge = _SHARE_OF_VARIANCE * covariance_DD.diagonal().mean().clamp_min(1e-12)
    return covariance_DD + ridge * torch.eye(x_ND.shape[1])


class Inverter(nn.Module):
    """Vectors of whole rows in, states out whose products with embedding rows score tokens."""

    def __init__(self, x_ND: Tensor, embedding_VD: Tensor, is_causal: bool) -> None:
        """
        Args:
            x_ND: released vectors of the training rows, from which the input's scale is taken.
            embedding_VD: public embedding.
            is_causal: read from left to right alone; else it sees the whole row.
        """
        super().__init__()
        width = x_ND.shape[1]
        self.embedding_VD = embedding_VD
        self.mean_D = x_ND.mean(0)
        self.std_D = x_ND.std(0).clamp_min(1e-6)
        self.linear_inverse: LinearInverse | None = None
        self.is_finished = False
        """Whether it was trained to the end, not to the end of its time."""
        size = 2 * HIDDEN_SIZE if is_causal else HIDDEN_SIZE
        self.gru = nn.GRU(width + 1, size, batch_first=True, bidirectional=not is_causal)
        self.readout = nn.Linear(2 * HIDDEN_SIZE + width, width)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)
        self.log_trust = nn.Parameter(torch.zeros(()))
        """Of the linear inverse's share in the scores."""
        self.prior_weight = nn.Parameter(torch.ones(()))
        self.log_prior_V = torch.zeros(len(embedding_VD))
        self._readout_scale = width**-0.5 / float(embedding_VD.std().clamp_min(1e-6))

    def standardised(self, x_ND: Tensor) -> Tensor:
        """Vectors in standard deviations of the training vectors, outliers cut."""
        return ((x_ND - self.mean_D) / self.std_D).clamp(-_MAX_INPUT, _MAX_INPUT)

    def forward(self, rows: list[Tensor]) -> Tensor:
        """States [N, D] of packed rows of released vectors."""
        lengths = torch.tensor([len(row) for row in rows])
        x_ND = torch.cat(rows)
        is_withheld_N = (x_ND == 0).all(1)
        x_ND = self.standardised(x_ND).masked_fill(is_withheld_N[:, None], 0.0)
        inputs_ND = torch.cat([x_ND, is_withheld_N[:, None].float()], 1)
        padded_BLD = nn.utils.rnn.pad_sequence(
            list(inputs_ND.split(lengths.tolist())), batch_first=True
        )
        packed = pack_padded_sequence(padded_BLD, lengths, batch_first=True, enforce_sorted=False)
        states_BLG, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        is_real_BL = torch.arange(states_BLG.shape[1])[None] < lengths[:, None]
        z_ND: Tensor = self.readout(torch.cat([states_BLG[is_real_BL], x_ND], 1))
        z_ND = z_ND * self._readout_scale
        if self.linear_inverse is not None:
            linear_ND = x_ND @ self.linear_inverse.weight_DD + self.linear_inverse.offset_D
            # Nothing is read off a place that was left empty, not even the classes' bias.
            trust_N1 = self.log_trust.exp() * ~is_withheld_N[:, None]
            z_ND = torch.cat([z_ND + trust_N1 * linear_ND, trust_N1], 1)
        return z_ND

    def scores(self, z_ND: Tensor, candidates_C: Tensor | None = None) -> Tensor:
        """Logits [N, C] of candidate tokens, or of the whole vocabulary."""
        rows_CD, prior_C = self.embedding_VD, self.log_prior_V
        if candidates_C is not None:
            rows_CD, prior_C = rows_CD[candidates_C], prior_C[candidates_C]
        width = rows_CD.shape[1]
        scores_NC = z_ND[:, :width] @ rows_CD.T + self.prior_weight * prior_C
        if self.linear_inverse is None:
            return scores_NC
        bias_V = self.linear_inverse.bias_V
        bias_C = bias_V if candidates_C is None else bias_V[candidates_C]
        return scores_NC + z_ND[:, width:] * bias_C
