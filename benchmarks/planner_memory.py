"""Client memory for 7B shapes: the planner's prediction against a real client process.

`python -m benchmarks.planner_memory --json`. The model is zero weights in a sparse file; the client
trains two steps over mutual TLS with an echo in place of the trunk, optimizer and saves included.
`smoke` does the same with a small shape.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from benchmarks.isolate import run_isolated, start_isolated
from benchmarks.memory import SHAPES, LlamaShape, write_sparse_llama
from benchmarks.planner_client import EchoRequest, PlannedClient, PlannedUse, Request
from benchmarks.report import emit, parse_arguments, print_table
from benchmarks.split import SplitRequest, make_kits
from benchmarks.subjects import equal_rows
from cutlayer.identity.provision import LocalFolders
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut
from cutlayer.planner.baseline import measure_baseline
from cutlayer.planner.memory import MemoryModel
from cutlayer.planner.shapes import read_shapes
from cutlayer.planner.workload import Workload

__all__ = ["CUTS_7B", "compare_7b", "main"]

CUTS_7B = ((1, 1), (2, 3), (5, 5))
"""Blocks before and after the trunk, as the published table has them."""
_ROWS, _LENGTH = 2, 64
_THREADS = 1


@contextmanager
def _echo(kits: LocalFolders) -> Iterator[str]:
    request = Request(echo=EchoRequest(kit=str(kits.server)))
    process = start_isolated("benchmarks.planner_client", request, _THREADS)
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.communicate("\n", timeout=30)


def _workload(dtype: str) -> Workload:
    return Workload(
        mean_length=_LENGTH,
        rows_per_step=_ROWS,
        micro_batch_rows=1,
        dtype=dtype,
        threads=_THREADS,
        adapter=AdapterSettings(rank=8, alpha=16),
    )


def compare_7b(
    folder: Path, shape: LlamaShape = SHAPES["standard"], dtype: str = "float32"
) -> dict[str, bool | int | float | str | None]:
    """Predict and measure every cut; errors and sizes by key."""
    model = folder / "sparse"
    model.mkdir()
    write_sparse_llama(model, shape)
    workload, config = _workload(dtype), resolve_model(model).config
    shapes = read_shapes(config, dtype, workload.adapter)
    predict = MemoryModel(shapes, workload, measure_baseline(_THREADS))
    kits = make_kits(folder / "kits-7b")
    rows: list[tuple[str, float, float, float]] = []
    with _echo(kits) as address:
        for head, tail in CUTS_7B:
            cut = Cut(head, shape.num_blocks - tail)
            use = _measured(model, cut, address, kits, dtype)
            predicted, found = predict.client(cut).training / 1e9, use.peak_bytes / 1e9
            rows.append((f"{head}, {tail}", predicted, found, abs(predicted - found) / found))
    columns = ("blocks before, after", "predicted GB", "measured GB", "error")
    print_table(f"client memory of {shape.num_blocks} blocks, {dtype}", columns, rows)
    result: dict[str, bool | int | float | str | None] = {}
    for name, predicted, found, _ in rows:
        key = name.replace(", ", "_")
        result |= {f"predicted_gb_{key}": predicted, f"measured_gb_{key}": found}
    return {**result, "memory_error_7b": max(row[-1] for row in rows)}


def _measured(model: Path, cut: Cut, address: str, kits: LocalFolders, dtype: str) -> PlannedUse:
    split = SplitRequest(
        address=address,
        model_folder=str(model),
        lower=cut.lower,
        upper=cut.upper,
        kit=str(kits.clients["owner"]),
        codec="bf16",
        rows=equal_rows(_ROWS, _LENGTH, 1000),
        steps=2,
        micro_batch_rows=1,
    )
    request = Request(client=PlannedClient(split=split, dtype=dtype))
    return run_isolated(
        "benchmarks.planner_client", request, PlannedUse, num_threads=_THREADS, timeout_s=400.0
    )


def main() -> None:
    """Compare and report."""
    arguments = parse_arguments(__doc__ or "")
    shape = SHAPES[arguments.profile]
    if arguments.is_smoke:
        shape = msgspec.structs.replace(shape, num_blocks=12)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o700)
        emit({"profile": arguments.profile, **compare_7b(folder, shape)}, arguments)


if __name__ == "__main__":
    main()
