"""The page of a store of results: targets, tables, pictures, and where each number comes from.

It runs nothing. The same store gives the same bytes.
"""

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.storage.files import explain_os_errors, write_atomic
from cutlayer.suite.arms import Sheet, sheets
from cutlayer.suite.origin import DIRTY, UNKNOWN
from cutlayer.suite.plots import (
    DEMO_SCALE,
    draw_cuts,
    draw_scores,
    require_pictures,
    write_picture,
)
from cutlayer.suite.report_texts import (
    AGAIN,
    DIFFERENCES,
    INTRODUCTION,
    OFFICIAL_SCORES,
    method_text,
)
from cutlayer.suite.result import RunResult
from cutlayer.suite.store import Store
from cutlayer.suite.tables import (
    agreement_table,
    cut_arms,
    cut_table,
    failures_table,
    origin_table,
    recoveries,
    scores_table,
    targets_table,
    without_paths,
)
from cutlayer.suite.targets import Target, Verdict, gain_target, targets

__all__ = ["main_metric", "profile_of", "write_report"]

_PROFILES = ("small", "medium", "full")
_MODE = 0o644
_WIDTH = 150
_PAGE_LINK = re.compile(r"\[([^\]]*)\]\(([\w-]+\.md)\)")


@dataclass(frozen=True, kw_only=True)
class _Page:
    """What the parts of a page need."""

    results: Sequence[RunResult]
    sheets: Sequence[Sheet]
    images: Path
    """Folder of the pictures."""
    to_images: str
    """The same as links of the page name it."""
    profile: str
    targets: Sequence[Target]


def write_report(store_folder: Path, target: Path, images_folder: Path) -> None:
    """Write the page and its pictures, `evaluation-TASK.svg` and `evaluation-TASK-cuts.svg`.

    Args:
        store_folder: results, one JSON file each.
        target: the page, Markdown; its folder must exist.
        images_folder: made if it is missing.

    Raises:
        ConfigError: no results, or matplotlib is not installed.
        DataError: runs that must be compared answered different questions.
        StorageError: a result is damaged, or the page cannot be written.
    """
    results = Store.existing(store_folder).all()
    require_pictures()
    with explain_os_errors(f"create {images_folder}"):
        images_folder.mkdir(parents=True, exist_ok=True)
    found, profile = sheets(results), profile_of(results)
    page = _Page(
        results=results,
        sheets=found,
        images=images_folder,
        to_images=Path(os.path.relpath(images_folder, target.parent)).as_posix(),
        profile=profile,
        targets=targets(found, main_metric, profile),
    )
    write_atomic(target, _without_dead_links(_text(page), target.parent).encode(), _MODE)


def main_metric(task: str) -> str:
    """The metric by which runs of a task are compared.

    Raises:
        ConfigError: no task has that name.
    """
    return published_task(task).main_metric


def profile_of(results: Iterable[RunResult]) -> str:
    """The profile that the commands of the runs name; `small` where they name none or several."""
    pairs = {pair for run in results for pair in pairwise(run.origin.command.split())}
    named = [name for name in _PROFILES if ("--profile", name) in pairs]
    return named[0] if len(named) == 1 else "small"


def _without_dead_links(text: str, folder: Path) -> str:
    """Pages of docs are named without a link where they do not lie beside the report."""

    def checked(link: re.Match[str]) -> str:
        return link[0] if (folder / link[2]).exists() else link[1]

    return _PAGE_LINK.sub(checked, text)


def _text(page: _Page) -> str:
    parts = [
        "# Does it learn as well as unsplit training?",
        INTRODUCTION,
        _summary(page),
        "## Targets",
        _targets(page),
        *_agreement(page),
        "## Method",
        method_text(),
        *(part for number in range(len(page.sheets)) for part in _task(page, number)),
        "## What failed",
        _failures(page),
        "## What differs from the papers, and why",
        DIFFERENCES,
        "## How to make it again",
        AGAIN,
        "## Where each number comes from",
        origin_table(page.results),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _summary(page: _Page) -> str:
    found = page.targets
    counts = {verdict: sum(one.verdict is verdict for one in found) for verdict in Verdict}
    num_failed = sum(run.error is not None for run in page.results)
    verdicts = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items())
    return (
        f"**{len(page.results)} runs, {num_failed} of them failed; targets (one per task): "
        f"{verdicts}.** Bounds are those of the profile `{page.profile}`.{_sources(page)}"
    )


def _sources(page: _Page) -> str:
    """A warning where numbers were made by other sources than those that stand beside them."""
    commits = {run.origin.commit for run in page.results if run.error is None}
    said = []
    if len(commits) > 1:
        said.append(f"runs are of {len(commits)} commits, and what changed between them counts too")
    if any(commit == UNKNOWN or commit.endswith(DIRTY) for commit in commits):
        said.append("some runs are of sources that no commit has")
    return f"\n**Beware:** {'; '.join(said)}; see the last table." if said else ""


