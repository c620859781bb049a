"""Settings that contradict themselves are refused before a file is read."""

import pytest

from cutlayer.data.settings import DataSettings, placeholders
from cutlayer.errors import ConfigError
from cutlayer.settings import parse_settings


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, "say what to learn"),
        ({"prompt": "p"}, "say what to learn"),
        ({"completion": "c"}, "the chat template needs prompt"),
        ({"prompt": "p", "prompt_template": "{p}", "completion": "c"}, "not both"),
        ({"messages": "m", "completion": "c"}, "not both"),
        ({"messages": "m", "chat_template": False}, "messages need chat_template"),
        ({"prompt_template": "no column", "completion": "c"}, "names no column"),
        ({"prompt_template": "{a.b!r}", "completion": "c"}, "bare column name"),
        ({"prompt_template": "{}", "completion": "c"}, "bare column name"),
        ({"prompt_template": "{a", "completion": "c"}, "prompt_template"),
        ({"messages": "m", "validation": "v", "validation_fraction": 0.1}, "not both"),
        ({"messages": "m", "validation_fraction": 1.0}, "validation_fraction"),
        ({"messages": "m", "on_too_long": "crop"}, "on_too_long"),
        ({"messages": "m", "max_lenght": 8}, "did you mean max_length"),
    ],
)
def test_contradictions_are_config_errors(table: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_settings(DataSettings, {"train": "t.jsonl", **table}, where="run.toml")


def test_placeholders_keep_doubled_braces_and_odd_column_names() -> None:
    parts = placeholders("a {{x}} {my column}!")
    assert "".join(text for text, _ in parts) == "a {x} !"
    assert [name for _, name in parts if name] == ["my column"]
    assert parts[-1] == ("!", None)
