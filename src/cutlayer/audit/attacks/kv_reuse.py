"""Vocabulary matching on keys and values that the server keeps of a conversation.

Keys and values are functions of the released vectors: this shows what a copy of the server's cache
alone gives away (`cutlayer.audit.kv_space`).
"""

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess, time_limit
from cutlayer.audit.calibration import CALIBRATION_SHARE, calibrate
from cutlayer.audit.chains import chains
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.known_noise import known_noise
from cutlayer.audit.kv_space import KvSpace
from cutlayer.audit.matching import Deadline, Matching

__all__ = ["KvReuse"]


@ATTACKS.register("kv_reuse")
class KvReuse:
    """As vocabulary matching, comparing keys and values of the trunk's first block.

    Source: the search of arXiv 2505.18332, on another function of the same vectors.
    """

    aim = Aim.TOKENS
    about = "vocabulary matching on keys and values that the server keeps"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """See `Attack`."""
        left_s = Deadline(effort)
        known = calibrate(knowledge, effort.seed, time_limit(effort, CALIBRATION_SHARE))
        noise = known_noise(knowledge.rule, knowledge.embedding_VD.shape[1])
        matching = Matching(knowledge, KvSpace(knowledge, noise, known), left_s, known)
        rows = chains(evidence.observations)
        guesses: list[Guess] = []
        for index, row in enumerate(rows):
            guesses += matching.find(row, row.h_LD)
            effort.on_progress((index + 1) / len(rows))
        return guesses
