"""A part's base model with some of its blocks alone: the same modules, weights and adapters.

It does not compute (`partition`) nor choose the blocks.
"""

import copy

from torch import nn
from transformers import PreTrainedModel

from cutlayer.errors import ConfigError
from cutlayer.model.families import slice_config

__all__ = ["BaseViews"]


class BaseViews:
    """Views of one base model, made when first asked for."""

    def __init__(self, base: PreTrainedModel, layers: str, blocks: range) -> None:
        """Args:
        base: with a part's blocks.
        layers: what the architecture calls its list of blocks.
        blocks: their global indices.
        """
        self._base = base
        self._layers = layers
        self._blocks = blocks
        self._views: dict[range, PreTrainedModel] = {blocks: base}

    def of(self, blocks: range) -> PreTrainedModel:
        """A base model that runs these blocks, by global index.

        Raises:
            ConfigError: the part does not have them.
        """
        if blocks not in self._views:
            self._views[blocks] = self._view(blocks)
        return self._views[blocks]

    def _view(self, blocks: range) -> PreTrainedModel:
        own = self._blocks
        if not (blocks and own.start <= blocks.start and blocks.stop <= own.stop):
            raise ConfigError(
                f"blocks {blocks.start} to {blocks.stop} are not all of this part, which has "
                f"{own.start} to {own.stop}"
            )
        local = range(blocks.start - own.start, blocks.stop - own.start)
        view = copy.copy(self._base)
        # A table of its own, or the base model would lose its other blocks too.
        vars(view)["_modules"] = dict(self._base._modules)
        layers = getattr(self._base, self._layers)
        setattr(view, self._layers, nn.ModuleList(layers[local.start : local.stop]))
        view.config = copy.deepcopy(self._base.config)
        slice_config(view.config, local)
        return view
