"""The measured process of `benchmarks.spf`: one contestant alone, two steps, its memory.

Peak resident set is VmHWM of this process. It does not compare.
"""

from pathlib import Path

import msgspec

from benchmarks.isolate import answer, read_request
from benchmarks.memory_client import SavedBytes, peak_resident_bytes
from benchmarks.spf_subject import contestant, load_model, make_task

__all__ = ["SpfMemory", "SpfRequest", "main"]


class SpfRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Who trains on what."""

    model: str
    ratio: float | str
    num_rows: int
    smoke_folder: str | None


class SpfMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What it needed, in bytes."""

    loaded_bytes: int
    """Peak resident set once the model was loaded."""
    peak_bytes: int
    """The same after two steps."""
    activation_bytes: int
    """What autograd kept of the second step, weights excluded."""


def main() -> None:
    """Answer one `SpfRequest` from stdin."""
    request = read_request(SpfRequest)
    folder = None if request.smoke_folder is None else Path(request.smoke_folder)
    task = make_task(request.model, request.num_rows, 20, folder)
    model = load_model(task.model)
    loaded_bytes = peak_resident_bytes()
    trained = contestant(model, request.ratio, 1e-4)
    trained.step(task.train)
    saved = SavedBytes(
        [p for part in (model.head, model.trunk, model.tail) for p in part.parameters()]
    )
    with saved.hooks():
        trained.step(task.train)
    answer(
        SpfMemory(
            loaded_bytes=loaded_bytes,
            peak_bytes=peak_resident_bytes(),
            activation_bytes=saved.total,
        )
    )


if __name__ == "__main__":
    main()
