"""Real questions that a package registry has, split by us, and a choice of questions for a run.

Everything here is demo-scale: the splits are ours, so no number compares with a published table.
It writes no file (`task_files`). docs/published-tasks.md says what is in each split.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cutlayer.data.assets import asset_path, fetch, is_cached
from cutlayer.errors import ConfigError, DataError, StorageError
from cutlayer.evaluation.published import evaluation_asset
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.near_copies import split_by_text
from cutlayer.evaluation.published.question import Question, Split
from cutlayer.registry import Registry

__all__ = ["PACKAGED", "PackagedTask", "QuestionsBySplit", "choose", "packaged_questions"]

QuestionsBySplit = Mapping[Split, Sequence[Question]]
"""What a source has of each split."""


class PackagedTask(Protocol):
    """A task whose questions an asset holds; an instance is registered in `PACKAGED`."""

    def questions(self, cache: Path | None) -> dict[Split, list[Question]]:
        """Its questions to learn and to score, always the same."""
        ...


PACKAGED: Registry[PackagedTask] = Registry("packaged task")
"""By name of the published task."""


def packaged_questions(name: str, cache: Path | None = None) -> dict[Split, list[Question]]:
    """Questions of a task from an asset, as train and test.

    Args:
        name: of the published task.
        cache: cache folder of assets; None means the usual one.

    Raises:
        ConfigError: no asset holds the task.
        StorageError: the asset `evaluation` is needed and not in the cache: it is large, so that
            only a command of yours fetches it.
        TransportError: a small asset cannot be fetched.
        DataError: an asset's file is not as expected.
    """
    if name not in PACKAGED:
        raise ConfigError(
            f"no packaged rows of {name!r}, only of {', '.join(PACKAGED)}; take rows from a hub or "
            "from the authors' files (--from hub, --from FOLDER; of the suite --data)"
        )
    return PACKAGED.get(name).questions(cache)


def choose(
    questions: QuestionsBySplit,
    num_train: int | None,
    num_test: int | None,
    seed: int,
    max_words: int | None = None,
) -> tuple[list[Question], list[Question]]:
    """Questions to learn and to score.

    The scored ones are the same for every seed, and fewer of them are the beginning of more. Both
    are balanced over the places of right choices as far as the questions allow. Options that the
    official score counts as one are scored together or not at all, so that there may be a few fewer
    than asked for.

    Args:
        questions: by split; a test split without answers gives way to the validation split.
        num_train: of the training questions; None takes all.
        num_test: of the scored questions; None takes all.
        seed: of the training questions.
        max_words: longer questions, all their texts together, are left out, of those to score with
            their whole group; None takes all.

    Raises:
        DataError: a split is missing or has too few questions.
    """
    test = _chosen_test(_short_groups(_scored(questions), max_words), num_test)
    if num_train == 0:
        return [], test
    if not questions.get(Split.TRAIN):
        raise DataError("no train split to learn from; ask for no training rows")
    train = _short(questions[Split.TRAIN], max_words)
    if not train:
        raise _too_few("train", 1, 0)
    ranked = _balanced(sorted(train, key=lambda question: _rank(f"{seed}|{question.key}")))
    return _first(ranked, num_train, "train", len(train)), test


@PACKAGED.register("coqa")
class _Coqa:
    def questions(self, cache: Path | None) -> dict[Split, list[Question]]:
        return split_by_text(evaluation_asset.coqa(_large_asset(cache)), "story")


@PACKAGED.register("xsum")
class _Xsum:
    def questions(self, cache: Path | None) -> dict[Split, list[Question]]:
        return split_by_text(evaluation_asset.xsum(_large_asset(cache)), "document")


@PACKAGED.register("cnn_dailymail")
class _CnnDailyMail:
    def questions(self, cache: Path | None) -> dict[Split, list[Question]]:
        return split_by_text(evaluation_asset.cnn_dailymail(_large_asset(cache)), "document")


@PACKAGED.register("multirc")
class _MultiRc:
    def questions(self, cache: Path | None) -> dict[Split, list[Question]]:
        return split_by_text(evaluation_asset.multirc(_large_asset(cache)), "paragraph")


@PACKAGED.register("sentiment")
class _Sentiment:
    def questions(self, cache: Path | None) -> dict[Split, list[Question]]:
        return _own_split("sentiment", fetch("sentiment", cache))


@PACKAGED.register("topics")
class _Topics:
    def questions(self, cache: Path | None) -> dict[Split, list[Question]]:
        return _own_split("topics", fetch("bbcnews", cache))


def _large_asset(cache: Path | None) -> Path:
    if not is_cached("evaluation", cache):
        raise StorageError(
            "these questions need the asset evaluation (358 MB to fetch): "
            "run cutlayer assets fetch evaluation"
        )
    return asset_path("evaluation", cache)


def _own_split(name: str, folder: Path) -> dict[Split, list[Question]]:
    """Of a task whose class splits the asset's files."""
    task = published_task(name)
    return {split: task.read_original(folder, split) for split in (Split.TRAIN, Split.TEST)}


