"""Strategies that need the mean alone, so they work with secure aggregation too.

They believe everyone: one member that lies about its values or its weight can move the result
anywhere. Rules that bound a liar are in `robust_strategies`. "Mean" is always weighted by scored
tokens and per key over the members that have it.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cutlayer.federation.aggregation import Update, weighted_mean
from cutlayer.federation.strategy_registry import STRATEGIES
from cutlayer.federation.strategy_settings import StrategySettings
from cutlayer.federation.trunk_pool import UpdateKind
from cutlayer.model.adapters import AdapterState

__all__ = ["EveryStep", "FedAdam", "FedAvg", "FedAvgFrozenA", "FedProx"]


@STRATEGIES.register("fedavg")
class FedAvg:
    """Adds the mean change of the weights.

    Equals: the weighted mean of the members' trained weights; with one member, that member.
    Sparse rows are themselves what is added to the model, so their mean is the mean of updates.
    Does not equal: with LoRA, the mean of the members' updates to the model. Its update is B A, and
    mean(B) mean(A) is not mean(B A) unless all but one are equal (`fedavg_frozen_a`, `svd`). Nor
    centralised training, unless each member takes one plain gradient step (`every_step`).

    Source: McMahan et al., arXiv 1602.05629, algorithm 1.
    """

    sends: ClassVar[UpdateKind] = UpdateKind.DELTA
    needs_single_updates: ClassVar[bool] = False
    freezes_a: ClassVar[bool] = False
    needs_lora: ClassVar[bool] = False

    def __init__(self, settings: StrategySettings) -> None:
        self.settings = settings
        self.proximal_weight = 0.0

    def aggregate(self, current: AdapterState, updates: Sequence[Update]) -> AdapterState:
        """`apply` of the weighted mean."""
        return self.apply(current, weighted_mean(updates))

    def apply(self, current: AdapterState, mean: AdapterState) -> AdapterState:
        """Current plus mean."""
        return {**current, **{key: _added(current[key], mean[key]) for key in mean}}

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


@STRATEGIES.register("fedavg_frozen_a")
class FedAvgFrozenA(FedAvg):
    """fedavg of B alone; all members have the same A, as it was drawn.

    Equals: the mean of the members' updates to the model exactly, since
    mean(B_i) A = mean(B_i A). Half the bytes of fedavg, or less.
    Does not equal: fedavg of A and B; A's random row space is all that training can use, which
    wants a somewhat larger rank.

    Source: Sun et al. (FFA-LoRA), arXiv 2403.12313, section 4.
    """

    freezes_a: ClassVar[bool] = True
    needs_lora: ClassVar[bool] = True


@STRATEGIES.register("fedprox")
class FedProx(FedAvg):
    """fedavg whose members add (mu / 2) |w - w_start|^2 to their loss, which holds them together.

    Equals: fedavg where `proximal` is 0, and in the arithmetic of the server always.
    Does not equal: the minimum of the sum of the members' losses; it only drifts less from it
    over many local steps on different data.

    Source: Li et al., arXiv 1812.06127, algorithm 2.
    """

    def __init__(self, settings: StrategySettings) -> None:
        super().__init__(settings)
        self.proximal_weight = settings.proximal


@STRATEGIES.register("fedadam")
class FedAdam(FedAvg):
    """Treats the mean change as a gradient (negated) for Adam at the server.

        m <- b1 m + (1 - b1) d,  v <- b2 v + (1 - b2) d^2,  w <- w + lr m / (sqrt(v) + tau)

    d is the mean change, m starts at 0 and v at tau^2; there is no bias correction. Each key has
    moments of its own, which stand still in a round that does not change it.

    Equals: the published arithmetic, but with means weighted by tokens instead of plain ones.
    Does not equal: torch.optim.Adam (bias correction), nor fedavg for any setting.

    Source: Reddi et al., arXiv 2003.00295, algorithm 2 (FedAdam).
    """

    def __init__(self, settings: StrategySettings) -> None:
        super().__init__(settings)
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    def apply(self, current: AdapterState, mean: AdapterState) -> AdapterState:
        """One server step."""
        return {**current, **{key: self._stepped(key, current[key], mean[key]) for key in mean}}

    def state(self) -> dict[str, Tensor]:
        """Both moments by key, in float64."""
        first = {f"{key}.m": value for key, value in self._first.items()}
        return first | {f"{key}.v": value for key, value in self._second.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Both moments by key."""
        self._first = {k.removesuffix(".m"): v for k, v in state.items() if k.endswith(".m")}
        self._second = {k.removesuffix(".v"): v for k, v in state.items() if k.endswith(".v")}

    def _stepped(self, key: str, weights: Tensor, change: Tensor) -> Tensor:
        beta1, beta2, tau = self.settings.beta1, self.settings.beta2, self.settings.eps
        change = change.double()
        first = self._first.get(key, torch.zeros_like(change))
        second = self._second.get(key, torch.full_like(change, tau**2))
        self._first[key] = first = beta1 * first + (1 - beta1) * change
        self._second[key] = second = beta2 * second + (1 - beta2) * change.square()
        return _added(weights, self.settings.lr * first / (second.sqrt() + tau))


@STRATEGIES.register("every_step")
class EveryStep(FedAvg):
    """One gradient of each member, one AdamW step at the server: synchronous training.

    Members send the gradient of the mean loss of their rows, weighted by its scored tokens, so the
    mean is the gradient of the mean loss over the union of all members' rows.

    Equals: centralised training on that union, step for step: torch.optim.AdamW after
    torch.nn.utils.clip_grad_norm_ over head, trunk and tail together.
    Does not equal: a round of local steps; it sends as many updates as there are steps.
    """

    sends: ClassVar[UpdateKind] = UpdateKind.GRADIENT

    def __init__(self, settings: StrategySettings) -> None:
        super().__init__(settings)
        self._moments: dict[str, dict[str, Tensor]] = {}

    def apply(self, current: AdapterState, mean: AdapterState) -> AdapterState:
        """One step of torch's own AdamW; keys without a gradient stay as they are."""
        parameters = {key: nn.Parameter(current[key].clone()) for key in sorted(mean)}
        for key, parameter in parameters.items():
            parameter.grad = mean[key].to(parameter.dtype)
        if not parameters:
            return dict(current)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters.values(), self.settings.clip_norm)
        self._step(parameters)
        return {**current, **{key: value.detach() for key, value in parameters.items()}}

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, as `KEY.exp_avg` and so on."""
        return {
            f"{key}.{kind}": value
            for key, moments in self._moments.items()
            for kind, value in moments.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """AdamW's moments and step counts."""
        self._moments = {}
        for name, value in state.items():
            key, _, kind = name.rpartition(".")
            self._moments.setdefault(key, {})[kind] = value.clone()

    def _step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        settings = self.settings
        adamw = torch.optim.AdamW(
            parameters.values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        for key in parameters.keys() & self._moments.keys():
            adamw.state[parameters[key]] = dict(self._moments[key])
        adamw.step()
        for key, parameter in parameters.items():
            self._moments[key] = dict(adamw.state[parameter])


def _added(weights: Tensor, change: Tensor) -> Tensor:
    return (weights.double() + change.double()).float()
