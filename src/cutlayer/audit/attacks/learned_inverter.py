"""Learned inversion of the head: public text through the public head, without noise (BiSR's SIP).

It does not train under the noise (`noise_aware_inverter`). Its targets are not shifted.
"""

from cutlayer.audit.attack import ATTACKS, LATE, Aim, Effort, Guess, time_limit
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.inverter_fit import InverterPlan, fit_inverter, inverter_guesses
from cutlayer.audit.knowledge import Knowledge

__all__ = ["LearnedInverter"]


@ATTACKS.register("learned_inverter")
class LearnedInverter:
    """See `Attack`."""

    aim = Aim.TOKENS
    about = "GRU from vector to token, trained on public text without noise (SIP, arXiv 2409.00960)"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """Train on the knowledge's public rows, then read every observation.

        Raises:
            ConfigError: there are no public rows.
        """
        is_late = time_limit(effort, LATE)
        inverter = fit_inverter(evidence, knowledge, effort, InverterPlan())
        guesses = inverter_guesses(inverter, evidence, is_late)
        effort.on_progress(1.0)
        return guesses
