"""All later blocks as the trunk machinery calls them, with the LM head apart.

It does not train or cache. `server.host` knows how to share calls, keep graphs, save steps and
hold rounds for anything that takes and gives [N, D]; so here the blocks and the final norm are
that part, and the LM head, which nothing trains, is applied to the wanted places alone.

Shapes: N = tokens of all rows of a call, D = hidden size, S = places, V = vocabulary.
"""

from torch import Tensor

from cutlayer.errors import ProtocolError
from cutlayer.model.partition import Part, Tail, Trunk

__all__ = ["InnerPart"]


class InnerPart(Trunk):
    """The blocks and the norm of a tail: hidden states in, normed hidden states out."""

    part = Part.TAIL

    def __init__(self, tail: Tail) -> None:
        """Share everything that the tail has; the tail itself is not called any more."""
        # The very same modules: a copy would hold the weights twice.
        vars(self).update(vars(tail))
        # In a tuple, so that it is no submodule of itself.
        self._tail = (tail,)
        weight = next(p for p in tail.lm_head.parameters() if p.is_floating_point())
        self._like = weight.new_zeros(())

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.config.vocab_size)

    def logits(self, normed_SD: Tensor) -> Tensor:
        """Logits [S, V], float32 on the CPU, in the graph of the normed states.

        Raises:
            ProtocolError: they are not finite.
        """
        (tail,) = self._tail
        logits_SV = tail.logits(normed_SD.to(self._like)).to("cpu").float()
        if not bool(logits_SV.detach().isfinite().all()):
            raise ProtocolError(
                "the logits of these rows are NaN or infinite: training diverged, or the rows' "
                "activations are too large; lower train.lr, or use float32"
            )
        return logits_SV
