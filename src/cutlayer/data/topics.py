"""The demo's task: name the topic of a news article from its first words.

It makes records, as an owner's file would have them, and the settings that read them; tokens and
labels come about on the ordinary path. Held-out rows are the same for every seed.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cutlayer.data.row_files import write_row_files
from cutlayer.data.settings import DataSettings
from cutlayer.data.tasks import ChoiceTask
from cutlayer.data.template import Example, Tokenizer
from cutlayer.errors import DataError
from cutlayer.storage.files import explain_os_errors

__all__ = [
    "TOPICS",
    "TopicData",
    "TopicRecord",
    "openings",
    "topic_settings",
    "topic_tasks",
    "topics",
    "write_topics",
]

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
"""The answers, in the order of the choices."""

_PROMPT = "News: {text}\nTopic (business, entertainment, politics, sports or tech):"
_COMPLETION = " {topic}"


@dataclass(frozen=True)
class TopicRecord:
    """One line of the demo's data files."""

    text: str = field(repr=False)
    """The article's first words."""
    topic: str
    """One of `TOPICS`."""


@dataclass(frozen=True, kw_only=True)
class TopicData:
    """Records to train on and records that training never sees."""

    train: list[TopicRecord] = field(repr=False)
    """By seed, balanced over the topics, shuffled."""
    heldout: list[TopicRecord] = field(repr=False)
    """Fixed, balanced over the topics."""


@dataclass(frozen=True)
class _Article:
    record: TopicRecord
    body_key: str
    """Text without headline, case and spacing: equal for a story that ran under two headlines."""
    rank: str
    """Hash of the opening: a fixed order that no seed and no file name touches."""


def topics(
    folder: Path, seed: int, num_train: int = 360, num_heldout: int = 300, num_words: int = 30
) -> TopicData:
    """Choose the rows of the demo.

    Args:
        folder: the asset `bbcnews`: a folder of articles per topic.
        seed: of the training rows; the held-out rows do not depend on it.
        num_train: training rows, shared out over the topics as evenly as it goes.
        num_heldout: held-out rows, a multiple of the number of topics.
        num_words: words of each article's beginning.

    Raises:
        DataError: a topic's folder is missing or has too few articles.
    """
    if num_heldout % len(TOPICS):
        raise DataError(f"num_heldout={num_heldout} is no multiple of {len(TOPICS)} topics")
    articles = _articles(folder, num_words)
    train: list[_Article] = []
    heldout: list[TopicRecord] = []
    for place, topic in enumerate(TOPICS):
        candidates = [article for article in articles if article.record.topic == topic]
        num_kept = num_heldout // len(TOPICS)
        # The first topics take what does not divide evenly.
        num_wanted = num_train // len(TOPICS) + (place < num_train % len(TOPICS))
        if len(candidates) < num_kept + num_wanted:
            raise DataError(
                f"{folder / topic} has {len(candidates)} different articles, "
                f"{num_kept} held-out and {num_wanted} training rows were asked for"
            )
        heldout += [article.record for article in candidates[:num_kept]]
        train += _by_seed(candidates[num_kept:], seed)[:num_wanted]
    return TopicData(
        train=[article.record for article in _by_seed(train, seed)],
        heldout=heldout,
    )


def openings(folder: Path, num_words: int = 30) -> list[TopicRecord]:
    """Beginnings of all different articles, in an order that no seed and no file name touches.

    Args:
        folder: the asset `bbcnews`.
        num_words: of each beginning.

    Raises:
        DataError: a topic's folder is missing or empty.
    """
    return [article.record for article in _articles(folder, num_words)]


def write_topics(data: TopicData, folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl` as an owner would have them; returns both paths."""
    return write_row_files(folder, map(asdict, data.train), map(asdict, data.heldout))


def topic_settings(train: Path, heldout: Path) -> DataSettings:
    """The data settings of the demo: plain prompt, loss on the answer alone."""
    return DataSettings(
        train=train,
        validation=heldout,
        prompt_template=_PROMPT,
        completion_template=_COMPLETION,
        chat_template=False,
        append_eos=False,
    )


def topic_tasks(examples: Sequence[Example], tokenizer: Tokenizer) -> list[ChoiceTask]:
    """Held-out rows as questions whose answers are told apart by their first token.

    Args:
        examples: rows made with `topic_settings`.
        tokenizer: the one that made them.

    Raises:
        DataError: a row does not end with one of the answers.
    """
    choices = tuple(
        tuple(tokenizer.encode(_COMPLETION.format(topic=topic), add_special_tokens=False))
        for topic in TOPICS
    )
    return [_task(example, choices) for example in examples]


def _task(example: Example, choices: tuple[tuple[int, ...], ...]) -> ChoiceTask:
    answer = tuple(label for label in example.labels if label >= 0)
    if answer not in choices:
        raise DataError(f"row {example.row_id} does not end with one of the five topics")
    prompt = tuple(example.tokens[: len(example.tokens) - len(answer)])
    return ChoiceTask(prompt, choices, choices.index(answer))


def _articles(folder: Path, num_words: int) -> list[_Article]:
    return _unique(article for topic in TOPICS for article in _read(folder, topic, num_words))


def _read(folder: Path, topic: str, num_words: int) -> list[_Article]:
    with explain_os_errors(f"read {folder / topic}"):
        paths = sorted((folder / topic).glob("*.txt"))
        if not paths:
            raise DataError(f"{folder / topic} has no article; fetch the asset bbcnews again")
        return [_article(_decode(path.read_bytes()), topic, num_words) for path in paths]


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        # One article of the corpus has a pound sign in Latin-1.
        return raw.decode("latin-1")


def _article(text: str, topic: str, num_words: int) -> _Article:
    opening = " ".join(text.split()[:num_words])
    _, _, body = text.strip().partition("\n")
    return _Article(
        record=TopicRecord(opening, topic),
        body_key=" ".join(body.casefold().split()),
        rank=hashlib.sha256(opening.casefold().encode()).hexdigest(),
    )


def _by_seed(articles: Sequence[_Article], seed: int) -> list[_Article]:
    """The articles in an order that is the seed's own, on every version of Python."""

    def rank(article: _Article) -> str:
        return hashlib.sha256(f"{seed}|{article.rank}".encode()).hexdigest()

    return sorted(articles, key=rank)


def _unique(articles: Iterable[_Article]) -> list[_Article]:
    """One article per opening and per body, whatever its topic, in a fixed order."""
    seen: set[str] = set()
    kept: list[_Article] = []
    for article in sorted(articles, key=lambda article: article.rank):
        keys = {article.rank, article.body_key} - {""}
        if not keys & seen:
            kept.append(article)
        seen |= keys
    return kept