def _targets(page: _Page) -> str:
    return (
        "A target is met only by the letter: a mean within its bound, an interval that contains "
        "what it must contain.\nDifferences are points, with 95 % intervals.\n\n"
        + targets_table(page.targets)
        + "\n"
        + OFFICIAL_SCORES
    )


def _agreement(page: _Page) -> list[str]:
    table = agreement_table(page.sheets)
    about = (
        "Split training without noise and codec, against the unsplit script, in float32. "
        "A reply has no second choice, so\nnone that differs counts as a near tie."
    )
    return ["### Split against unsplit, step by step", about, table] if table else []


def _task(page: _Page, number: int) -> list[str]:
    """One sheet: heading, scores, picture, cuts, guarantees."""
    sheet = page.sheets[number]
    if not sheet.scored:
        return []
    metric, name = main_metric(sheet.task), _file_name(page, number)
    write_picture(page.images / f"{name}.svg", lambda: draw_scores(sheet, metric))
    caption = "Dots are means, bars 95 % intervals; dotted: untuned, dashed with its interval: "
    return [
        f"## {_heading(page, number)}",
        _about(sheet),
        scores_table(sheet, metric),
        f"![{sheet.task}: scores of all methods]({page.to_images}/{name}.svg)",
        f"{caption}centralised.",
        *_gain(sheet),
        *_guarantees(sheet),
        *_cuts(page, number, metric),
    ]


def _cuts(page: _Page, number: int, metric: str) -> list[str]:
    sheet, name = page.sheets[number], _file_name(page, number)
    if not cut_arms(sheet):
        return []
    audits = recoveries(sheet, page.sheets)
    write_picture(page.images / f"{name}-cuts.svg", lambda: draw_cuts(sheet, metric, audits))
    return [
        f"### Blocks at the client, {_heading(page, number)}",
        "p blocks in the head, q in the tail. Memory is the largest of the owner's process. "
        "Recovered are tokens that the best attack\nof a short audit read from what the server "
        "sees, without noise.",
        cut_table(sheet, page.sheets, metric),
        f"![{sheet.task}: by blocks at the client]({page.to_images}/{name}-cuts.svg)",
    ]


def _gain(sheet: Sheet) -> list[str]:
    """What training added, also where no target asks for it."""
    found = gain_target(sheet, main_metric)
    return [f"Fine-tuned minus untuned: {found.numbers}."] if found.numbers else []


def _guarantees(sheet: Sheet) -> list[str]:
    """What the runs say of the noise in what leaves an owner; settings that say the same share."""
    names: dict[str, list[str]] = {}
    for arm in sheet.scored:
        for text in sorted({run.guarantee for run in arm.results if run.guarantee}):
            names.setdefault(" ".join(without_paths(text).split()), []).append(arm.name)
    lines = [f"* {text} ({'; '.join(arms)})" for text, arms in names.items()]
    wrapped = [textwrap.fill(line, _WIDTH, subsequent_indent="  ") for line in lines]
    return ["What is promised of what leaves an owner:", "\n".join(wrapped)] if lines else []


def _failures(page: _Page) -> str:
    table = failures_table(page.results)
    return table or "No run failed. Targets that were missed are in the table of targets, in bold."


def _heading(page: _Page, number: int) -> str:
    sheet, before = page.sheets[number], _num_before(page, number)
    name = sheet.task if before == 0 else f"{sheet.task}, other runs {before}"
    return f"{name}: {DEMO_SCALE}" if sheet.source == "packaged" else name


def _about(sheet: Sheet) -> str:
    sizes, published = sheet.sizes, published_task(sheet.task)
    words = "" if sizes.max_words is None else f", none longer than {sizes.max_words} words"
    return (
        f"The task: {published.about.rstrip('.')}. Model `{without_paths(sheet.model)}`, rows "
        f"`{without_paths(sheet.source)}`:\n{sizes.train_rows:,} to train, {sizes.test_rows:,} "
        f"scored{words}; {sizes.steps:,} steps of {sizes.rows_per_step} rows, "
        f"learning rate {sizes.lr:g}; prompts in {sheet.form} form."
    )


def _file_name(page: _Page, number: int) -> str:
    """Of a picture; a second sheet of the same task has a number."""
    before = _num_before(page, number)
    return f"evaluation-{page.sheets[number].task}" + (f"-{before + 1}" if before else "")


def _num_before(page: _Page, number: int) -> int:
    """Earlier sheets of the same task, with other sizes, rows, model or form."""
    task = page.sheets[number].task
    return sum(sheet.task == task and bool(sheet.scored) for sheet in page.sheets[:number])
