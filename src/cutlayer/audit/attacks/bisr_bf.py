"""BiSR, backward and forward: what `bisr_b` finds is then matched to the released vectors.

It does not train nor match gradients itself.
"""

from dataclasses import replace

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess
from cutlayer.audit.attacks.bisr_b import backward
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.forward_matching import refine
from cutlayer.audit.knowledge import Knowledge

__all__ = ["BisrBf"]

_SHARE_BACKWARD = 0.7


@ATTACKS.register("bisr_bf")
class BisrBf:
    """See `Attack`."""

    aim = Aim.TOKENS
    about = "gradient matching, then smashed-data matching (BiSR b+f, arXiv 2409.00960)"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """Tokens of rows with gradients, from both directions.

        Raises:
            ConfigError: no observation has both a reply and a gradient, or no public rows.
        """
        end_s = effort.clock_s() + effort.seconds
        share = replace(
            effort,
            seconds=effort.seconds * _SHARE_BACKWARD,
            on_progress=lambda done: effort.on_progress(done * _SHARE_BACKWARD),
        )
        found = list(backward(evidence, knowledge, share))
        guesses = []
        for done, (observation, row) in enumerate(found):
            tokens_L = refine(
                knowledge, observation, row.tokens_L, lambda: effort.clock_s() >= end_s
            )
            guesses.append(replace(row, tokens_L=tokens_L).guess(observation))
            share_done = (done + 1) / len(found)
            effort.on_progress(_SHARE_BACKWARD + (1 - _SHARE_BACKWARD) * share_done)
        return guesses
