"""What counts as private in a row: the record's text, never less."""

from cutlayer.data.private_text import are_private, filled, found_in


def _letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def _pairs(text: str) -> list[int]:
    """Two letters a token, counted from the text's beginning, so that a cut text differs."""
    return [hash(text[place : place + 2]) for place in range(0, len(text), 2)]


def test_letters_of_the_record_alone_are_private() -> None:
    text = "News: rain\nTopic:"
    private = are_private(_letters(text), text, found_in(text, ["rain"]), _letters)
    assert "".join(c for c, hidden in zip(text, private, strict=True) if hidden) == "rain"


def test_a_token_shared_with_the_template_is_private() -> None:
    text = "a: rain."
    private = are_private(_pairs(text), text, found_in(text, ["rain"]), _pairs)
    assert private == [False, True, True, True]


def test_two_columns_that_say_the_same_are_both_found() -> None:
    assert found_in("x yes y yes", ["yes", "yes"]) == ((2, 5), (8, 11))


def test_words_of_the_template_that_say_the_same_do_not_hide_the_records() -> None:
    text = "<user>\nuser<end>"
    assert (7, 11) in found_in(text, ["user"])
    assert found_in("aaa", ["aa", ""]) == ((0, 2), (1, 3))


def test_a_filled_template_says_where_the_records_text_is() -> None:
    text, ranges = filled([("\nAnswer: ", "A"), (" by ", ""), (".", "")])
    assert text == "\nAnswer: A by ."
    assert ranges == ((9, 10),)


def test_what_is_not_found_makes_all_private() -> None:
    text = "trimmed"
    assert found_in(text, ["other"]) == ((0, 7),)
    assert all(are_private(_letters(text), text, ((0, 7),), _letters))


def test_an_empty_text_is_not_private() -> None:
    assert are_private(_letters("ab"), "ab", ((1, 1),), _letters) == [False, False]
