"""One setting from run to score: every attack on what left, and what that is worth.

It arranges: the run is in `live`, the attacks in `attacks`, the arithmetic in `scoring`.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cutlayer.audit.attack import ATTACKS, Aim, Attack, Effort, Guess
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.grid import TrialSpec
from cutlayer.audit.knowledge import Knowledge, Threat
from cutlayer.audit.live import Material, Seen, run_setting
from cutlayer.audit.places import with_answers, with_places
from cutlayer.audit.planted import Planted
from cutlayer.audit.results import AttackResult, Example, Trial
from cutlayer.audit.scoring import Scorer
from cutlayer.audit.truth import Hidden
from cutlayer.errors import ConfigError, DataError
from cutlayer.model.folder import ModelFolder

__all__ = ["Bench", "Case", "attack_evidence", "case_of", "run_attacks", "run_trial"]

_NUM_EXAMPLES = 3
_LEAST_SHARE = 0.5
"""Of an equal share of the time: what an attack gets whatever the others took."""
_NOTHING = -1

Watch = Callable[[str, float], None]
"""Told what goes on, and the share of that which is done."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What attacks of all trials are given beside the evidence."""

    material: Material
    model: ModelFolder
    names: Sequence[str]
    """Attacks to run."""
    public_rows: Sequence[Sequence[int]] = field(repr=False)
    template: Sequence[int] = field(repr=False)
    canaries: Sequence[Sequence[int]] = field(repr=False)
    planted: Planted | None = field(default=None, repr=False)
    """What a fine-tune learns of them; None without an attack that looks for it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recording with what is needed to attack and to score it."""

    evidence: Evidence
    knowledge: Knowledge
    hidden: Mapping[int, Hidden] = field(repr=False)
    scorer: Scorer = field(repr=False)
    planted: Mapping[int, Hidden] = field(default_factory=dict, repr=False)
    """Secrets that the run has learnt, by the number of their format."""
    shows_examples: bool = False
    seed: int = 0


def run_trial(spec: TrialSpec, bench: Bench, watch: Watch) -> Trial:
    """Run one setting and every attack on it.

    Raises:
        CutlayerError: the run failed; an attack that cannot run is part of the result instead.
    """
    watch("recording", 0.0)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cutlayer-audit-") as folder:
        seen = run_setting(spec, bench.material, Path(folder))
    case = case_of(spec, bench, seen)
    attacks = run_attacks(bench.names, case, bench.material.plan.seconds_per_setting, watch)
    seconds = time.monotonic() - began_s - seen.tune_seconds
    rows = {hidden.row_id: hidden for hidden in seen.hidden.values()}
    return Trial(
        spec=spec,
        label=spec.label,
        mechanism_label=seen.rule.label,
        guarantee=seen.guarantee,
        epsilon=seen.epsilon,
        threat=str(case.knowledge.threat),
        verdict_key=seen.verdict_key,
        num_rows=len(rows),
        num_tokens=sum(len(hidden.private_places()) for hidden in rows.values()),
        passes=bench.material.plan.passes,
        attacks=tuple(attacks),
        utility=seen.utility if seen.utility.num_rows else None,
        seconds=seconds,
        tune_seconds=seen.tune_seconds,
    )


def attack_evidence(name: str, case: Case, seconds: float, watch: Watch) -> AttackResult:
    """Run and score one attack.

    Args:
        name: registered.
        case: recording, knowledge and truth.
        seconds: its time.
        watch: told how far it is.
    """
    attack = ATTACKS.make(name)
    effort = Effort(seconds=seconds, seed=case.seed, on_progress=lambda share: watch(name, share))
    watch(name, 0.0)
    began_s = time.monotonic()
    try:
        lay_out = with_answers if attack.aim is Aim.LABELS else with_places
        evidence, hidden = lay_out(case.evidence, case.hidden)
        if attack.aim is Aim.CANARIES:
            hidden = dict(case.planted)
        told = replace(case, evidence=evidence, hidden=hidden)
        guesses = attack.reconstruct(evidence, case.knowledge, effort)
        return _scored(name, attack, guesses, told, time.monotonic() - began_s)
    except (ConfigError, DataError) as error:
        # It needs what this recording or this attacker does not have, and says what; or the rows
        # have nothing that it looks for.
        return AttackResult(
            attack=name,
            aim=attack.aim,
            about=attack.about,
            skipped=str(error),
            seconds=time.monotonic() - began_s,
        )


