"""Learned inversion of the head, trained under the very noise that the owner adds.

It draws noise of its own: the owner's secret is never needed.
"""

from cutlayer.audit.attack import ATTACKS, LATE, Aim, Effort, Guess, time_limit
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.inverter_fit import InverterPlan, fit_inverter, inverter_guesses
from cutlayer.audit.knowledge import Knowledge

__all__ = ["NoiseAwareInverter"]


@ATTACKS.register("noise_aware_inverter")
class NoiseAwareInverter:
    """See `Attack`."""

    aim = Aim.TOKENS
    about = (
        "GRU from vector to token, trained under the rule's own clip and noise (arXiv 2409.00960)"
    )

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """Train on the knowledge's public rows, then read every observation.

        Raises:
            ConfigError: there are no public rows.
        """
        is_late = time_limit(effort, LATE)
        inverter = fit_inverter(evidence, knowledge, effort, InverterPlan(with_noise=True))
        guesses = inverter_guesses(inverter, evidence, is_late)
        effort.on_progress(1.0)
        return guesses
