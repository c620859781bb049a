"""TAG at the cut: soft labels from the tail's own guess, optimised to the released gradient.

It does not use the vectors of the lower cut (`bisr_b` and `bisr_bf` do).
"""

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.gradient_rows import GradientRows
from cutlayer.audit.knowledge import Knowledge

__all__ = ["Tag"]


@ATTACKS.register("tag")
class Tag:
    """See `Attack`."""

    aim = Aim.TOKENS
    about = "gradient matching on soft labels, 0.85 L2 + 0.15 L1 (TAG, arXiv 2103.06819)"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """The tokens that were scored; the others are not guessed.

        Raises:
            ConfigError: no observation has both a reply and a gradient.
        """
        rows = GradientRows(evidence, knowledge, effort.seconds, effort)
        return [
            matched.guess(observation)
            for observation, matched in rows.matched(lambda observation: None, 0.0)
        ]
