"""Labels from the gradient at the upper cut: the tail is public, so its gradient can be solved.

It does not read tokens off vectors (`bisr_b` puts labels back into rows).
"""

import torch
from torch import Tensor

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess
from cutlayer.audit.evidence import Evidence, Observation
from cutlayer.audit.gradient_matching import with_gradients
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.tail_gradients import TailRow
from cutlayer.audit.tail_labels import LabelReader, RowLabels

__all__ = ["LabelInference"]


@ATTACKS.register("label_inference")
class LabelInference:
    """See `Attack`."""

    aim = Aim.LABELS
    about = "labels solved from the released gradient (UnSplit 2108.09033; direction 2102.08504)"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """Which places of each row are scored, and with what; rows past the time are not guessed.

        Raises:
            ConfigError: no observation has both a reply and a gradient.
        """
        end_s = effort.clock_s() + effort.seconds
        observations = with_gradients(evidence)
        _, tail = knowledge.parts
        reader = LabelReader(tail, knowledge.gradient_rule)
        guesses = []
        for done, (observation, y_LD, gradient_LD) in enumerate(observations):
            if effort.clock_s() < end_s:
                guesses.append(_guess(observation, reader.read(TailRow(tail, y_LD), gradient_LD)))
            else:
                guesses.append(_nothing(observation))
            effort.on_progress((done + 1) / len(observations))
        return guesses


def _guess(observation: Observation, found: RowLabels) -> Guess:
    return Guess(
        number=observation.number,
        tokens=_integers(found.labels_L),
        confidences=tuple(found.confidences_L.tolist()),
    )


def _nothing(observation: Observation) -> Guess:
    length = len(observation.h_LD)
    return Guess(
        number=observation.number,
        tokens=_integers(torch.full((length,), -1)),
        confidences=(0.0,) * length,
        num_unfinished=length,
    )


def _integers(tokens_L: Tensor) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens_L)
