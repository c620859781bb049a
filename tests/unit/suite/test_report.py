"""The page: deterministic, honest headings, links and pictures, bad stores."""

import re
from pathlib import Path

import msgspec
import pytest

from cutlayer.errors import ConfigError, DataError, StorageError
from cutlayer.suite.arms import sheets
from cutlayer.suite.plots import draw_scores, write_picture
from cutlayer.suite.report import main_metric, profile_of, write_report
from cutlayer.suite.report_texts import AGAIN
from cutlayer.suite.result import RunResult
from cutlayer.suite.spec import Method
from cutlayer.suite.store import Store
from cutlayer.suite.tables import (
    cut_table,
    failures_table,
    markdown_table,
    origin_table,
    scores_table,
    without_paths,
)
from tests.unit.suite.made_up import SIZES, choices, result, small_suite, spec

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[3]
_PATH = "/".join(("", "home", "someone", "rows.jsonl"))


def _store(folder: Path, runs: list[RunResult]) -> Path:
    store = Store(folder)
    for run in runs:
        store.put(run)
    return folder


def _page(folder: Path, runs: list[RunResult]) -> str:
    """Writes page and pictures into `folder`."""
    target = folder / "evaluation.md"
    write_report(_store(folder / "store", runs), target, folder / "images")
    return target.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of a small suite, its pictures and its store."""
    folder = tmp_path_factory.mktemp("small")
    _page(folder, small_suite())
    return folder


def _read(folder: Path) -> str:
    return (folder / "evaluation.md").read_text(encoding="utf-8")


def test_the_same_results_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    _page(tmp_path, small_suite()[::-1])
    written = [
        {p.name: p.read_bytes() for p in folder.rglob("*") if p.suffix in (".md", ".svg")}
        for folder in (small, tmp_path)
    ]
    assert written[0] == written[1]
    assert set(written[0]) == {
        "evaluation.md",
        "evaluation-topics.svg",
        "evaluation-topics-cuts.svg",
    }


def test_every_heading_of_packaged_rows_says_demo_scale(small: Path) -> None:
    headings = re.findall(r"^#+ .*topics.*$", _read(small), re.MULTILINE)
    assert len(headings) == 2
    assert all("demo-scale, not comparable with published tables" in line for line in headings)


def test_original_rows_have_no_such_heading(tmp_path: Path) -> None:
    runs = [choices(spec(Method.CENTRALISED, source="hub"), 0.9)]
    assert "\n## topics\n" in _page(tmp_path, runs)


def test_other_sizes_are_other_tables_that_are_not_compared(tmp_path: Path) -> None:
    short = msgspec.structs.replace(SIZES, steps=3)
    runs = [
        choices(spec(Method.CENTRALISED), 0.9),
        choices(spec(Method.SPLIT, sizes=short), 0.1, questions_digest="others"),
    ]
    page = _page(tmp_path, runs)
    assert page.count("\n## topics") == 2
    assert (tmp_path / "images" / "evaluation-topics-2.svg").exists()


def test_every_picture_is_linked_and_every_link_is_a_file(small: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", _read(small))
    assert links
    assert all((small / link).exists() for link in links)
    assert {Path(link).name for link in links} == {
        path.name for path in (small / "images").iterdir()
    }


def test_lines_of_text_are_short(small: Path) -> None:
    lines = [line for line in _read(small).splitlines() if line[:1] != "|"]
    assert max(map(len, lines)) <= 160


def test_every_run_has_its_command_and_commit(small: Path) -> None:
    page = _read(small)
    for run in small_suite():
        assert f"| `{run.spec.run_id}` | `{run.origin.command}` | 0123abc |" in page


def test_failed_runs_are_listed_without_paths_or_further_lines(tmp_path: Path) -> None:
    failed = result(spec(Method.SPLIT, 5), error=f"cannot read {_PATH}\nmore", questions_digest="")
    page = _page(tmp_path, [choices(spec(Method.SPLIT), 0.9), failed])
    assert f"| `{failed.spec.run_id}` | cannot read .../rows.jsonl |" in page
    assert "2 runs, 1 of them failed" in page
    assert "/home" not in page


def test_a_store_of_failures_alone_still_has_a_page(tmp_path: Path) -> None:
    page = _page(tmp_path, [result(spec(Method.SPLIT), error="out of memory")])
    assert "out of memory" in page
    assert "0 met, 0 missed" in page


def test_an_empty_or_damaged_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no results"):
        write_report(tmp_path / "none", tmp_path / "page.md", tmp_path / "images")
    folder = _store(tmp_path / "store", small_suite()[:2])
    damaged = next(folder.glob("*.json"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(StorageError, match=re.escape(damaged.name)):
        write_report(folder, tmp_path / "page.md", tmp_path / "images")
    assert not (tmp_path / "page.md").exists()


def test_runs_on_other_questions_stop_the_page(tmp_path: Path) -> None:
    runs = [*small_suite(), choices(spec(Method.SPLIT, codec="int8"), 0.9, questions_digest="x")]
    with pytest.raises(DataError, match=r"int8.*different questions"):
        _page(tmp_path, runs)


def test_the_profile_is_the_one_in_the_commands() -> None:
    runs = small_suite()
    assert profile_of(runs) == "small"
    origin = msgspec.structs.replace(runs[0].origin, command="cutlayer eval suite --profile full")
    full = [msgspec.structs.replace(run, origin=origin) for run in runs]
    assert profile_of(full) == "full"
    assert profile_of([*runs, *full]) == "small"
    assert profile_of([]) == "small"


def test_what_training_added_is_said_for_every_task(small: Path) -> None:
    assert re.search(r"^Fine-tuned minus untuned: centralised: \+\d", _read(small), re.MULTILINE)


def test_what_is_promised_is_said_once_and_in_short_lines(tmp_path: Path) -> None:
    noised = spec(Method.SPLIT, mechanism="gaussian", scale=0.1)
    long = "nothing at all " * 20
    runs = [choices(run, 0.9, guarantee=long) for run in (noised, spec(Method.SPLIT))]
    text = _page(tmp_path, runs).partition("promised of what leaves")[2].partition("\n## ")[0]
    assert " ".join(text.split()).count("nothing at all") == 20
    assert "(split; split, gaussian 0.1)" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 160


def test_runs_are_compared_by_the_tasks_own_metric() -> None:
    assert main_metric("topics") == "accuracy"
    assert "cutlayer eval suite" in AGAIN


def test_a_row_has_score_difference_cost_and_number_of_seeds() -> None:
    [sheet] = sheets(small_suite())
    rows = {line.split(" | ")[0]: line for line in scores_table(sheet, "accuracy").splitlines()}
    assert re.match(
        r"\| split, fp8 \| \d\d\.\d \[\d\d\.\d, \d\d\.\d\] \| 3 \| [+-]\d\.\d \[.*\] \| .*, .*, .* "
        r"\| 40 \| 20 \| 12 \| 12 \| 54,321 \|",
        rows["| split, fp8"],
    )
    assert "| 3 | - | - | 40 |" in rows["| centralised"]


def test_cuts_are_shown_with_memory_and_recovery_of_their_audits() -> None:
    all_sheets = sheets(small_suite())
    table = cut_table(all_sheets[0], all_sheets, "accuracy")
    assert [line[:9] for line in table.splitlines()[2:]] == [
        f"| {p} | {q} |" for p, q in ((1, 1), (1, 5), (2, 2), (3, 3))
    ]
    assert table.splitlines()[-1].endswith("| 420 | 9 | - | 33.3 % |")
    one_cut = sheets([choices(spec(Method.SPLIT), 0.9)])
    assert cut_table(one_cut[0], one_cut, "accuracy") == ""


def test_cells_cannot_break_a_table() -> None:
    assert markdown_table(["a"], [["x|y\nz"]]) == "| a |\n|---|\n| x\\|y z |\n"
    assert failures_table(small_suite()) == ""
    assert "* Machine 1: 2 cores" in origin_table(small_suite())


def test_paths_of_a_machine_are_cut_and_links_and_ratios_are_not() -> None:
    assert without_paths(f"see {_PATH}, 3/4 and a/b") == "see .../rows.jsonl, 3/4 and a/b"


def test_a_picture_stands_on_white_and_has_text_and_no_date(tmp_path: Path) -> None:
    [sheet] = sheets(small_suite())
    path = tmp_path / "picture.svg"
    write_picture(path, lambda: draw_scores(sheet, "accuracy"))
    text = path.read_text(encoding="utf-8")
    assert "fill: #ffffff" in text
    assert "split, fp8 (3 seeds)" in text
    assert "dc:date" not in text
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        write_picture(tmp_path / "picture.gif", lambda: draw_scores(sheet, "accuracy"))


@pytest.mark.parametrize(
    ("commits", "warning"),
    [
        (("aaa", "aaa"), None),
        (("aaa", "bbb"), "runs are of 2 commits"),
        (("aaa-dirty", "aaa-dirty"), "sources that no commit has"),
        (("unknown", "unknown"), "sources that no commit has"),
    ],
)
def test_a_page_of_several_or_unknown_sources_says_so(
    commits: tuple[str, str], warning: str | None, tmp_path: Path
) -> None:
    runs = [
        msgspec.structs.replace(run, origin=msgspec.structs.replace(run.origin, commit=commit))
        for run, commit in zip(
            [choices(spec(method), 0.9) for method in (Method.CENTRALISED, Method.SPLIT)],
            commits,
            strict=True,
        )
    ]
    # A failed run has no number that could mislead.
    failed = msgspec.structs.replace(result(spec(Method.SPLIT, codec="fp8")), error="no")
    page = _page(tmp_path, [*runs, failed])
    assert ("**Beware:**" in page) is (warning is not None)
    assert warning is None or warning in page


def test_the_page_of_the_docs_is_that_of_the_kept_results(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    for page in docs.glob("*.md"):
        (tmp_path / page.name).touch()
    store = ROOT / "benchmarks" / "results" / "evaluation" / "two-cores"
    write_report(store, tmp_path / "evaluation.md", tmp_path / "images")
    made = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert made == (docs / "evaluation.md").read_text(encoding="utf-8")
