"""Texts that say nearly the same, against the plain comparison with each of them."""

from hypothesis import given
from hypothesis import strategies as st

from cutlayer.data.resemblance import Resembling, words_of

_TEXTS = st.lists(st.sampled_from("abcdefghijkl"), max_size=12).map(" ".join)


def _resembles_one(text: str, others: list[str]) -> bool:
    """The definition, in whole numbers: three fifths of all words are common."""
    words = words_of(text)
    pairs = [(words & words_of(other), words | words_of(other)) for other in others]
    return any(common and 5 * len(common) >= 3 * len(both) for common, both in pairs)


@given(text=_TEXTS, others=st.lists(_TEXTS, max_size=8))
def test_the_index_finds_what_comparing_each_finds(text: str, others: list[str]) -> None:
    assert (text in Resembling(others)) == _resembles_one(text, others)


def test_case_marks_and_order_do_not_tell_texts_apart() -> None:
    kept = Resembling(["One fine, little film - here!"])
    assert "here ONE little film" in kept
    assert "here one other film" not in kept
    assert "" not in kept
    assert words_of("It's it; IT") == {"it", "s"}
