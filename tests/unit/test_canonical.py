"""The byte form that is hashed and signed does not depend on how a value was put together."""

from cutlayer.canonical import canonical_json


def test_equal_values_have_equal_bytes():
    assert canonical_json({"b": [1, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,null]}'
    assert canonical_json({"a": "é", "b": [1, None]}) == canonical_json({"b": [1, None], "a": "é"})
