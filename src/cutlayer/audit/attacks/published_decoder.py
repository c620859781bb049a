"""The decoder of a published release, kept for comparison: its targets are shifted by one.

Vector t was trained to tell the token at t + 1, so it can only predict, never read: the token that
made the vector is no target. Its answers are compared at the places that they were trained for.
"""

from cutlayer.audit.attack import ATTACKS, LATE, Aim, Effort, Guess, time_limit
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.inverter_fit import InverterPlan, fit_inverter, inverter_guesses
from cutlayer.audit.knowledge import Knowledge

__all__ = ["PublishedDecoder"]

_PLAN = InverterPlan(shift=1)


@ATTACKS.register("published_decoder")
class PublishedDecoder:
    """See `Attack`."""

    aim = Aim.TOKENS
    about = "GRU with targets shifted by one, as in the FedSEA release: for comparison only"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """Train on the knowledge's public rows, then read every observation.

        Raises:
            ConfigError: there are no public rows.
        """
        is_late = time_limit(effort, LATE)
        inverter = fit_inverter(evidence, knowledge, effort, _PLAN)
        guesses = inverter_guesses(inverter, evidence, is_late, shift=_PLAN.shift)
        effort.on_progress(1.0)
        return guesses
