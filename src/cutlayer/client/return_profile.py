"""What an honest trunk's output looks like, learnt from the replies so far: sizes and directions.

It needs no weights, raises nothing and keeps no vector: a few running numbers, and digests of the
last replies. Whoever stays within the bounds is not caught here (`spot_check`).

Shapes: N = vectors of a call, D = hidden size, S = sampled vectors.
"""

import hashlib
import math
from collections import OrderedDict, deque
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Echoes", "Likeness", "OutputWatch", "Running", "attachment"]

_WARM_UP = 16
"""Calls from which the first profile is made."""
_DECAY = 0.05
"""Weight of the newest call afterwards."""
_MIN_VECTORS = 16
"""Calls with fewer say too little about an average."""
_MAX_SAMPLED = 64
_NUM_ECHOES = 256
_SKETCH = 8
_OTHER, _OTHER_VECTOR = 0.01, 0.2
"""Distance of two sketches of whole calls from which something else was sent, and what one other
vector among N makes of it, times the root of N; the larger counts."""
_OTHER_END = 0.1
"""The same of two vectors. Not 0: where a token was guessed or computed beside others, its last
bits are others, and an honest reply may round away what a codec's last bit changed."""
_SPREADS = 10.0
"""Standard deviations that an honest call may be away."""
_LEAST_SPREAD = math.log(4)
"""Log factor that is always allowed."""
_HIGHEST, _LOWEST = math.log(1e4), math.log(1e3)
"""How far a single vector may be above and below the usual: attention sinks are large."""
_FURTHEST = math.log(1e6)
"""How far output and input may be apart before there is a profile."""
_CLEAR = 0.1
"""Attachment or alignment from which a loss of it means something."""
_LOST_SHARE = 0.7
_NUM_NEWEST = 8
"""Calls whose mean likeness is compared with that of all before."""


class Running:
    """Mean and spread of a number: plain over the warm-up, then exponentially weighted."""

    def __init__(self) -> None:
        self._count, self._mean, self._variance = 0, 0.0, 0.0

    @property
    def is_known(self) -> bool:
        """Whether the warm-up is over."""
        return self._count >= _WARM_UP

    @property
    def mean(self) -> float:
        """Of what was added so far."""
        return self._mean

    @property
    def spread(self) -> float:
        """Standard deviation."""
        return math.sqrt(self._variance)

    def add(self, value: float) -> None:
        """Count one more value."""
        self._count += 1
        weight = max(1 / self._count, _DECAY)
        distance = value - self._mean
        self._mean += weight * distance
        self._variance = (1 - weight) * (self._variance + weight * distance**2)

    def strays(self, value: float, least: float = _LEAST_SPREAD) -> bool:
        """Whether a value is outside of what is usual; never during the warm-up.

        Args:
            value: of a new call.
            least: distance from the mean that is always allowed.
        """
        return self.is_known and abs(value - self._mean) > max(least, _SPREADS * self.spread)


class Likeness:
    """A likeness between 0 and 1 of every call, which an honest server does not lose."""

    def __init__(self) -> None:
        self._usual = Running()
        self._newest: deque[float] = deque()

    @property
    def usual(self) -> float:
        """Mean of the calls before the newest."""
        return self._usual.mean

    def loses(self, value: float) -> bool:
        """Whether it was clear so far, and is gone in this call or over the newest ones."""
        self._newest.append(value)
        mean = sum(self._newest) / len(self._newest)
        is_full = len(self._newest) == _NUM_NEWEST
        if self._is_gone(value, 1) or (is_full and self._is_gone(mean, _NUM_NEWEST)):
            return True
        if is_full:
            self._usual.add(self._newest.popleft())
        return False

    def _is_gone(self, value: float, num_calls: int) -> bool:
        usual = self._usual
        allowed = max(_LOST_SHARE * usual.mean, _SPREADS * usual.spread / math.sqrt(num_calls))
        return usual.is_known and usual.mean > _CLEAR and value < usual.mean - allowed


class _Asked(NamedTuple):
    """What is kept of a call's vectors; none can be read from it."""

    ends_2K: Tensor
    """Of the first and the last."""
    whole_K: Tensor | None
    """Of all; None where there are no others. Calls may begin and end with the same words."""
    num_vectors: int

    def is_other(self, asked: "_Asked") -> bool:
        """Whether another call was made of other vectors, of which there are as many."""
        ends = (self.ends_2K - asked.ends_2K).norm(dim=1)
        if not bool((ends <= _OTHER_END).all()):
            return True
        if self.whole_K is None or asked.whole_K is None:
            return False
        limit = max(_OTHER, _OTHER_VECTOR / math.sqrt(self.num_vectors))
        return not float((self.whole_K - asked.whole_K).norm()) <= limit


