"""Repeat averaging: releases of one row in several epochs, averaged, then vocabulary matching.

Fresh noise averages out; replayed noise does not. It finds the repeats by itself.

Shapes: L = vectors of one row, D = hidden size.
"""

from collections import defaultdict

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess, time_limit
from cutlayer.audit.calibration import CALIBRATION_SHARE, calibrate
from cutlayer.audit.chains import chains
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.known_noise import ReleasedSpace, known_noise
from cutlayer.audit.links import Group, link
from cutlayer.audit.matching import Deadline, Matching

__all__ = ["RepeatAveraging"]


@ATTACKS.register("repeat_averaging")
class RepeatAveraging:
    """Links releases of one row over steps by length and distance, and matches their mean.

    The mean over n independent noises has 1/n of their variance, which the search is told. With a
    head that trains the states move a little between epochs; that adds to the residual, which the
    search measures.
    """

    aim = Aim.TOKENS
    about = "mean of a row's releases over epochs, then vocabulary matching"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """See `Attack`."""
        left_s, is_half_over = Deadline(effort), time_limit(effort, 2 * CALIBRATION_SHARE)
        width = knowledge.embedding_VD.shape[1]
        noise = known_noise(knowledge.rule, width)
        known = calibrate(knowledge, effort.seed, time_limit(effort, CALIBRATION_SHARE))
        matching = Matching(knowledge, ReleasedSpace(noise), left_s, known)
        groups = link(
            chains(evidence.observations),
            noise.variance,
            matching.shortlist.mean_token_variance,
            is_half_over,
        )
        by_number: dict[int, list[Group]] = defaultdict(list)
        for group in groups:
            by_number[len(group.distinct)].append(group)
        guesses: list[Guess] = []
        num_done = 0
        for number in sorted(by_number, reverse=True):
            averaged = matching.averaged(number)
            for group in by_number[number]:
                mean_LD = group.mean_LD
                for chain in group.chains:
                    guesses += averaged.find(chain, mean_LD)
                num_done += 1
                effort.on_progress(num_done / len(groups))
        return guesses
