"""Is what many clients compute together what one model computes: gradients, losses, sums.

Run as a process (`isolate.run_isolated`): one server over mutual TLS and its clients as threads, on
a tiny model. It measures no time.
"""

import tempfile
from pathlib import Path

import msgspec

from benchmarks.isolate import answer, read_request
from benchmarks.parity_gradients import compare_gradients
from benchmarks.parity_losses import compare_losses
from benchmarks.parity_sums import compare_sums

__all__ = ["ParityRequest", "ParityResult", "main"]


class ParityRequest(msgspec.Struct, frozen=True, kw_only=True):
    """How much to compare."""

    num_steps: int
    """Steps whose losses are compared."""
    num_clients: int = 4


class ParityResult(msgspec.Struct, frozen=True, kw_only=True):
    """Largest differences."""

    gradient_max_rel_diff: float
    """See `parity_gradients`."""
    every_step_loss_max_rel_diff: float
    """See `parity_losses`."""
    secagg_max_abs_diff: float
    """See `parity_sums`."""


def _compare(request: ParityRequest, folder: Path) -> ParityResult:
    gradients = compare_gradients(folder, request.num_clients)
    return ParityResult(
        gradient_max_rel_diff=gradients.max_rel_diff,
        every_step_loss_max_rel_diff=compare_losses(folder, request.num_clients, request.num_steps),
        secagg_max_abs_diff=compare_sums(gradients.updates),
    )


def main() -> None:
    """Answer one `ParityRequest` from stdin."""
    request = read_request(ParityRequest)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o700)
        answer(_compare(request, folder))


if __name__ == "__main__":
    main()
