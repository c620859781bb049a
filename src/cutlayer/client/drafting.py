"""Which drafter a stream gets. It does not verify (`verification`) nor say how many."""

from collections.abc import Callable, Mapping, Sequence

from cutlayer.client.draft_lookup import LookupDrafter
from cutlayer.client.draft_model import ModelDrafter
from cutlayer.client.draft_protocol import Draft, Drafter, DraftWorld
from cutlayer.client.draft_self import SelfDrafter
from cutlayer.client.settings import DraftKind, SpeculationSettings
from cutlayer.errors import ConfigError

__all__ = ["DRAFTERS", "Draft", "DraftWorld", "Drafter", "make_drafter"]


class NoDrafter:
    """Never guesses."""

    def propose(self, tokens: Sequence[int], num_tokens: int) -> Draft:
        """Nothing; see `Drafter`."""
        return Draft(())

    def close(self) -> None:
        """There is nothing to let go."""


def _none(settings: SpeculationSettings, world: DraftWorld) -> Drafter:
    return NoDrafter()


def _lookup(settings: SpeculationSettings, world: DraftWorld) -> Drafter:
    return LookupDrafter(settings.min_match)


def _self(settings: SpeculationSettings, world: DraftWorld) -> Drafter:
    if world.guess is None or world.forget is None:
        raise ConfigError(
            'generation.speculation.kind = "self" guesses with head and tail, which are not at '
            'hand here; choose "lookup"'
        )
    return SelfDrafter(world.guess, world.forget, world.sampling, world.least_confidence)


def _model(settings: SpeculationSettings, world: DraftWorld) -> Drafter:
    if world.model is None:
        raise ConfigError(
            'generation.speculation.kind = "model" needs a small model: name its folder, GGUF '
            "file or hub id in generation.speculation.model"
        )
    return ModelDrafter(world.model(), world.sampling, world.draw, world.least_confidence)


DRAFTERS: Mapping[DraftKind, Callable[[SpeculationSettings, DraftWorld], Drafter]] = {
    DraftKind.NONE: _none,
    DraftKind.LOOKUP: _lookup,
    DraftKind.SELF: _self,
    DraftKind.MODEL: _model,
}
"""How each kind is made; one drafter per stream."""


def make_drafter(settings: SpeculationSettings, world: DraftWorld) -> Drafter:
    """A drafter for one stream.

    Raises:
        ConfigError: the world lacks what this kind needs.
    """
    return DRAFTERS[settings.kind](settings, world)
