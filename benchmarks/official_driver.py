"""Asks an official script in its own process: `python official_driver.py KIND SCRIPT INPUT`.

It imports nothing of cutlayer and computes nothing: it loads the script by its path, calls its own
functions on what INPUT (JSON) holds, and prints what they return as one JSON line.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

__all__ = ["KINDS"]

Row = Mapping[str, object]
Numbers = dict[str, object]


def _coqa(script: ModuleType, rows: Sequence[Row]) -> Numbers:
    """One row: `gold` and `predictions`, paths of files; values in the gold's order."""
    evaluator = script.CoQAEvaluator(rows[0]["gold"])
    replies = script.CoQAEvaluator.preds_to_dict(rows[0]["predictions"])
    exact, f1 = evaluator.get_raw_scores(replies)
    answers = [evaluator.gold_data[key] for key in evaluator.gold_data]
    return {"f1": list(f1.values()), "em": list(exact.values()), "answers": answers}


def _record(script: ModuleType, rows: Sequence[Row]) -> Numbers:
    """Rows: `text` and `answers`. The best of the answers counts, as its own caller takes it."""
    ask = {"f1": script.string_f1_score, "em": script.exact_match_score}
    return {
        name: [
            float(max(score(row["text"], answer) for answer in cast(list[str], row["answers"])))
            for row in rows
        ]
        for name, score in ask.items()
    }


def _multirc(script: ModuleType, rows: Sequence[Row]) -> Numbers:
    """Rows: `group`, `wanted` and `said`, the last two True or False."""
    asked = [([str(row["said"])], [f"{row['group']}_{row['wanted']}"]) for row in rows]
    return {
        "f1a": float(script.agg_f1([script.f1(said, wanted) for said, wanted in asked])),
        "em": float(script.agg_em([script.em(said, wanted) for said, wanted in asked])),
    }


def _cb(script: ModuleType, rows: Sequence[Row]) -> Numbers:
    """Rows: `said` and `wanted`, numbers of classes."""
    return {"f1": float(script.cb_multi_fi([(row["said"], row["wanted"]) for row in rows]))}


KINDS: Mapping[str, Callable[[ModuleType, Sequence[Row]], Numbers]] = {
    "cb": _cb,
    "coqa": _coqa,
    "multirc": _multirc,
    "record": _record,
}
"""How each script is asked."""


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("official_script", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _main(kind: str, script: str, given: str) -> None:
    rows = cast(Sequence[Row], json.loads(Path(given).read_text(encoding="utf-8")))
    print(json.dumps(KINDS[kind](_loaded(Path(script)), rows)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
