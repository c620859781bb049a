"""A tiny federation's settings: three owners of rows that a tiny model can learn."""

from pathlib import Path

from cutlayer.settings import parse_settings
from cutlayer.simulation.settings import SimulationSettings
from tests.worlds import write_rows

Table = dict[str, object]


def table(model: Path, folder: Path, **changes: object) -> Table:
    """The settings file as plain values; `changes` replace keys, such as train__lr=0.1."""
    made: dict[str, Table] = {
        "simulation": {"owners": 3},
        "model": {"path": str(model), "lower": 1, "upper": 3},
        "connection": {"codec": "raw"},
        "privacy": {"mechanism": "none"},
        "federation": {"name": "tiny", "rounds": 2, "local_steps": 2},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {
            "train": str(write_rows(folder / "rows.jsonl", 36)),
            "prompt_template": "{text}:",
            "completion_template": " {topic}",
            "chat_template": False,
            "validation_fraction": 0.25,
        },
        "train": {"rows_per_step": 4, "lr": 0.02},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            made.setdefault(section, {})[key] = value
        elif value is None:
            made.pop(section, None)
        else:
            assert isinstance(value, dict)
            made[section] = value
    return dict(made)


def simulated(model: Path, folder: Path, **changes: object) -> SimulationSettings:
    """The same, read."""
    return parse_settings(SimulationSettings, table(model, folder, **changes), "federation.toml")
