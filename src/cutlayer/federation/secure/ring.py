"""Real values as integers modulo 2^64, so that masks cancel exactly.

It does not mask. Ring elements are int64 tensors: sums wrap as unsigned integers of 64 bits do.

Shapes: N = values of an update, M = N + 1 = values and weight.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.errors import ConfigError, DataError, ProtocolError
from cutlayer.federation.settings import SecureSettings

__all__ = ["Quantised", "check_headroom", "dequantise", "digest_of", "quantise"]

_RING_BITS = 64


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """An update as ring elements."""

    vector_M: Tensor
    """int64: weight times each value in units of 2^-value_bits; the weight itself comes last."""
    num_clipped: int
    """Values that were outside the range."""


def check_headroom(num_members: int, policy: SecureSettings) -> None:
    """Refuse settings with which a sum could wrap.

    Args:
        num_members: of the cohort.
        policy: range, bits and largest weight.

    Raises:
        ConfigError: says which power of two is exceeded and what to lower.
    """
    largest = num_members * policy.max_weight * _limit(policy)
    if largest >= 1 << (_RING_BITS - 1):
        raise ConfigError(
            f"the sum of {num_members} members could reach 2^{largest.bit_length() - 1}, at least "
            f"2^{_RING_BITS - 1}: lower secure.value_bits={policy.value_bits}, "
            f"secure.max_weight={policy.max_weight} or secure.value_range={policy.value_range:g}"
        )


def quantise(values_N: Tensor, weight: int, policy: SecureSettings) -> Quantised:
    """Clip, scale, round to integers, weigh, and append the weight.

    Args:
        values_N: an update, any floating-point type.
        weight: scored tokens; more than `policy.max_weight` counts as that.
        policy: range, bits and largest weight.

    Raises:
        DataError: a value is NaN or infinite, or the weight is negative.
    """
    if weight < 0:
        raise DataError(f"an update of weight {weight}; the weight is a number of tokens")
    values_N = values_N.detach().cpu().reshape(-1).double()
    if not bool(torch.isfinite(values_N).all()):
        num_bad = int((~torch.isfinite(values_N)).sum())
        raise DataError(
            f"{num_bad} of {values_N.numel()} values of this member's update are NaN or infinite; "
            "nothing was sent: lower the learning rate or set a clip norm"
        )
    bound, weight = policy.value_range, min(weight, policy.max_weight)
    num_clipped = int((values_N.abs() > bound).sum())
    units_N = (values_N.clamp(-bound, bound) * 2.0**policy.value_bits).round_().to(torch.int64)
    vector_M = torch.cat([units_N.mul_(weight), torch.tensor([weight])])
    return Quantised(vector_M=vector_M, num_clipped=num_clipped)


def dequantise(sum_M: Tensor, policy: SecureSettings, num_members: int) -> tuple[Tensor, int]:
    """The weighted mean and the total weight of a sum.

    Args:
        sum_M: int64, unmasked.
        policy: as the members had it.
        num_members: whose updates are in the sum.

    Returns:
        mean_N in float64, and the members' total weight.

    Raises:
        ConfigError: the sum may have wrapped.
        ProtocolError: no honest members can have made this sum.
    """
    check_headroom(num_members, policy)
    total_weight = int(sum_M[-1])
    if not 0 < total_weight <= num_members * policy.max_weight:
        raise ProtocolError(
            f"the weights of {num_members} members add up to {total_weight}; 1 to "
            f"{num_members * policy.max_weight} is possible: a member sent a wrong vector"
        )
    low, high = torch.aminmax(sum_M[:-1]) if sum_M.numel() > 1 else (sum_M[-1], sum_M[-1])
    most = total_weight * _limit(policy)
    if sum_M.numel() > 1 and (int(low) < -most or int(high) > most):
        raise ProtocolError(
            f"the members' mean exceeds secure.value_range={policy.value_range:g}: a member sent a "
            "wrong vector; nothing of this sum is used"
        )
    # The quotient of two integers below 2^63: float64 keeps 53 bits of each.
    return sum_M[:-1].double() / total_weight * 2.0**-policy.value_bits, total_weight


def digest_of(vector_M: Tensor) -> bytes:
    """By which a repeated vector is recognised."""
    return hashlib.sha256(vector_M.contiguous().numpy().data.cast("B")).digest()


def _limit(policy: SecureSettings) -> int:
    """Largest magnitude of a quantised value."""
    return round(policy.value_range * (1 << policy.value_bits))
