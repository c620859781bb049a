"""The task of the plane: rows on disk, and the settings that are tried. It runs nothing."""

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.subjects import write_text_llama
from cutlayer.audit.audit import attack_names
from cutlayer.audit.settings import AuditPlan
from cutlayer.client.settings import ClientSettings
from cutlayer.data.assets import fetch
from cutlayer.data.row_files import write_row_files
from cutlayer.data.settings import DataSettings
from cutlayer.data.topics import topics, write_topics
from cutlayer.demo.settings_text import settings_text
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder, write_atomic

__all__ = ["Point", "Sizes", "Task", "make_task"]

_PROMPT = "News: {text}\nTopic (business, entertainment, politics, sports or tech):"
_SMOKE_TOPICS = "abcde"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    num_train: int
    num_heldout: int
    num_words: int
    """Of each article."""
    steps: int
    rows_per_step: int
    lr: float
    attacked_rows: int
    seconds_per_setting: float
    """Of all attacks on it."""
    control_steps: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One audit: a cut, a rule, and what is withheld."""

    cut: tuple[int, int]
    rule: str
    withhold: str
    num_times: int = 1
    """So many times `Sizes.steps` are trained: short rows cost little."""


STANDARD = Sizes(
    num_train=360,
    num_heldout=300,
    num_words=300,
    steps=60,
    rows_per_step=12,
    lr=1e-3,
    attacked_rows=20,
    seconds_per_setting=900.0,
    control_steps=240,
)
SMOKE = Sizes(
    num_train=20,
    num_heldout=10,
    num_words=8,
    steps=2,
    rows_per_step=4,
    lr=1e-3,
    attacked_rows=4,
    seconds_per_setting=5.0,
    control_steps=2,
)
POINTS = (
    Point(cut=(0, 29), rule="none", withhold="none"),
    Point(cut=(0, 29), rule="none", withhold="private keep_share=0.05", num_times=5),
    Point(cut=(0, 29), rule="none", withhold="private keep_share=0.045", num_times=5),
)
SMOKE_POINTS = (
    Point(cut=(0, 5), rule="none", withhold="none"),
    Point(cut=(0, 5), rule="none", withhold="private keep_share=0.3"),
)
_NEEDS = ("adapter_inversion", "canary_extraction", "kv_reuse", "repeat_averaging")
"""Attacks on what such a run does not give: updates, canaries, sessions, a second pass."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows, model and settings."""

    folder: Path
    """Results; a run that was stopped goes on from here."""
    model: Path
    train: Path
    heldout: Path
    sizes: Sizes
    points: tuple[Point, ...]
    threads: int
    prompt: str = _PROMPT
    public: str | None = field(default="asset:sentiment")
    """Of another kind than the private text, and free of it."""

    def plans(self) -> Iterator[AuditPlan]:
        """One audit a point."""
        for place, point in enumerate(self.points):
            path = self.folder / f"client-{place}.toml"
            write_atomic(path, settings_text(self._client(point)).encode())
            yield self._plan(point, path, self.folder / f"audit-{place}")

    def data_settings(self) -> DataSettings:
        """Plain prompt, loss on the answer alone."""
        return DataSettings(
            train=self.train,
            validation=self.heldout,
            prompt_template=self.prompt,
            completion_template=" {topic}" if self.prompt is _PROMPT else "{topic}",
            chat_template=False,
            append_eos=False,
        )

    def _client(self, point: Point) -> ClientSettings:
        table = {
            "model": {
                "path": str(self.model),
                "lower": point.cut[0],
                "upper": point.cut[1],
                "threads": self.threads,
            },
            "connection": {"address": "127.0.0.1:1", "plaintext": True, "codec": "raw"},
            "privacy": {"mechanism": "none"},
            "data": self.data_settings().model_dump(),
            "train": {
                "steps": self.sizes.steps * point.num_times,
                "rows_per_step": self.sizes.rows_per_step,
                "lr": self.sizes.lr,
                "save_every": self.sizes.steps,
            },
        }
        return parse_settings(ClientSettings, table, "the benchmark's owner")

    def _plan(self, point: Point, client: Path, folder: Path) -> AuditPlan:
        table = {
            "client": str(client),
            "folder": str(folder),
            "verdicts": str(self.folder / "verdicts"),
            "rules": [point.rule],
            "withhold": [point.withhold],
            "phases": ["trained"],
            "attacks": [name for name in attack_names([]) if name not in _NEEDS],
            "threat": "T2",
            "rows": self.sizes.attacked_rows,
            "canaries": 0,
            "seconds_per_setting": self.sizes.seconds_per_setting,
            "public": self.public,
            "utility_rows": self.sizes.num_heldout,
        }
        return parse_settings(AuditPlan, table, "the benchmark's audit")


def make_task(folder: Path | None, *, is_smoke: bool, threads: int) -> Task:
    """Write the rows.

    Args:
        folder: where results are kept; None takes a fresh one.
        is_smoke: a tiny random model and made-up rows, without any download.
        threads: compute threads.
    """
    place = Path(tempfile.mkdtemp(prefix="pareto-")) if folder is None else folder
    place = private_folder(place.absolute())
    if is_smoke:
        return _smoke(place, threads)
    sizes = STANDARD
    data = topics(
        fetch("bbcnews"), 0, sizes.num_train, sizes.num_heldout, num_words=sizes.num_words
    )
    train, heldout = write_topics(data, place / "rows")
    return Task(
        folder=place,
        model=fetch("smollm2"),
        train=train,
        heldout=heldout,
        sizes=sizes,
        points=POINTS,
        threads=threads,
    )


def _smoke(folder: Path, threads: int) -> Task:
    generator = random.Random(0)

    def rows(number: int) -> list[dict[str, str]]:
        letters = "fghijklm"
        return [
            {
                "text": "".join(generator.choice(letters) for _ in range(SMOKE.num_words)),
                "topic": _SMOKE_TOPICS[place % len(_SMOKE_TOPICS)],
            }
            for place in range(number)
        ]

    train, heldout = write_row_files(
        folder / "rows", rows(SMOKE.num_train), rows(SMOKE.num_heldout)
    )
    model = folder / "model"
    if not model.exists():
        write_text_llama(model)
    return Task(
        folder=folder,
        model=model,
        train=train,
        heldout=heldout,
        sizes=SMOKE,
        points=SMOKE_POINTS,
        threads=threads,
        prompt="N: {text}\nT:",
        public=None,
    )
