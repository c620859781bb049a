"""The states that a federation's rounds have to give, from what counted members sent.

Written again from the definitions (a weighted mean; torch's AdamW), not taken from the product.
It judges nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.fault_evidence import Sent
from cutlayer.federation.settings import FederationSettings

__all__ = ["Contribution", "Reference"]

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one member gave to a round."""

    member: str
    ends: Sent
    """Head and tail: change, or gradient of the mean loss."""
    trunk: Sent | None
    """The trunk: change, or gradient of the summed loss; None where it is not judged."""


class Reference:
    """The federation's state, moved on round by round."""

    def __init__(self, rules: FederationSettings, initial: State) -> None:
        """Begin before the first round."""
        self._is_gradient = rules.strategy.kind == "every_step"
        self._parameters = {key: nn.Parameter(x.clone()) for key, x in initial.items()}
        strategy = rules.strategy
        self._adamw = torch.optim.AdamW(
            self._parameters.values(),
            lr=strategy.lr,
            betas=(strategy.beta1, strategy.beta2),
            eps=strategy.eps,
            weight_decay=strategy.weight_decay,
        )

    def state(self) -> dict[str, Tensor]:
        """Head, tail and trunk now."""
        return {key: x.detach().clone() for key, x in self._parameters.items()}

    def mean(self, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """The weighted mean of all parts."""
        ends = [one.ends for one in contributions]
        trunks = [one.trunk for one in contributions if one.trunk is not None]
        if self._is_gradient:
            total = sum(one.weight for one in ends)
            sums = {k: _sum(x.update[k].double() for x in trunks) for k in _keys(trunks)}
            return {**_mean(ends), **{key: x / total for key, x in sums.items()}}
        return {**_mean(ends), **_mean(trunks)}

    @torch.no_grad()
    def advance(self, mean: State) -> None:
        """One round."""
        if not self._is_gradient:
            for key, change in mean.items():
                self._parameters[key].copy_(self._parameters[key].double() + change)
            return
        for key, parameter in self._parameters.items():
            parameter.grad = mean[key].float() if key in mean else None
        self._adamw.step()


def _mean(sent: Sequence[Sent]) -> dict[str, Tensor]:
    total = sum(one.weight for one in sent)
    keys = _keys(sent) if total else []
    return {k: _sum(x.update[k].double() * x.weight for x in sent) / total for k in keys}


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def _keys(sent: Sequence[Sent]) -> list[str]:
    return sorted(sent[0].update) if sent else []
