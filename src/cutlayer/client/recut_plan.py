"""What a re-cut moves, and whether this run can be re-cut at all. It moves nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.model.moved_blocks import moments_of, of_blocks
from cutlayer.model.partition import Cut, Part

__all__ = ["RecutPlan", "check_settings"]

_HEAD, _TAIL = str(Part.HEAD), str(Part.TAIL)


@dataclass(frozen=True, kw_only=True)
class RecutPlan:
    """From one cut of a model to another; everything is in global block indices."""

    old: Cut
    new: Cut
    num_blocks: int

    def __post_init__(self) -> None:
        """Raises ConfigError where the new cut exceeds the model."""
        self.new.check(self.num_blocks)

    @property
    def is_there(self) -> bool:
        """Whether nothing has to move."""
        return self.old == self.new

    @property
    def to_server(self) -> list[int]:
        """Blocks that leave the client, ascending."""
        return sorted(set(self.new.trunk) - set(self.old.trunk))

    @property
    def to_client(self) -> list[int]:
        """Blocks that come to the client, ascending."""
        return sorted(set(self.old.trunk) - set(self.new.trunk))

    @property
    def runs_to_client(self) -> list[Cut]:
        """`to_client` as unbroken runs of blocks."""
        numbered = enumerate(self.to_client)
        runs = [[b for _, b in run] for _, run in groupby(numbered, lambda pair: pair[1] - pair[0])]
        return [Cut(run[0], run[-1] + 1) for run in runs]

    def check_trained(self, parts: Iterable[Part]) -> None:
        """Refuse a move that would begin or end the learning of a block.

        Args:
            parts: which parts are trained.

        Raises:
            ConfigError: a block would learn on one side of the cut alone.
        """
        trained = set(parts)
        for block in range(self.num_blocks):
            before, after = self._part(self.old, block), self._part(self.new, block)
            if (before in trained) != (after in trained):
                learns = before if before in trained else after
                raise ConfigError(
                    f"block {block} would go from the {before} to the {after}, and adapter.parts "
                    f"trains the {learns} alone: what learns would change in the middle of a run; "
                    "start a new run with the other cut"
                )

    def leaving(
        self, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and moments of a saved step that go to the server."""
        weights, moments = _both_ends(tensors)
        moved = of_blocks(weights, self.to_server)
        return moved, moments_of(moments, moved)

    def files(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
    ) -> dict[str, dict[str, Tensor]]:
        """What head and tail save of a step with the new cut.

        Args:
            tensors: of the step with the old cut, as `TrainedParts.state` names them.
            weights: of the blocks that came to the client.
            moments: of their optimizer.
        """
        own, own_moments = _both_ends(tensors)
        everything, all_moments = {**own, **weights}, {**own_moments, **moments}
        files = {}
        for part in (Part.HEAD, Part.TAIL):
            state = of_blocks(everything, self.new.blocks(part, self.num_blocks))
            files[str(part)] = state
            files[f"{part}_optimizer"] = moments_of(all_moments, state)
        return files

    def _part(self, cut: Cut, block: int) -> Part:
        return next(part for part in Part if block in cut.blocks(part, self.num_blocks))


def check_settings(settings: ClientSettings) -> None:
    """Refuse runs whose cut cannot move, each by the name of what stands against it.

    Raises:
        ConfigError: says what and what to do.
    """
    if settings.hops:
        raise ConfigError(
            "[[hops]] says which blocks each trunk host runs, so the cut of this run cannot move; "
            "start a new run with other hops"
        )
    if settings.privacy.denoiser:
        raise ConfigError(
            "privacy.denoiser learns at one cut and knows no other, so this run cannot be re-cut; "
            "start a new run with the other cut"
        )
    if settings.run.record_file is not None:
        raise ConfigError(
            "run.record_file records frames of one cut, so this run cannot be re-cut while it "
            "records; train without a recording, or record a new run with the other cut"
        )


def _both_ends(
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    moments = {**tensors[f"{_HEAD}_optimizer"], **tensors[f"{_TAIL}_optimizer"]}
    return {**tensors[_HEAD], **tensors[_TAIL]}, moments
