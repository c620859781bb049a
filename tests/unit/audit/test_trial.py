import time
from dataclasses import replace
from pathlib import Path

import pytest

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess, nothing_said
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.scoring import Scorer
from cutlayer.audit.trial import Case, attack_evidence, run_attacks
from cutlayer.audit.truth import Hidden
from tests.audit_worlds import tiny_world


class Silent:
    """An attack that makes no guess."""

    aim = Aim.TOKENS
    about = "says nothing"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        return []


def case_of(tmp_path: Path, is_private: bool) -> Case:
    world = tiny_world(tmp_path)
    hidden = {
        number: Hidden(tokens=tokens, private=(is_private,) * len(tokens))
        for number, tokens in enumerate(world.tokens)
    }
    return Case(evidence=world.evidence, knowledge=world.knowledge, hidden=hidden, scorer=Scorer())


def test_an_attack_with_nothing_to_find_is_named_and_ends_no_audit(tmp_path: Path) -> None:
    case = case_of(tmp_path, is_private=False)
    result = attack_evidence("nearest_embedding", case, 5.0, lambda what, share: None)
    assert result.recovery is None
    assert "private token" in (result.skipped or "")


def test_an_attack_that_makes_no_guess_is_not_shown_as_one_that_found_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS._makers, "silent", Silent)
    case = case_of(tmp_path, is_private=True)
    result = attack_evidence("silent", case, 5.0, lambda what, share: None)
    assert result.recovery is None
    assert "no guess" in (result.skipped or "")


class Slow:
    """An attack that says nothing about most of what it saw, for want of time."""

    aim = Aim.TOKENS
    about = "needs more time than there is"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        return [nothing_said(seen.number, len(seen.h_LD)) for seen in evidence.observations]


def test_an_attack_without_time_is_not_run_and_never_a_measured_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS._makers, "slow", Slow)
    case = case_of(tmp_path, is_private=True)
    result = attack_evidence("slow", case, 5.0, lambda what, share: None)
    assert result.recovery is None
    assert "no time" in (result.skipped or "")


def test_a_zero_of_an_attack_that_ended_is_a_measured_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Slow):
        def reconstruct(
            self, evidence: Evidence, knowledge: Knowledge, effort: Effort
        ) -> list[Guess]:
            said = super().reconstruct(evidence, knowledge, effort)
            return [replace(guess, num_unfinished=0) for guess in said]

    monkeypatch.setitem(ATTACKS._makers, "wrong", Wrong)
    case = case_of(tmp_path, is_private=True)
    result = attack_evidence("wrong", case, 5.0, lambda what, share: None)
    assert result.recovery is not None
    assert result.recovery.value == 0.0


def test_what_one_attack_takes_too_much_is_not_taken_from_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    class Greedy(Slow):
        def reconstruct(
            self, evidence: Evidence, knowledge: Knowledge, effort: Effort
        ) -> list[Guess]:
            given.append(effort.seconds)
            time.sleep(0.3)
            return super().reconstruct(evidence, knowledge, effort)

    for name in ("a", "b", "c"):
        monkeypatch.setitem(ATTACKS._makers, name, Greedy)
    case = case_of(tmp_path, is_private=True)
    run_attacks(("a", "b", "c"), case, 0.3, lambda what, share: None)
    assert given == pytest.approx([0.1, 0.05, 0.05], rel=0.05)
