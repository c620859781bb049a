"""The unsplit script owes nothing to cutlayer, and makes the same tokens by itself."""

import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cutlayer.data.settings import DataSettings, OnTooLong
from cutlayer.data.sources import Record
from cutlayer.data.template import RowLimits
from cutlayer.data.template import RowMaker as LearntRowMaker
from cutlayer.evaluation.rows import ChoiceRow, GenerateRow
from cutlayer.evaluation.rows import RowMaker as ItemRowMaker
from cutlayer.evaluation.tasks import read_items
from cutlayer.suite import centralised
from cutlayer.suite.centralised.choices import score_choices
from cutlayer.suite.centralised.replies import write_replies
from cutlayer.suite.centralised.request import Request, read_request
from cutlayer.suite.centralised.tokens import Asked, Learnt, items_of, rows_of
from tests.tiny_models import save_tokenizer, tiny_llama_folder

ALLOWED = {"peft", "safetensors", "torch", "transformers"}
LONG = "ab\u00e9\U0001f600 cd" * 4


def test_it_imports_the_standard_library_torch_transformers_and_peft_alone() -> None:
    files = sorted(Path(centralised.__path__[0]).glob("**/*.py"))
    assert len(files) > 3
    for file in files:
        imported = _imported(ast.parse(file.read_text()))
        assert imported <= sys.stdlib_module_names | ALLOWED, file


@pytest.mark.parametrize("max_length", [24, 128])
@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("has_start", [True, False])
def test_rows_have_the_tokens_that_a_client_learns(
    tmp_path: Path, max_length: int, append_eos: bool, has_start: bool
) -> None:
    rows = [
        {"prompt": f"{LONG}{number}:", "completion": " yes" * (1 + number), "label": "x"}
        for number in range(3)
    ]
    request = _request(tmp_path, rows=rows, max_length=max_length, append_eos=append_eos)
    tokenizer = _tokenizer(tmp_path, has_start=has_start)
    settings = DataSettings(
        train=Path(request.train),
        prompt="prompt",
        completion="completion",
        chat_template=False,
        append_eos=append_eos,
        max_length=max_length,
        on_too_long=OnTooLong.TRUNCATE_PROMPT,
    )
    assert rows_of(tokenizer, request) == _of_client(settings, tokenizer, rows)


def test_a_token_that_would_cross_from_prompt_to_answer_is_not_made(tmp_path: Path) -> None:
    """One tokenizer merges the colon with what follows it; generation never sees that token."""
    rows = [{"prompt": "a:", "completion": "yes"}]
    items: list[dict[str, object]] = [
        {"kind": "choice", "context": "a:", "choices": ["yes", "no"], "answer": 0}
    ]
    request = _request(tmp_path, rows=rows, items=items)
    tokenizer = _tokenizer(tmp_path, merges=[(":", "y")])
    assert len(tokenizer.encode("a:yes", add_special_tokens=False)) == 4
    settings = DataSettings(
        train=Path(request.train),
        prompt="prompt",
        completion="completion",
        chat_template=False,
        append_eos=False,
    )
    learnt = rows_of(tokenizer, request)
    assert learnt == _of_client(settings, tokenizer, rows)
    assert len(learnt[0].tokens) == 5
    maker = ItemRowMaker(tokenizer, request.context_length)
    asked = items_of(tokenizer, request)
    assert asked == [_asked(maker.make(item)) for item in read_items(Path(request.test))]
    assert [len(choice) for choice in asked[0].choices] == [3, 2]


@pytest.mark.parametrize("max_length", [40, 128])
def test_conversations_have_the_tokens_that_a_client_learns(
    tmp_path: Path, max_length: int
) -> None:
    turns = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "and now"},
        {"role": "assistant", "content": "yes"},
    ]
    rows = [{"messages": turns[2:]}, {"messages": turns}]
    request = _request(tmp_path, rows=rows, max_length=max_length)
    tokenizer = _tokenizer(tmp_path)
    settings = DataSettings(
        train=Path(request.train),
        messages="messages",
        max_length=max_length,
        on_too_long=OnTooLong.TRUNCATE_PROMPT,
    )
    assert rows_of(tokenizer, request) == _of_client(settings, tokenizer, rows)


@pytest.mark.parametrize("has_start", [True, False])
def test_items_have_the_tokens_that_evaluation_feeds(tmp_path: Path, has_start: bool) -> None:
    turns = [{"role": "user", "content": LONG}]
    items: list[dict[str, object]] = [
        {"kind": "choice", "context": LONG, "choices": [" yes", "no"], "answer": 0},
        {"kind": "choice", "messages": turns, "choices": ["y", "n"], "answer": 1},
        {"kind": "generate", "prompt": "ab", "answers": ["c"], "max_new_tokens": 3, "stop": ["!"]},
        {"kind": "generate", "messages": turns, "answers": ["c"]},
    ]
    request = _request(tmp_path, items=items)
    tokenizer = _tokenizer(tmp_path, has_start=has_start)
    maker = ItemRowMaker(tokenizer, request.context_length)
    theirs = [_asked(maker.make(item)) for item in read_items(Path(request.test))]
    assert items_of(tokenizer, request) == theirs


