"""Does a part behave as the usual layout says: try it out before anybody relies on it.

It does not know families. It is what keeps an unlisted architecture from being cut wrongly
without a word.

Shapes: N = tokens, D = hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.model.partition import Part, PartModule
from cutlayer.model.rows import Rows

__all__ = ["check_blocks", "check_ends"]

NUM_TOKENS = 3


@torch.no_grad()
def check_blocks(part: PartModule) -> None:
    """Check a part on the meta device: every block attends once, through our attention.

    Raises:
        ModelError: masks or windows of its own, other ways to mix tokens.
    """
    h_ND = torch.zeros(NUM_TOKENS, part.hidden_size, device="meta")
    # Routed experts have no meta kernels; the first real call checks those.
    with suppress(NotImplementedError, RuntimeError):
        part.run_blocks(h_ND, Rows(lengths=(NUM_TOKENS - 1, 1)))


@torch.no_grad()
def check_ends(part: PartModule) -> None:
    """Check a loaded part: nothing happens before its first block, one norm after its last.

    Raises:
        ModelError: the base model scales, shifts, projects or norms whatever enters it.
    """
    h_ND = torch.rand_like(part.zeros_ND(NUM_TOKENS)) - 0.5
    inputs = {"inputs_embeds": h_ND[None]}
    if part.part is Part.HEAD:
        inputs = {"input_ids": torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device=h_ND.device)}
    position_ids = torch.arange(NUM_TOKENS, device=h_ND.device)[None]
    with _without_blocks(part) as norm:
        output = part.base(**inputs, position_ids=position_ids, use_cache=False)
    is_changed = not torch.equal(output.last_hidden_state[0], h_ND)
    if norm.num_calls != 1 or (is_changed and part.part is not Part.HEAD):
        raise ModelError(
            f"{type(part.base).__name__} changes hidden states before its first block; "
            "cutlayer needs a table entry for this architecture"
        )


class _CountedIdentity(nn.Module):
    """Stands where the final norm was and counts how often it is asked."""

    num_calls = 0

    def forward(self, h_1ND: Tensor) -> Tensor:
        self.num_calls += 1
        return h_1ND


@contextmanager
def _without_blocks(part: PartModule) -> Iterator[_CountedIdentity]:
    names = (part.layout.blocks, part.layout.norm)
    kept = [getattr(part.base, name) for name in names]
    norm = _CountedIdentity()
    setattr(part.base, names[0], nn.ModuleList())
    setattr(part.base, names[1], norm)
    try:
        yield norm
    finally:
        for name, module in zip(names, kept, strict=True):
            setattr(part.base, name, module)
