"""Vocabulary matching on released vectors: token by token, with a language model and a beam.

It does not average releases (`repeat_averaging`) nor learn an inverter.
"""

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess, time_limit
from cutlayer.audit.calibration import CALIBRATION_SHARE, calibrate
from cutlayer.audit.chains import chains
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.known_noise import ReleasedSpace, known_noise
from cutlayer.audit.matching import Deadline, Matching

__all__ = ["VocabularyMatching"]


@ATTACKS.register("vocabulary_matching")
class VocabularyMatching:
    """Runs candidate tokens through the head and keeps those whose states explain what was seen.

    Candidates are scored by log p(token) of the public model plus the log-likelihood of the known
    noise; hypotheses of several tokens are kept until later vectors decide.

    Source: arXiv 2505.18332; SipIt (arXiv 2510.15511) for the exact search without noise.
    """

    aim = Aim.TOKENS
    about = "run candidate tokens through the public head, keep the nearest (arXiv 2505.18332)"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """See `Attack`."""
        left_s = Deadline(effort)
        space = ReleasedSpace(known_noise(knowledge.rule, knowledge.embedding_VD.shape[1]))
        known = calibrate(knowledge, effort.seed, time_limit(effort, CALIBRATION_SHARE))
        matching = Matching(knowledge, space, left_s, known)
        rows = chains(evidence.observations)
        guesses: list[Guess] = []
        for index, row in enumerate(rows):
            guesses += matching.find(row, row.h_LD)
            effort.on_progress((index + 1) / len(rows))
        return guesses