def run_attacks(
    names: Sequence[str], case: Case, seconds: float, watch: Watch
) -> list[AttackResult]:
    """Each attack gets an equal share of the time that is left, so that quick ones give to slow.

    None gets less than a part of an equal share of all, whoever took longer before it.

    Args:
        names: registered.
        case: recording, knowledge and truth.
        seconds: for all of them.
        watch: told which runs and how far it is.
    """
    ends_s = time.monotonic() + seconds
    least_s = _LEAST_SHARE * seconds / len(names)
    results = []
    for place, name in enumerate(names):
        share_s = (ends_s - time.monotonic()) / (len(names) - place)
        results.append(attack_evidence(name, case, max(least_s, share_s), watch))
    return results


def case_of(spec: TrialSpec, bench: Bench, seen: Seen) -> Case:
    """What attacks on a run need, and what scoring needs beside it."""
    plan, planted = bench.material.plan, bench.planted if seen.is_planted else None
    knowledge = Knowledge(
        folder=bench.model,
        cut=spec.cut,
        rule=seen.rule,
        gradient_rule=seen.gradient_rule,
        public_rows=bench.public_rows,
        template=bench.template,
        adapt=seen.adapt if plan.threat is Threat.T2 else None,
        adapt_trunk=seen.adapt_trunk,
        canaries=() if planted is None else planted.formats,
    )
    tokenizer = knowledge.tokenizer
    scorer = Scorer(
        text_of=lambda tokens: str(tokenizer.decode(list(tokens))),
        public_rows=bench.public_rows,
        canaries=bench.canaries,
        vocab_size=bench.model.config.vocab_size,
        seed=plan.seed,
    )
    return Case(
        evidence=seen.evidence,
        knowledge=knowledge,
        hidden=seen.hidden,
        scorer=scorer,
        planted={} if planted is None else planted.hidden,
        shows_examples=plan.show_examples,
        seed=plan.seed,
    )


def _scored(
    name: str, attack: Attack, guesses: Sequence[Guess], case: Case, seconds: float
) -> AttackResult:
    if not guesses:
        # Silence is no proof of safety: such an attack counts as not run.
        raise DataError("it made no guess about anything in this recording")
    score = case.scorer.score(attack.aim, guesses, case.hidden)
    if score.had_no_time:
        raise DataError(
            f"no time: found nothing in the {seconds:.0f} s that it took, with "
            f"{score.num_unfinished} of {score.num_positions} positions unfinished; raise "
            "audit.seconds_per_setting"
        )
    is_tokens = attack.aim is Aim.TOKENS and case.shows_examples
    return AttackResult(
        attack=name,
        aim=attack.aim,
        about=attack.about,
        recovery=score.recovery,
        chance=score.chance,
        chance_error=score.chance_error,
        rouge_l=None if score.rouge is None else score.rouge.rouge_l,
        rare=score.rare,
        canaries=score.canaries,
        majority=None if score.majority is None else score.majority.value,
        num_fallbacks=score.num_fallbacks,
        num_unfinished=score.num_unfinished,
        seconds=seconds,
        examples=_examples(guesses, case) if is_tokens else (),
    )


def _examples(guesses: Sequence[Guess], case: Case) -> tuple[Example, ...]:
    text_of = case.scorer.text_of
    assert text_of is not None
    made = []
    for guess in guesses[:_NUM_EXAMPLES]:
        hidden = case.hidden[guess.number]
        places = hidden.private_places()
        said = [guess.tokens[place] for place in places if guess.tokens[place] != _NOTHING]
        truth = text_of([hidden.tokens[place] for place in places])
        made.append(Example(truth=truth, guess=text_of(said)))
    return tuple(made)