def _scored(questions: QuestionsBySplit) -> Sequence[Question]:
    """The test split, or validation where tests have no answers or there is none."""
    for split in (Split.TEST, Split.VALIDATION):
        found = questions.get(split, ())
        if found and all(question.answers for question in found):
            return found
    raise DataError(
        "no test split with answers and no validation split; name a source that has one of them"
    )


def _short(questions: Iterable[Question], max_words: int | None) -> list[Question]:
    return [q for q in questions if max_words is None or _num_words(q) <= max_words]


def _short_groups(questions: Sequence[Question], max_words: int | None) -> list[Question]:
    """Without groups of which an option is too long: the rest would be scored as if it were all."""
    kept = {question.key for question in _short(questions, max_words)}
    short = [group for group in _groups(questions) if all(q.key in kept for q in group)]
    return [question for group in short for question in group]


def _num_words(question: Question) -> int:
    texts = (*question.fields.values(), *question.choices, *question.answers[:1])
    return sum(len(text.split()) for text in texts)


def _chosen_test(questions: Sequence[Question], num_wanted: int | None) -> list[Question]:
    groups = _groups(questions)
    if all(len(group) == 1 for group in groups):
        fixed = sorted(questions, key=lambda question: _rank(question.key))
        return _first(_balanced(fixed), num_wanted, "test", len(questions))
    groups.sort(key=lambda group: _rank(group[0].group))
    if num_wanted is not None and num_wanted > len(questions):
        raise _too_few("test", num_wanted, len(questions))
    chosen: list[Question] = []
    for group in groups:
        if num_wanted is not None and len(chosen) + len(group) > num_wanted:
            break
        chosen += group
    if not chosen:
        raise DataError(f"{num_wanted} test rows hold not one whole group; ask for more")
    return chosen


def _groups(questions: Iterable[Question]) -> list[list[Question]]:
    """Options that are scored as one; replies are scored one by one, whatever their group."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        key = f"g{question.group}" if question.choices and question.group else f"k{question.key}"
        groups.setdefault(key, []).append(question)
    return list(groups.values())


def _balanced(questions: Sequence[Question]) -> list[Question]:
    """In turn one with each place of the right choice, while there are such; else as they are."""
    if len({len(question.choices) for question in questions}) != 1 or not questions[0].choices:
        return list(questions)
    by_place: dict[int, list[Question]] = {}
    for question in questions:
        place = question.choices.index(question.answers[0])
        by_place.setdefault(place, []).append(question)
    return list(_in_turn([by_place[place] for place in sorted(by_place)]))


def _in_turn(rows: Sequence[Sequence[Question]]) -> Iterator[Question]:
    for turn in range(max(map(len, rows))):
        yield from (row[turn] for row in rows if turn < len(row))


def _first(
    questions: list[Question], num_wanted: int | None, split: str, num_there: int
) -> list[Question]:
    if num_wanted is not None and num_wanted > num_there:
        raise _too_few(split, num_wanted, num_there)
    return questions[:num_wanted]


def _too_few(split: str, num_wanted: int, num_there: int) -> DataError:
    return DataError(
        f"{num_wanted} {split} rows wanted, {num_there} are there (within max_words); ask for fewer"
    )


def _rank(text: str) -> str:
    """A fixed order, the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()
