"""Four natural owners of one task: is a movie review, product review, tweet or editorial positive?

It makes records, as the owners' files would have them, and the settings that read them; tokens and
labels come about on the ordinary path. Held-out rows are the same for every seed, and no owner
trains on a row that resembles one of any owner's held-out rows.
"""

import hashlib
import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cutlayer.data.resemblance import Resembling, words_of
from cutlayer.data.row_files import write_row_files
from cutlayer.data.settings import DataSettings
from cutlayer.errors import DataError
from cutlayer.storage.files import explain_os_errors

__all__ = [
    "DOMAINS",
    "SENTIMENTS",
    "DomainData",
    "DomainRecord",
    "distinct_records",
    "domain_settings",
    "domains",
    "snippets",
    "write_domain",
]

DOMAINS: Mapping[str, str] = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
"""File of the asset `sentiment` by owner."""

SENTIMENTS = ("negative", "positive")
"""The answers."""

_MIN_SCORE = 1.0
"""Raters scored from -4 to 4; nearer to zero they did not agree."""
_MIN_WORDS, _MAX_WORDS = 4, 14
_PROMPT = "{text}\nSentiment:"
_COMPLETION = " {sentiment}"


@dataclass(frozen=True)
class DomainRecord:
    """One line of an owner's data files."""

    text: str = field(repr=False)
    """The snippet."""
    sentiment: str
    """One of `SENTIMENTS`."""


@dataclass(frozen=True, kw_only=True)
class DomainData:
    """Records of one owner."""

    train: list[DomainRecord] = field(repr=False)
    """By seed, both sentiments alike, shuffled."""
    heldout: list[DomainRecord] = field(repr=False)
    """Fixed, both sentiments alike."""


def domains(
    folder: Path, seed: int, num_train: int, num_heldout: int, names: Sequence[str] = tuple(DOMAINS)
) -> dict[str, DomainData]:
    """Choose every owner's rows.

    Args:
        folder: the asset `sentiment`.
        seed: of the training rows; the held-out rows do not depend on it.
        num_train: training rows of each owner, even.
        num_heldout: held-out rows of each owner, even.
        names: owners, keys of `DOMAINS`.

    Raises:
        DataError: an unknown owner, a missing or damaged file, or too few rows.
    """
    for name, count in (("num_train", num_train), ("num_heldout", num_heldout)):
        if count < len(SENTIMENTS) or count % len(SENTIMENTS):
            raise DataError(f"{name}={count}: each sentiment has half of the rows; give 2, 4, ...")
    pools = {name: list(distinct_records(_clear(folder, name))) for name in names}
    heldout = {name: _balanced(pools[name], num_heldout, name) for name in names}
    kept = Resembling(record.text for records in heldout.values() for record in records)
    chosen: dict[str, DomainData] = {}
    for name in names:
        others = (record for record in _by_seed(pools[name], seed) if record.text not in kept)
        train = _by_seed(_balanced(others, num_train, name), seed)
        chosen[name] = DomainData(train=train, heldout=heldout[name])
    return chosen


def snippets(folder: Path, name: str) -> Iterator[tuple[float, str]]:
    """Score, from -4 to 4, and text of every line of one file.

    Args:
        folder: the asset `sentiment`.
        name: the owner, a key of `DOMAINS`.

    Raises:
        DataError: an unknown owner, a missing or damaged file.
    """
    if name not in DOMAINS:
        raise DataError(f"no owner {name!r} in the asset; there are {', '.join(DOMAINS)}")
    path = folder / DOMAINS[name]
    for number, line in enumerate(_lines(path), start=1):
        yield _parse(line, f"{path}:{number}")


def distinct_records(records: Iterable[DomainRecord]) -> Iterator[DomainRecord]:
    """One record per set of words, in an order that no file and no seed touches."""
    seen: set[frozenset[str]] = set()
    for record in sorted(records, key=lambda record: _rank("", record)):
        words = words_of(record.text)
        if words and words not in seen:
            seen.add(words)
            yield record


def write_domain(data: DomainData, folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl` as an owner would have them; returns both paths."""
    return write_row_files(folder, map(asdict, data.train), map(asdict, data.heldout))


def domain_settings(train: Path, heldout: Path) -> DataSettings:
    """The data settings of an owner: plain prompt, loss on the answer alone."""
    return DataSettings(
        train=train,
        validation=heldout,
        prompt_template=_PROMPT,
        completion_template=_COMPLETION,
        chat_template=False,
        append_eos=False,
    )


def _clear(folder: Path, name: str) -> Iterator[DomainRecord]:
    """The clear and short snippets of one file."""
    for score, text in snippets(folder, name):
        if abs(score) >= _MIN_SCORE and _MIN_WORDS <= len(text.split()) <= _MAX_WORDS:
            yield DomainRecord(text, SENTIMENTS[score > 0])


def _lines(path: Path) -> list[str]:
    try:
        with explain_os_errors(f"read {path}"):
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except UnicodeDecodeError as error:
        # Not the codec's message: it may quote the file's bytes.
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8; fetch the asset sentiment again"
        ) from None
    if not lines:
        raise DataError(f"{path} is missing or empty; fetch the asset sentiment again")
    return lines


def _parse(line: str, where: str) -> tuple[float, str]:
    """Score and text of `id <tab> score <tab> text`."""
    try:
        _, score, text = line.split("\t")
        value = float(score)
        if not math.isfinite(value):
            raise ValueError("no score")
    except ValueError:
        # Not the error's message: it quotes the line.
        raise DataError(f"{where} is not id, score and text; fetch the asset again") from None
    return value, " ".join(html.unescape(text).split())


def _balanced(records: Iterable[DomainRecord], count: int, name: str) -> list[DomainRecord]:
    """The first records of each sentiment, alike in number; no more are looked at than needed."""
    missing = dict.fromkeys(SENTIMENTS, count // len(SENTIMENTS))
    chosen: list[DomainRecord] = []
    for record in records:
        if missing[record.sentiment]:
            missing[record.sentiment] -= 1
            chosen.append(record)
        if len(chosen) == count:
            return chosen
    raise DataError(f"{name} has only {len(chosen)} of {count} balanced rows; ask for fewer")


def _by_seed(records: Iterable[DomainRecord], seed: int) -> list[DomainRecord]:
    """In an order that is the seed's own, on every version of Python."""
    return sorted(records, key=lambda record: _rank(f"{seed}|", record))


def _rank(salt: str, record: DomainRecord) -> str:
    return hashlib.sha256(f"{salt}{record.text.casefold()}".encode()).hexdigest()
