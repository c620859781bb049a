"""A part that is a view of a whole transformers model's blocks, to test adapters alone.

It does not run: the whole model does, and so with the adapters that were put on its blocks.
"""

from torch import nn
from transformers import PreTrainedModel

from cutlayer.model.families import read_layout
from cutlayer.model.partition import Part, PartModule

__all__ = ["PartView", "views"]


class PartView(nn.Module):
    """Some blocks of a model, under the names that a real part has."""

    global_name = PartModule.global_name

    def __init__(self, model: PreTrainedModel, part: Part, blocks: range) -> None:
        super().__init__()
        self.part = part
        self.block_range = blocks
        self.config = model.config
        whole = model.base_model
        self.layout = read_layout(model)
        name = self.layout.blocks
        self.base = nn.Module()
        setattr(self.base, name, nn.ModuleList([getattr(whole, name)[index] for index in blocks]))
        self.rest = nn.ModuleList([model.get_input_embeddings(), model.get_output_embeddings()])


def views(model: PreTrainedModel, lower: int, upper: int) -> list[PartView]:
    """Head, trunk and tail of a model."""
    ranges = [range(lower), range(lower, upper), range(upper, model.config.num_hidden_layers)]
    return [PartView(model, part, blocks) for part, blocks in zip(Part, ranges, strict=True)]