class Echoes:
    """Recognises a reply that was given before to something else."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, _Asked] = OrderedDict()
        self._weights_DK = torch.empty(0, _SKETCH)

    def is_echo(self, sent_ND: Tensor, returned_ND: Tensor) -> bool:
        """Whether these very vectors were the answer to other ones; remembers the pair."""
        if len(self._weights_DK) != sent_ND.shape[1]:
            self._weights_DK = _weights(sent_ND.shape[1])
        ends_2D = sent_ND if len(sent_ND) == 1 else sent_ND[[0, -1]]
        asked = _Asked(
            ends_2K=_sketch_of_each(ends_2D, self._weights_DK),
            whole_K=_sketch(sent_ND, self._weights_DK) if len(sent_ND) > 2 else None,
            num_vectors=len(sent_ND),
        )
        key = _digest(returned_ND)
        known = self._known.setdefault(key, asked)
        if known is not asked and known.is_other(asked):
            return True
        self._known.move_to_end(key)
        if len(self._known) > _NUM_ECHOES:
            self._known.popitem(last=False)
        return False


class OutputWatch:
    """Profile of the trunk's output for one kind of calls."""

    def __init__(self) -> None:
        self._level, self._attachment, self._echoes = Running(), Likeness(), Echoes()

    def fault(self, sent_ND: Tensor, returned_ND: Tensor) -> str | None:
        """What an honest trunk would not have returned; None where nothing is wrong.

        Args:
            sent_ND: what was released, as the server has it.
            returned_ND: the reply, finite.
        """
        norms = sorted(returned_ND.norm(dim=1).clamp_min_(1e-30).log_().tolist())
        level = norms[(len(norms) - 1) // 2]
        found = self._size_fault(norms, level, sent_ND)
        found = found or _constant_fault(sent_ND, returned_ND)
        if found is None and self._echoes.is_echo(sent_ND, returned_ND):
            found = "the same vectors were returned for others before (a replay)"
        if found is None and len(sent_ND) >= _MIN_VECTORS:
            self._level.add(level)
            found = self._belonging_fault(sent_ND, returned_ND)
        return found

    def _size_fault(self, norms: list[float], level: float, sent_ND: Tensor) -> str | None:
        usual = self._level.mean if self._level.is_known else level
        sent = float(sent_ND.norm(dim=1).max())
        if sent > 0 and abs(level - math.log(sent)) > _FURTHEST:
            return "its vectors and those that were sent differ in size by more than a million"
        if norms[-1] > usual + _HIGHEST or norms[0] < usual - _LOWEST:
            return "a vector is a thousand times smaller or ten thousand times larger than usual"
        if len(norms) >= _MIN_VECTORS and self._level.strays(level):
            factor = math.exp(level - usual)
            return f"its vectors are {factor:.3g} times as large as in earlier replies"
        return None

    def _belonging_fault(self, sent_ND: Tensor, returned_ND: Tensor) -> str | None:
        value = attachment(sent_ND, returned_ND)
        if self._attachment.loses(value):
            return (
                "its vectors do not belong to those that were sent: each used to resemble its own "
                f"by {self._attachment.usual:.2f} more than others, now by {value:.2f}"
            )
        return None


def attachment(sent_ND: Tensor, returned_ND: Tensor) -> float:
    """How much more like its own input an output is than like others' inputs, as a cosine.

    Residual connections carry the input through the trunk; what all vectors share is taken off.
    """
    stride = max(1, len(sent_ND) // _MAX_SAMPLED)
    sent_SD, returned_SD = _directions(sent_ND[::stride]), _directions(returned_ND[::stride])
    cosines_SS = sent_SD @ returned_SD.T
    own, count = float(cosines_SS.trace()), len(cosines_SS)
    return own / count - (float(cosines_SS.sum()) - own) / (count * (count - 1))


def _directions(x_SD: Tensor) -> Tensor:
    x_SD = x_SD - x_SD.median(dim=0).values
    return torch.nn.functional.normalize(x_SD, dim=1)


def _constant_fault(sent_ND: Tensor, returned_ND: Tensor) -> str | None:
    """Neighbours that are equal to the last bit although what was sent for them is not."""
    if len(sent_ND) < 4:
        return None
    are_equal = (returned_ND[1:] == returned_ND[:-1]).all(dim=1)
    differ = (sent_ND[1:] != sent_ND[:-1]).any(dim=1)
    if int((are_equal & differ).sum()) * 2 > len(sent_ND) - 1:
        return "most of its vectors are one and the same"
    return None


def _digest(x_ND: Tensor) -> bytes:
    return hashlib.blake2b(x_ND.contiguous().numpy().tobytes(), digest_size=16).digest()


def _sketch(x_ND: Tensor, weights_DK: Tensor) -> Tensor:
    """A few sums over the directions of all vectors, of size 1."""
    count = len(x_ND)
    k_K1 = torch.arange(1, _SKETCH + 1)[:, None]
    by_place_KN = torch.cos(k_K1 * torch.arange(1, count + 1))
    directions_ND = torch.nn.functional.normalize(x_ND, dim=1) / math.sqrt(max(1, count))
    return ((by_place_KN @ directions_ND) * weights_DK.T).sum(dim=1)


def _sketch_of_each(x_ND: Tensor, weights_DK: Tensor) -> Tensor:
    """A few sums over each vector's direction, of size 1, and the logarithm of its size."""
    norms_N1 = x_ND.norm(dim=1, keepdim=True).clamp_min_(1e-30)
    return torch.cat([(x_ND / norms_N1) @ weights_DK, norms_N1.log_()], dim=1)


def _weights(width: int) -> Tensor:
    """Weights [D, K] of the sums."""
    # Made in inference mode, no gradient could ever pass by them.
    with torch.inference_mode(False):
        k_1K = torch.arange(1, _SKETCH + 1)[None]
        return torch.cos(math.sqrt(2) * k_1K * torch.arange(1, width + 1)[:, None])
