from pathlib import Path

import pytest

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.scoring import Scorer
from cutlayer.audit.trial import Case, attack_evidence
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
