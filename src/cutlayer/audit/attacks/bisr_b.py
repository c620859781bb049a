"""BiSR, backward: gradient matching that starts from what a learned inverter reads.

It does not refine against the vectors of the lower cut afterwards (`bisr_bf`).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess
from cutlayer.audit.evidence import Evidence, Observation
from cutlayer.audit.gradient_matching import with_gradients
from cutlayer.audit.gradient_rows import GradientRows, MatchedRow
from cutlayer.audit.inverter_fit import InverterPlan, fit_inverter, token_log_probs
from cutlayer.audit.knowledge import Knowledge

__all__ = ["BisrB", "backward"]

_SHARE_INVERTER = 0.5


@ATTACKS.register("bisr_b")
class BisrB:
    """See `Attack`."""

    aim = Aim.TOKENS
    about = "gradient matching from the learned inverter's start (BiSR b, arXiv 2409.00960)"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """Scored tokens from the gradient, the others from the inverter.

        Raises:
            ConfigError: no observation has both a reply and a gradient, or no public rows.
        """
        return [row.guess(seen) for seen, row in backward(evidence, knowledge, effort)]


def backward(
    evidence: Evidence, knowledge: Knowledge, effort: Effort
) -> Iterator[tuple[Observation, MatchedRow]]:
    """Each row with a gradient, and its tokens; see `BisrB`."""
    with_gradients(evidence)
    end_s = effort.clock_s() + effort.seconds
    share = replace(
        effort,
        seconds=effort.seconds * _SHARE_INVERTER,
        on_progress=lambda done: effort.on_progress(done * _SHARE_INVERTER),
    )
    inverter = fit_inverter(evidence, knowledge, share, InverterPlan(with_noise=True))
    rows = GradientRows(evidence, knowledge, end_s - effort.clock_s(), effort)
    return rows.matched(
        lambda seen: torch.cat(list(token_log_probs(inverter, seen.h_LD))), _SHARE_INVERTER
    )