def test_choices_score_alike_one_by_one_and_many_at_once(tmp_path: Path) -> None:
    """Single tokens go through padded batches, longer choices through a cache of their context."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder(tmp_path))
    contexts = [list(range(1, 4 + 5 * number)) for number in range(20)]
    short = [_item(context, [[7], [9], [200]]) for context in contexts]
    long = [_item(context, [[7], [9], [200, 3, 1], [200, 4]]) for context in contexts]
    with torch.inference_mode():
        ours, theirs = score_choices(base, base, short), score_choices(base, base, long)
        for number, context in enumerate(contexts):
            log_probs = base(torch.tensor([context])).logits[0, -1].log_softmax(-1)
            expected = log_probs[[7, 9, 200]].tolist()
            assert ours[number] == pytest.approx(expected, abs=1e-5)
            whole = torch.tensor([[*context, 200, 3, 1]])
            tail = base(whole).logits[0].log_softmax(-1)[-4:-1]
            expected[2] = float(tail[0, 200] + tail[1, 3] + tail[2, 1])
            assert theirs[number][:3] == pytest.approx(expected, abs=1e-5)


def test_a_reply_is_the_same_alone_and_in_a_batch_and_ends_before_its_stop(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder), _tokenizer(tmp_path)
    request = _request(tmp_path)
    asked = [_item(list(range(60, 66 + 3 * number)), [], num_new=12) for number in range(5)]
    with torch.inference_mode():
        alone = [write_replies(base, tokenizer, [item], request)[0] for item in asked]
        together = write_replies(base, tokenizer, asked, request)
        assert [together[number] for number in range(5)] == alone
        # Every row stops at a text of its own, long before the others are done.
        stops = [reply[2:4] for reply in alone]
        stopped = [
            Asked(context=item.context, choices=[], num_new=12, stop=[stop])
            for item, stop in zip(asked, stops, strict=True)
        ]
        cut = write_replies(base, tokenizer, stopped, request)
    wanted = [reply[: reply.index(stop)] for reply, stop in zip(alone, stops, strict=True)]
    assert [cut[number] for number in range(5)] == wanted
    assert all(stops)


def test_a_completion_that_does_not_fit_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "secret" * 9}]
    request = _request(tmp_path, rows=rows, max_length=20)
    with pytest.raises(SystemExit, match="2"):
        rows_of(_tokenizer(tmp_path), request)
    said = capsys.readouterr().err
    assert "train.jsonl:2: the completion alone does not fit in 20 tokens" in said
    assert "secret" not in said


def test_an_item_longer_than_the_context_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items: list[dict[str, object]] = [
        {"kind": "choice", "context": "a" * 127, "choices": ["yy", "n"], "answer": 0},
        {"kind": "choice", "context": "a" * 127, "choices": ["yyy", "n"], "answer": 0},
    ]
    request = _request(tmp_path, items=items)
    with pytest.raises(SystemExit, match="2"):
        items_of(_tokenizer(tmp_path), request)
    assert "test.jsonl:2: longer than the model's context of 128" in capsys.readouterr().err


def _imported(tree: ast.Module) -> set[str]:
    """Top-level names of all imports but those of the script's own files."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "reaches out of its own folder"
            names |= set() if node.level else {str(node.module).partition(".")[0]}
    return names


def _request(
    folder: Path,
    rows: list[dict[str, object]] | None = None,
    items: list[dict[str, object]] | None = None,
    **changes: object,
) -> Request:
    for name, lines in (("train", rows or []), ("test", items or [])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    table: dict[str, object] = {
        "model": "",
        "threads": 1,
        "device": "cpu",
        "train": str(folder / "train.jsonl"),
        "test": str(folder / "test.jsonl"),
        "context_length": 128,
        "max_length": 128,
        "append_eos": False,
        "order": [],
        "micro_batch_rows": 1,
        "lr": 0.1,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "adapter": None,
    }
    path = folder / "request.json"
    path.write_text(json.dumps({**table, **changes}))
    return read_request(path)


def _tokenizer(
    folder: Path, has_start: bool = False, merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerBase:
    save_tokenizer(folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    table = json.loads(path.read_text())
    for first, second in merges:
        table["model"]["vocab"][first + second] = 300 + len(table["model"]["merges"])
        table["model"]["merges"].append([first, second])
    path.write_text(json.dumps(table))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    if has_start:
        start = "<|user|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
        )
        assert len(tokenizer.encode("a", add_special_tokens=True)) == 2
    return tokenizer


def _of_client(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, object]]
) -> list[Learnt]:
    maker = LearntRowMaker(settings, tokenizer, RowLimits(context_length=128))
    made = [maker.make(Record(where="file:1", fields=row), 0) for row in rows]
    found = [row for row in made if row is not None]
    assert len(found) == len(rows)
    return [Learnt(tokens=row.tokens, labels=row.labels) for row in found]


def _asked(row: object) -> Asked:
    if isinstance(row, ChoiceRow):
        choices = [list(choice) for choice in row.choices]
        return _item(list(row.context), choices)
    assert isinstance(row, GenerateRow)
    item = row.item
    return Asked(
        context=list(row.prompt), choices=[], num_new=item.max_new_tokens, stop=list(item.stop)
    )


def _item(context: list[int], choices: list[list[int]], num_new: int = 64) -> Asked:
    return Asked(context=context, choices=choices, num_new=num_new, stop=[])
