"""The comparison with official scripts: it would see a difference, and smoke fetches nothing."""

import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.official_examples import (
    CB,
    MULTIRC,
    RECORD,
    RECORDED,
    examples,
)
from benchmarks.official_rows import cb_rows, multirc_rows, record_rows, spoilt, summary_rows
from benchmarks.official_scores import Comparison, main
from benchmarks.official_scripts import SCRIPTS, ask, ask_coqa, rouge_items, take_out
from cutlayer.errors import StorageError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import Prediction, Scored, Split


def test_the_smoke_profile_finds_the_recorded_numbers(capsys: pytest.CaptureFixture[str]):
    result = main(["--profile", "smoke", "--json"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == result
    differences = {name: value for name, value in result.items() if name != "profile"}
    assert set(differences) == {f"{task}, recorded" for task in SCRIPTS}
    assert differences.pop("rouge, recorded") == pytest.approx(0, abs=1e-5)
    assert set(differences.values()) == {0.0}


def test_every_script_has_small_rows_and_recorded_numbers():
    assert set(SCRIPTS) == set(RECORDED) == set(examples())


@pytest.mark.parametrize("part", ["metrics", "items"])
def test_a_different_number_is_seen(part: str):
    ours = Scored(metrics={"f1": 0.5, "em": 0.0}, items={"f1": (0.25, 0.75)})
    wrong = {"metrics": Scored(metrics={"f1": 0.75}, items={})}
    wrong["items"] = Scored(metrics={"f1": 0.5}, items={"f1": (0.5, 0.5)})
    one = Comparison(task="record", rows="x", num_rows=2, ours=ours, official=wrong[part])
    assert one.difference == 0.25


def test_spoilt_answers_are_of_six_kinds_and_the_same_each_time():
    kinds = [spoilt(number, "the red kite", "no") for number in range(6)]
    assert kinds[:4] == ["the red kite", "the kite", "no", ""]
    assert len(set(kinds)) == 6
    assert spoilt(7, "the red kite", "no") == kinds[1]


def test_made_up_rows_are_the_same_for_a_seed():
    for make in (cb_rows, multirc_rows, record_rows):
        assert make(20, 3) == make(20, 3) != make(20, 4)
    assert summary_rows(5, 3, True) == summary_rows(5, 3, True) != summary_rows(5, 3, False)


class TestAskingAScript:
    """Scripts of our own in place of the official ones, which the standard profile fetches."""

    def test_its_functions_are_called_in_another_process(self, tmp_path: Path):
        script = tmp_path / "aggregate.py"
        script.write_text("def cb_multi_fi(items):\n    return sum(a == b for a, b in items) / 4\n")
        rows = [{"said": 1, "wanted": 1}, {"said": 0, "wanted": 1}]
        assert ask("cb", script, rows) == {"f1": 0.25}

    def test_options_reach_it_with_their_question(self, tmp_path: Path):
        script = tmp_path / "multirc.py"
        script.write_text(
            "def f1(said, wanted):\n    return said[0] == wanted[0].split('_')[1]\n"
            "def em(said, wanted):\n    return wanted[0].split('_')[0]\n"
            "def agg_f1(items):\n    return sum(items)\n"
            "def agg_em(items):\n    return len(set(items))\n"
        )
        rows = [
            {"group": "a", "wanted": True, "said": True},
            {"group": "a", "wanted": False, "said": True},
            {"group": "b", "wanted": False, "said": False},
        ]
        assert ask("multirc", script, rows) == {"f1a": 2.0, "em": 2.0}

    def test_the_best_of_several_answers_counts(self, tmp_path: Path):
        script = tmp_path / "record.py"
        script.write_text(
            "def string_f1_score(text, answer):\n    return len(set(text) & set(answer)) / 4\n"
            "def exact_match_score(text, answer):\n    return text == answer\n"
        )
        found = ask("record", script, [{"text": "abc", "answers": ["ax", "abc"]}])
        assert found == {"f1": [0.75], "em": [1.0]}

    def test_coqa_is_asked_as_a_module_and_as_a_command(self, tmp_path: Path):
        script = tmp_path / "coqa.py"
        script.write_text(_COQA)
        gold = tmp_path / "gold.json"
        gold.write_text(json.dumps({"s/1": ["yes", "Yes"], "s/2": ["no"]}))
        found = ask_coqa(script, gold, {("s", 1): "yes", ("s", 2): "maybe"})
        assert found.items == {"f1": [1.0, 0.0], "em": [1, 0]}
        assert found.printed == {"f1": 12.5, "em": 2.0}
        assert found.answers == [["yes", "Yes"], ["no"]]

    def test_a_script_that_fails_is_named(self, tmp_path: Path):
        script = tmp_path / "aggregate.py"
        script.write_text("raise SystemExit('no numbers today')\n")
        with pytest.raises(StorageError, match="no numbers today"):
            ask("cb", script, [])

    @pytest.mark.skipif(shutil.which("perl") is None, reason="ROUGE-1.5.5 is a Perl script")
    def test_rouge_is_given_files_of_lines_and_its_numbers_are_read(self, tmp_path: Path):
        script = tmp_path / "ROUGE.pl"
        script.write_text(_ROUGE)
        words = tmp_path / "data" / "WordNet-2.0-Exceptions"
        words.mkdir(parents=True)
        (words / "buildExeptionDB.pl").write_text("exit 0;\n")
        found = rouge_items(script, [("a b\nc", "d"), ("e", "f\ng")], has_irregular_words=False)
        assert found["rouge_1"] == (0.11, 0.12)
        # Lines of the reply: 1 and 2 as given, 1 and 1 joined.
        assert found["rouge_lsum"] == (0.31, 0.32)
        assert found["rouge_l"] == (0.31, 0.31)


def test_a_script_that_is_another_than_pinned_is_refused(tmp_path: Path):
    archive = tmp_path / "other.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("lm_eval/tasks/super_glue/cb/aggregate.py", "pass\n")
    with pytest.raises(StorageError, match=r"other\.whl"):
        take_out(SCRIPTS["cb"], tmp_path / "first", archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    known = replace(SCRIPTS["cb"], release=replace(SCRIPTS["cb"].release, sha256=digest))
    with pytest.raises(StorageError, match=r"aggregate\.py has SHA-256 .* pinned is"):
        take_out(known, tmp_path / "second", archive)


class TestOriginalFiles:
    """Loaders and scores together: files in the authors' layout give the scripts' numbers."""

    def test_multirc(self, tmp_path: Path):
        groups = dict.fromkeys(group for group, _, _ in MULTIRC)
        lines = [
            {
                "idx": number,
                "passage": {
                    "text": "A made-up paragraph.",
                    "questions": [
                        {
                            "idx": 0,
                            "question": "Which?",
                            "answers": [
                                {"idx": place, "text": "An option.", "label": int(wanted == "yes")}
                                for place, (_, wanted, _) in enumerate(_of(group))
                            ],
                        }
                    ],
                },
            }
            for number, group in enumerate(groups)
        ]
        said = [row[2] for group in groups for row in _of(group)]
        assert _scored("multirc", tmp_path, lines, said) == pytest.approx(
            RECORDED["multirc"].metrics
        )

    def test_record(self, tmp_path: Path):
        lines = [_record_line(number, answers) for number, (answers, _) in enumerate(RECORD)]
        said = [reply for _, reply in RECORD]
        assert _scored("record", tmp_path, lines, said) == pytest.approx(RECORDED["record"].metrics)

    def test_cb(self, tmp_path: Path):
        lines = [
            {"idx": number, "premise": "It rains.", "hypothesis": "It is wet.", "label": wanted}
            for number, (wanted, _) in enumerate(CB)
        ]
        found = _scored("cb", tmp_path, lines, [said for _, said in CB])
        assert found == pytest.approx(RECORDED["cb"].metrics)


def _of(group: str) -> list[tuple[str, str, str]]:
    return [row for row in MULTIRC if row[0] == group]


def _record_line(number: int, answers: tuple[str, ...]) -> dict[str, object]:
    text = " and ".join(answers)
    spans, start = [], 0
    for answer in answers:
        spans.append({"start": start, "end": start + len(answer) - 1, "text": answer})
        start += len(answer) + len(" and ")
    query = {"idx": number, "query": "Where is @placeholder ?", "answers": spans}
    entities = [{"start": span["start"], "end": span["end"]} for span in spans]
    return {"idx": number, "passage": {"text": text, "entities": entities}, "qas": [query]}


def _scored(
    name: str, folder: Path, lines: list[dict[str, object]], said: list[str]
) -> dict[str, float]:
    """Scores of a validation file, without the metrics that its script does not give."""
    path = folder / "val.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    questions = published_task(name).read_original(folder, Split.VALIDATION)
    found = published_task(name).score(questions, [Prediction(text=text) for text in said])
    return {metric: found.metrics[metric] for metric in RECORDED[name].metrics}


_COQA = """
import json, sys

class CoQAEvaluator:
    def __init__(self, gold):
        self.gold_data = json.load(open(gold))

    @staticmethod
    def preds_to_dict(path):
        return {f"{row['id']}/{row['turn_id']}": row["answer"] for row in json.load(open(path))}

    def get_raw_scores(self, replies):
        exact = {key: int(replies[key] in gold) for key, gold in self.gold_data.items()}
        return exact, {key: float(value) for key, value in exact.items()}

if __name__ == "__main__":
    replies = CoQAEvaluator.preds_to_dict(sys.argv[4])
    print(json.dumps({"overall": {"f1": 12.5, "em": len(replies), "turns": 9}}))
"""
_ROUGE = r"""
use FindBin; use lib $FindBin::Bin; use XML::DOM; my $reader = new XML::DOM::Parser;
my $number = 0;
open(my $pairs, $ARGV[-1]) or die;
while (my $pair = <$pairs>) {
    my ($reply) = split(/ /, $pair);
    open(my $text, $reply) or die; my @lines = <$text>; my $count = @lines; $number++;
    print "X ROUGE-1 Eval $number.X R:0.5 P:0.5 F:0.1$number\n";
    print "X ROUGE-2 Eval $number.X R:0.5 P:0.5 F:0.2$number\n";
    print "X ROUGE-L Eval $number.X R:0.5 P:0.5 F:0.3$count\n";
}
"""
