import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cutlayer.client.settings import ClientSettings
from cutlayer.data.template import NOT_SCORED
from cutlayer.errors import ConfigError, DataError
from cutlayer.model.partition import Cut
from cutlayer.planner.probe import ProbeBudget, ProbeResult, _Probe, probe, sensitivity
from cutlayer.planner.probe_run import Bench, Cost, Tuned, make_bench
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_settings, write_rows

CUTS = (Cut(0, 4), Cut(1, 3), Cut(2, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "probe.jsonl", num_rows=20)


def _settings(model: Path, folder: Path, **changes: object) -> ClientSettings:
    return client_settings(model, folder, **changes)


def _probed(settings: ClientSettings, rows: Path, **budget: float) -> tuple[ProbeResult, ...]:
    return probe(settings, rows, CUTS, ProbeBudget(**{"steps": 3, **budget}))  # type: ignore[arg-type]


def test_without_noise_and_with_all_parts_trained_every_cut_is_equal(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    results = _probed(_settings(model, tmp_path), rows)
    assert [one.cut for one in results] == list(CUTS)
    for one in results:
        assert one.untuned_loss == pytest.approx(results[0].untuned_loss, rel=1e-6)
        assert one.loss == pytest.approx(results[0].loss, rel=1e-5)
        assert one.gain > 0.05
    told = sensitivity(results)
    assert not told.is_sensitive
    assert told.needed.cut == Cut(0, 4)
    assert "does not care" in told.sentence


def test_the_untuned_loss_is_the_unsplit_models(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = _settings(model, tmp_path)
    bench = make_bench(settings, rows, CUTS)
    whole = AutoModelForCausalLM.from_pretrained(model)
    total, num = 0.0, 0
    for row in bench.rows.validation:
        with torch.no_grad():
            logits_TV = whole(torch.tensor([row.tokens])).logits[0, :-1]
        labels_T = torch.tensor(row.labels[1:])
        loss = functional.cross_entropy(
            logits_TV, labels_T, ignore_index=NOT_SCORED, reduction="sum"
        )
        total, num = total + float(loss), num + int((labels_T != NOT_SCORED).sum())
    assert bench.measure(Cut(1, 3)).untuned_loss == pytest.approx(total / num, rel=1e-5)


def test_noise_and_frozen_parts_make_cuts_differ(model: Path, rows: Path, tmp_path: Path) -> None:
    noisy = _settings(model, tmp_path, privacy__mechanism="gaussian", privacy__scale=2.0)
    results = _probed(noisy, rows, steps=1)
    assert len({round(one.untuned_loss, 3) for one in results}) == len(CUTS)
    (tmp_path / "frozen").mkdir()
    frozen = _settings(model, tmp_path / "frozen", adapter__parts=["tail"])
    by_cut = {one.cut: one for one in _probed(frozen, rows)}
    # Where the tail has no block nothing learns; one that has learns something.
    assert by_cut[Cut(0, 4)].gain == pytest.approx(0, abs=1e-6)
    assert by_cut[Cut(2, 3)].gain > 0.01
    told = sensitivity(tuple(by_cut.values()))
    assert told.is_sensitive
    assert told.needed.cut != Cut(0, 4)
    assert "needs" in told.sentence


def test_seeds_change_the_order_and_not_the_held_out_rows(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    settings = _settings(model, tmp_path)
    (one,) = probe(settings, rows, [Cut(1, 3)] * 2, ProbeBudget(steps=2, seeds=2), lines.append)
    assert len(one.losses) == 2
    assert one.losses[0] != one.losses[1]
    assert one.error is not None
    assert one.num_rows == 4
    assert len(lines) == 3


def test_a_probe_leaves_nothing_and_spends_no_budget(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    account = tmp_path / "account.jsonl"
    settings = _settings(
        model,
        tmp_path,
        privacy__mechanism="clipped_gaussian",
        privacy__scale=1.0,
        privacy__clip=1.0,
        privacy__account_file=str(account),
        run__record_file=str(tmp_path / "kept.recording"),
    )
    before = sorted(tmp_path.iterdir())
    probe(settings, rows, [Cut(1, 3)], ProbeBudget(steps=1))
    assert sorted(tmp_path.iterdir()) == before
    assert not account.exists()


def _hops(mechanism: str) -> list[dict[str, object]]:
    privacy = {"mechanism": mechanism, "scale": None if mechanism == "none" else 0.1}
    later = {"connection": {"address": "127.0.0.1:2"}, "privacy": privacy}
    return [{"lower": 1, "upper": 2}, {"lower": 2, "upper": 3, **later}]


def test_a_quiet_chain_is_probed_as_one_trunk_and_a_noisy_one_refused(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    table = _settings(model, tmp_path).model_dump(mode="json", exclude_none=True)
    policy = {"memory": {"below_gb": 1e6, "cut": [2, 3]}, "look_every_s": 0.001}
    quiet = ClientSettings.model_validate({**table, "hops": _hops("none"), "recut": policy})
    (one,) = probe(quiet, rows, [Cut(1, 3)], ProbeBudget(steps=1))
    plain = ClientSettings.model_validate(table)
    (other,) = probe(plain, rows, [Cut(1, 3)], ProbeBudget(steps=1))
    assert one.losses == pytest.approx(other.losses, rel=1e-6)
    noisy = ClientSettings.model_validate({**table, "hops": _hops("gaussian")})
    with pytest.raises(ConfigError, match="noise of their own"):
        probe(noisy, rows, [Cut(1, 3)], ProbeBudget(steps=1))


class _Clocked:
    """A bench whose runs take a known time."""

    num_heldout = 8

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s
        self.runs: list[tuple[Cut, int, int]] = []

    def clock_s(self) -> float:
        return self.now_s

    def measure(self, cut: Cut) -> Cost:
        self.now_s += 1 + 2 * self.step_s + 0.5
        seconds = 1.5 + 2 * self.step_s
        return Cost(untuned_loss=2.0, open_s=1.0, step_s=self.step_s, eval_s=0.5, seconds=seconds)

    def tune(self, cut: Cut, seed: int, num_steps: int) -> Tuned:
        self.runs.append((cut, seed, num_steps))
        self.now_s += 1.5 + num_steps * self.step_s
        return Tuned(loss=1.0 + 0.1 * seed, seconds=1.5 + num_steps * self.step_s)


def _timed(
    bench: _Clocked, budget: ProbeBudget, lines: list[str] | None = None
) -> Sequence[ProbeResult]:
    said: list[str] = [] if lines is None else lines
    run = _Probe(bench=cast(Bench, bench), budget=budget, watch=said.append, clock_s=bench.clock_s)
    return run.run(CUTS[:2])


def test_all_cuts_get_as_many_steps_as_the_time_allows() -> None:
    # Measuring takes 2 * 3.5 s; of the 15 s that are left loading and scoring take 3.
    bench, lines = _Clocked(step_s=1.0), list[str]()
    results = _timed(bench, ProbeBudget(steps=50, seconds=22.0), lines)
    assert bench.runs == [(CUTS[0], 0, 6), (CUTS[1], 0, 6)]
    assert [one.num_steps for one in results] == [6, 6]
    assert bench.now_s <= 22.0
    assert "time for 6 of 50 steps" in lines


def test_seeds_are_repeated_in_whole_rounds_while_time_permits() -> None:
    bench = _Clocked(step_s=1.0)
    results = _timed(bench, ProbeBudget(steps=2, seeds=9, seconds=30.0))
    assert [len(one.losses) for one in results] == [3, 3]
    assert bench.now_s <= 30.0
    endless = _Clocked(step_s=1.0)
    assert [len(o.losses) for o in _timed(endless, ProbeBudget(steps=2, seeds=4))] == [4, 4]


@pytest.mark.parametrize("seconds", [0.1, 7.0, 9.0])
def test_too_little_time_is_refused_with_what_is_needed(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"too short for one step at each cut; give at least \d+"):
        _timed(_Clocked(step_s=1.0), ProbeBudget(seconds=seconds))


def _result(cut: Cut, losses: Sequence[float]) -> ProbeResult:
    return ProbeResult(
        cut=cut, untuned_loss=3.0, losses=tuple(losses), num_steps=9, num_rows=8, seconds=1.0
    )


def test_the_needed_cut_is_the_widest_trunk_that_is_no_worse() -> None:
    told = sensitivity(
        [_result(Cut(0, 4), [2.0]), _result(Cut(1, 4), [1.01]), _result(Cut(1, 3), [1.0])]
    )
    assert (told.best.cut, told.needed.cut) == (Cut(1, 3), Cut(1, 4))
    assert told.is_sensitive
    assert told.spread == pytest.approx(1.0)


def test_differences_within_the_seeds_error_count_as_none() -> None:
    wide = [
        _result(cut, [1.0 + move, 1.4 + move])
        for cut, move in zip(CUTS, (0.1, 0, 0.05), strict=True)
    ]
    assert not sensitivity(wide).is_sensitive
    narrow = [
        _result(cut, [1 + move, 1.001 + move]) for cut, move in zip(CUTS, (0.1, 0, 0), strict=True)
    ]
    assert sensitivity(narrow).is_sensitive


def test_one_cut_says_so_and_none_is_refused() -> None:
    assert "one cut alone" in sensitivity([_result(Cut(1, 3), [1.0])]).sentence
    with pytest.raises(ConfigError, match="nothing was probed"):
        sensitivity([])


def test_a_probe_needs_data_cuts_and_rows(model: Path, rows: Path, tmp_path: Path) -> None:
    settings, budget = _settings(model, tmp_path), ProbeBudget(steps=1)
    with pytest.raises(ConfigError, match="there is no cut to probe"):
        probe(settings, rows, [], budget)
    with pytest.raises(ConfigError, match="exceeds the model's 4 blocks"):
        probe(settings, rows, [Cut(1, 5)], budget)
    with pytest.raises(ConfigError, match=r"no \[data\] section"):
        probe(settings.model_copy(update={"data": None}), rows, [Cut(1, 3)], budget)
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        probe(settings, tmp_path / "nowhere.jsonl", [Cut(1, 3)], budget)
    few = tmp_path / "few.jsonl"
    few.write_text(rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="leaves none to train on"):
        probe(settings, few, [Cut(1, 3)], budget)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"seeds": 0}, {"seconds": 0.0}, {"seconds": float("nan")}, {"seconds": -1.0}],
)
def test_a_budget_of_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ProbeBudget(**wrong)  # type: ignore[arg-type]


def test_held_out_rows_are_bounded_and_never_trained_on(model: Path, tmp_path: Path) -> None:
    many = write_rows(tmp_path / "many.jsonl", num_rows=400)
    bench = make_bench(_settings(model, tmp_path), many, CUTS)
    assert bench.num_heldout == 64
    seen = {row.row_id for row in bench.rows.train}
    assert not seen & {row.row_id for row in bench.rows.validation}
    assert all(a != b for a, b in itertools.pairwise(sorted(seen)))
