"""A trunk with quantised weights beside the same one in full: memory, error, loss, time.

Run it with `python -m benchmarks.quantised --json`. It measures one process without a wire, and no
training; that it trains as unsplit PEFT does is in `tests/parity`.

Shapes: N = tokens of a call, D = hidden size, V = vocabulary.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import Value, emit, median, parse_arguments, print_table
from benchmarks.subjects import equal_rows, subject_folder
from cutlayer.model.checkpoint import load_client_parts, load_part
from cutlayer.model.folder import resolve_model
from cutlayer.model.part_settings import TrunkWeights
from cutlayer.model.partition import Cut, Part
from cutlayer.model.quantised import weight_bytes
from cutlayer.model.rows import Rows, pack

__all__ = ["main"]

_ROW_TOKENS = 128
_REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What one way of keeping the weights gave."""

    megabytes: float
    outputs_ND: Tensor
    logits_NV: Tensor
    loss: float
    ms: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    told = parse_arguments("a trunk's weights in 8 and 4 bits", arguments)
    torch.set_num_threads(told.threads[0])
    with tempfile.TemporaryDirectory() as work:
        folder = subject_folder(told.model, is_smoke=told.is_smoke, work_folder=Path(work))
        model = resolve_model(folder)
        rows = (
            equal_rows(2, 16, model.config.vocab_size) if told.is_smoke else _articles(folder, 20)
        )
        cut = Cut(2, int(model.config.num_hidden_layers) - 2)
        found = {weights: _measure(folder, cut, rows, weights) for weights in TrunkWeights}
    full = found[TrunkWeights.FULL]
    lines = {str(weights): _line(one, full) for weights, one in found.items()}
    columns = ("weights", *next(iter(lines.values())))
    title = f"blocks {cut.lower} to {cut.upper - 1}, {len(rows)} rows of {len(rows[0])} tokens"
    print_table(title, columns, [(name, *line.values()) for name, line in lines.items()])
    result: dict[str, Value] = {"num_rows": len(rows), "row_tokens": len(rows[0])}
    for name, line in lines.items():
        result |= {f"{name}_{key}": value for key, value in line.items()}
    emit(result, told)


def _articles(folder: Path, count: int) -> list[list[int]]:
    """The beginnings of news articles."""
    # Imported late: the smoke profile needs no asset and no network.
    from cutlayer.data.assets import fetch

    tokenizer = resolve_model(folder).tokenizer()
    paths = sorted(fetch("bbcnews").glob("*/*.txt"))
    rows: list[list[int]] = []
    for path in paths[:: len(paths) // (2 * count)]:
        tokens = tokenizer(path.read_text(encoding="utf-8", errors="replace"))["input_ids"]
        if len(tokens) >= _ROW_TOKENS and len(rows) < count:
            rows.append(tokens[:_ROW_TOKENS])
    return rows


@torch.no_grad()
def _measure(folder: Path, cut: Cut, rows: Sequence[list[int]], weights: TrunkWeights) -> _Found:
    head, tail = load_client_parts(folder, cut)
    trunk = load_part(folder, cut, Part.TRUNK, weights=weights)
    outputs, logits, loss_sum, num_scored = [], [], 0.0, 0
    for tokens in rows:
        row = pack([tokens])
        y_ND = trunk(head(row), row)
        logits_NV = tail(y_ND, row)
        labels = torch.tensor(tokens[1:])
        loss_sum += float(
            torch.nn.functional.cross_entropy(logits_NV[:-1], labels, reduction="sum")
        )
        num_scored += len(labels)
        outputs.append(y_ND)
        logits.append(logits_NV)
    ms = {}
    for name, num_tokens in (("token", 1), ("prompt", _ROW_TOKENS)):
        h_ND, call = trunk.zeros_ND(num_tokens), Rows(lengths=(num_tokens,))
        ms[name] = _time_ms(lambda h_ND=h_ND, call=call: trunk(h_ND, call))
    return _Found(
        megabytes=weight_bytes(trunk) / 1e6,
        outputs_ND=torch.cat(outputs),
        logits_NV=torch.cat(logits),
        loss=loss_sum / num_scored,
        ms=ms,
    )


def _time_ms(work: Callable[[], Tensor]) -> float:
    taken = []
    for _ in range(_REPEATS + 2):
        began_s = time.perf_counter()
        work()
        taken.append((time.perf_counter() - began_s) * 1e3)
    return median(taken, skip=2)


def _line(one: _Found, full: _Found) -> dict[str, Value]:
    same = (one.logits_NV.argmax(1) == full.logits_NV.argmax(1)).float().mean()
    return {
        "megabytes": one.megabytes,
        "trunk_error": _relative(one.outputs_ND, full.outputs_ND),
        "logits_error": _relative(one.logits_NV, full.logits_NV),
        "same_token": float(same),
        "loss": one.loss,
        "token_ms": one.ms["token"],
        "prompt_ms": one.ms["prompt"],
    }


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    main()
