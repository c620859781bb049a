import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cutlayer.errors import ConfigError, StorageError
from cutlayer.model.partition import Cut
from cutlayer.planner.picture import Point, write_picture

POINTS = [
    Point(cut=Cut(0, 4), memory_bytes=1.0e9, seconds=3.0, is_front=True, labels=("least memory",)),
    Point(cut=Cut(1, 4), memory_bytes=1.2e9, seconds=2.0, leak=0.9, is_front=True),
    Point(cut=Cut(2, 4), memory_bytes=1.4e9, seconds=2.5, leak=0.4, is_leak_exact=False),
    Point(cut=Cut(2, 3), memory_bytes=1.5e9, seconds=1.5, labels=("fastest", "balanced")),
    Point(cut=Cut(3, 4), memory_bytes=2.5e9, seconds=2.6, is_feasible=False),
]
LEGEND = (
    "client's memory",
    "no other cut beats it",
    "leak not measured",
    "leak of a neighbour",
    "not feasible",
)


def _drawn(points: list[Point], folder: Path, limit: float | None = None) -> str:
    path = folder / "plan.svg"
    write_picture(points, path, "tiny: 8 rows a step", limit)
    return path.read_text(encoding="utf-8")


def test_a_png_is_written_whole_and_the_same_again(tmp_path: Path) -> None:
    for name in ("one.png", "other.png"):
        write_picture(POINTS, tmp_path / name, "tiny", 2.0e9)
    data = (tmp_path / "one.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert data == (tmp_path / "other.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "other.png"]


def test_axes_title_and_recommended_cuts_are_named(tmp_path: Path) -> None:
    text = _drawn(POINTS, tmp_path, 2.0e9)
    for said in ("tiny: 8 rows a step", "client memory, GB", "seconds per 1,000 tokens, training"):
        assert said in text
    assert "0:4  least memory" in text
    assert "2:3  fastest, balanced" in text
    assert "1:4" not in text
    assert all(said in text for said in LEGEND)
    assert "recovered by the strongest attack, %" in text


def test_the_legend_names_only_what_is_there(tmp_path: Path) -> None:
    text = _drawn([replace(POINTS[3], leak=0.5)], tmp_path)
    assert not [said for said in LEGEND if said in text]
    without = _drawn([POINTS[3]], tmp_path)
    assert "strongest attack" not in without
    assert "leak not measured" in without


def test_a_limit_far_off_is_said_and_does_not_squeeze_the_marks(tmp_path: Path) -> None:
    text = _drawn(POINTS, tmp_path, 19e9)
    assert "the client has 19.0" in text
    assert "client's memory" not in text


@pytest.mark.parametrize("num", [1, 5])
def test_cuts_that_cost_the_same_can_be_drawn(tmp_path: Path, num: int) -> None:
    text = _drawn([POINTS[3]] * num, tmp_path)
    assert text.count("2:3  fastest, balanced") == num


def test_every_goal_of_one_place_stays_inside_the_picture(tmp_path: Path) -> None:
    crowd = [
        replace(POINTS[0], cut=Cut(place, 40), seconds=3.0 + place / 1000, labels=("a long goal",))
        for place in range(6)
    ]
    assert _drawn(crowd, tmp_path).count("a long goal") == 6


def test_nothing_to_draw_and_other_forms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no cut to draw"):
        write_picture([], tmp_path / "plan.png", "tiny")
    with pytest.raises(ConfigError, match=r"plan\.jpg must end with \.png or \.svg"):
        write_picture(POINTS, tmp_path / "plan.jpg", "tiny")
    with pytest.raises(StorageError, match="nowhere"):
        write_picture(POINTS, tmp_path / "nowhere" / "plan.png", "tiny")


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"cutlayer\[audit\]"):
        write_picture(POINTS, tmp_path / "plan.png", "tiny")
