"""The profiles: what the issue of learning as well asks for, and nothing that cannot run."""

from collections import Counter
from pathlib import Path

import pytest

import cutlayer.federation.mean_strategies  # noqa: F401  (registers)
from cutlayer.errors import ConfigError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.federation.strategy_registry import STRATEGIES
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.suite.profiles import CUTS, PROFILES, SCALES, Choice, specs_of
from cutlayer.suite.sides import privacy_settings
from cutlayer.suite.spec import Method, RunSpec
from cutlayer.wire.codec import CODECS


def _labels(profile: str, task: str) -> Counter[str]:
    return Counter(spec.label for spec in specs_of(profile, Choice()) if spec.task == task)


@pytest.mark.parametrize("name", PROFILES)
class TestEveryProfile:
    def test_its_runs_differ_and_have_names_of_their_own(self, name: str) -> None:
        specs = specs_of(name, Choice())
        assert len({spec.run_id for spec in specs}) == len(set(specs)) == len(specs)

    def test_its_runs_name_what_there_is(self, name: str) -> None:
        for spec in specs_of(name, Choice()):
            assert published_task(spec.task)
            assert spec.codec in CODECS
            assert spec.strategy in STRATEGIES
            assert privacy_settings(spec)

    def test_every_tuned_run_has_its_unsplit_counterpart(self, name: str) -> None:
        specs = specs_of(name, Choice())
        central = {(s.task, s.sizes, s.seed) for s in specs if s.method is Method.CENTRALISED}
        assert {(s.task, s.sizes, s.seed) for s in specs} == central

    def test_rounds_fill_the_steps_and_owners_share_a_step(self, name: str) -> None:
        for spec in specs_of(name, Choice()):
            assert spec.sizes.steps % spec.local_steps == 0
            assert spec.sizes.rows_per_step % spec.owners == 0

    def test_model_and_data_may_be_chosen(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "coqa").mkdir()
        specs = specs_of(name, Choice(model="a/b", data=str(tmp_path)))
        assert {spec.model for spec in specs} == {"a/b"}
        sources = {spec.task: spec.source for spec in specs}
        assert sources.pop("coqa") == str(tmp_path / "coqa")
        assert set(sources.values()) == {str(tmp_path)}


def test_the_same_words_for_another_model_are_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        found.append(specs_of("small", Choice(model="model"))[0].run_id)
    assert found[0] != found[1]


def test_small_has_what_two_cores_are_asked() -> None:
    for task in ("topics", "sentiment"):
        assert _labels("small", task) == {
            "untuned": 1,
            "centralised": 3,
            "centralised.4-iid-order": 1,
            "centralised.4-skewed-0.1-order": 1,
            "split": 3,
            "split.bf16": 1,
            "split.fp8": 3,
            "split.gaussian-0.02": 1,
            "together.4-iid.every-step": 1,
            "together.4-skewed-0.1.fedavg": 1,
            "together.4-skewed-0.1.every-step": 1,
        }
    for task in ("coqa", "xsum", "multirc"):
        assert _labels("small", task) == {"untuned": 1, "centralised": 1, "split": 1}


def test_medium_has_every_codec_mechanism_and_cut() -> None:
    specs = [spec for spec in specs_of("medium", Choice()) if spec.task == "topics"]
    assert {spec.codec for spec in specs} == set(CODECS)
    assert Counter(s.mechanism for s in specs if s.mechanism != "none") == {
        name: 9 for name in MECHANISMS.names if name != "none"
    }
    assert {spec.adapter for spec in specs} == {"lora", "prefix", "sparse"}
    for method in (Method.SPLIT, Method.AUDIT):
        runs = [s for s in specs if s.method is method and (s.in_processes or method != "split")]
        assert sorted((s.head_blocks, s.tail_blocks) for s in runs) == sorted(CUTS)


def test_medium_has_every_packaged_task() -> None:
    tasks = {spec.task for spec in specs_of("medium", Choice())}
    assert tasks == {"topics", "sentiment", "coqa", "xsum", "cnn_dailymail", "multirc"}


def test_full_has_original_data_and_every_task_that_has_it() -> None:
    specs = specs_of("full", Choice())
    assert {spec.source for spec in specs} == {"hub"}
    assert all(published_task(spec.task).hub is not None for spec in specs)


def test_every_mechanism_has_three_scales() -> None:
    assert {name: len(scales) for name, scales in SCALES.items()} == {
        name: 3 for name in MECHANISMS.names if name != "none"
    }


def test_a_profile_or_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'tiny'.*small, medium, full"):
        specs_of("tiny", Choice())
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        specs_of("small", Choice(data=str(tmp_path / "nowhere")))


def test_specs_are_those_of_the_issue() -> None:
    spec: RunSpec = next(s for s in specs_of("small", Choice()) if s.task == "topics")
    assert (spec.sizes.train_rows, spec.sizes.test_rows) == (120, 300)
    short = next(s for s in specs_of("small", Choice()) if s.task == "xsum").sizes
    assert (short.test_rows, short.max_words) == (32, 250)
