"""Labels from the gradient at the upper cut: the tail is public, so its gradient can be solved.

It does not read tokens off vectors (`bisr_b` puts labels back into rows).
"""

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess, nothing_said, time_limit
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
        is_time_up = time_limit(effort)
        observations = with_gradients(evidence)
        _, tail = knowledge.parts
        reader = LabelReader(tail, knowledge.gradient_rule)
        guesses = []
        for done, (observation, y_LD, gradient_LD) in enumerate(observations):
            if is_time_up():
                guesses.append(nothing_said(observation.number, len(observation.h_LD)))
            else:
                found = reader.read(TailRow(tail, y_LD), gradient_LD, is_time_up)
                guesses.append(_guess(observation, found))
            effort.on_progress((done + 1) / len(observations))
        return guesses


def _guess(observation: Observation, found: RowLabels) -> Guess:
    return Guess(
        number=observation.number,
        tokens=tuple(int(token) for token in found.labels_L),
        confidences=tuple(found.confidences_L.tolist()),
        num_unfinished=0 if found.is_finished else len(found.labels_L),
    )
