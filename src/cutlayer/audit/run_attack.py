"""One attack on one recording, scored where the owner gives the truth. It prints nothing."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cutlayer.audit.attacks
from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.known_adapters import adapters_of
from cutlayer.audit.observations import check_model, read_evidence
from cutlayer.audit.places import with_answers, with_places
from cutlayer.audit.scoring import Score, Scorer
from cutlayer.audit.truth import Hidden, hidden_rounds, hidden_rows
from cutlayer.client.truth_file import read_truth
from cutlayer.errors import DataError, ProtocolError
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Cut
from cutlayer.privacy.mechanism import NoiseSettings
from cutlayer.settings import parse_settings
from cutlayer.wire.recording import RecordingHeader, open_recording

__all__ = ["AttackRun", "knowledge_of", "public_rows", "run_attack"]

assert cutlayer.audit.attacks  # registers them

_MAX_PUBLIC_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class AttackRun:
    """What came out."""

    attack: str
    aim: Aim
    about: str
    threat: str
    rule: str
    """The noise at the lower cut, exactly."""
    num_observations: int
    num_updates: int
    guesses: tuple[Guess, ...] = field(repr=False)
    score: Score | None
    """None without the truth."""
    seconds: float

    def values(self) -> dict[str, object]:
        """JSON form, without a guessed token."""
        no_time = self.score is not None and self.score.had_no_time
        score = None if self.score is None or no_time else asdict(self.score)
        return {
            "attack": self.attack,
            "aim": str(self.aim),
            "about": self.about,
            "threat": self.threat,
            "rule": self.rule,
            "observations": self.num_observations,
            "updates": self.num_updates,
            "guessed": len(self.guesses),
            "score": score,
            "had_no_time": no_time,
            "seconds": round(self.seconds, 3),
        }


def run_attack(
    name: str,
    recording: Path,
    model: ModelFolder,
    public: Sequence[Sequence[int]] = (),
    truth: Path | None = None,
    adapters: Path | None = None,
    effort: Effort = Effort(),  # noqa: B008 - frozen
    accepts_truncated: bool = False,
) -> AttackRun:
    """Run one attack on a recording.

    Args:
        name: registered name.
        recording: the file.
        model: the public model.
        public: token rows of public text, for attacks that learn.
        truth: the owner's truth, to score; None does not. Where vectors stayed it also tells the
            attack in which places, as an audit does: without it, rows are read as they left.
        adapters: exported adapters of head and tail, which a colluding client gave (T2).
        effort: time for the attack, and who is told of progress.
        accepts_truncated: see `open_recording`.

    Raises:
        ConfigError: unknown attack, or one that needs what was not recorded.
        StorageError: a file cannot be read, is cut short or damaged.
        SpecMismatch: a recording of another model.
        DataError: nothing of use, or nothing private, was recorded.
        ModelError: adapters that do not fit.
    """
    attack = ATTACKS.make(name)
    recorded = read_evidence(open_recording(recording, accepts_truncated=accepts_truncated))
    knowledge = knowledge_of(recorded.header, model, public)
    if adapters is not None:
        knowledge = replace(knowledge, adapt=adapters_of(adapters))
    check_model(recorded, knowledge)
    rows = {} if truth is None else hidden_rows(recorded, read_truth(truth))
    lay_out = with_answers if attack.aim is Aim.LABELS else with_places
    evidence, laid = lay_out(recorded.evidence, rows)
    began_s = time.monotonic()
    guesses = attack.reconstruct(evidence, knowledge, effort)
    seconds = time.monotonic() - began_s
    hidden = hidden_rounds(recorded, rows) if attack.aim is Aim.BAG else laid
    score = None if truth is None else _score(attack.aim, guesses, hidden, knowledge)
    return AttackRun(
        attack=name,
        aim=attack.aim,
        about=attack.about,
        threat=str(knowledge.threat),
        rule=knowledge.rule.label,
        num_observations=len(recorded.evidence.observations),
        num_updates=len(recorded.evidence.updates),
        guesses=tuple(guesses),
        score=score,
        seconds=seconds,
    )


def knowledge_of(
    header: RecordingHeader, model: ModelFolder, public: Sequence[Sequence[int]] = ()
) -> Knowledge:
    """What the attacker of a recording knows: its cut and rules, and the public model.

    Raises:
        ProtocolError: the header names no cut.
        ConfigError: rules that this software does not know.
    """
    lower, upper = header.spec.get("lower"), header.spec.get("upper")
    if not isinstance(lower, int) or not isinstance(upper, int):
        raise ProtocolError("the recording's header names no cut; record again")
    rules = {key: value for key, value in header.rules.items() if value is not None}
    noise = parse_settings(NoiseSettings, rules, "the recording's noise rules")
    return Knowledge(
        folder=model,
        cut=Cut(lower, upper),
        rule=noise.activation_rule(),
        gradient_rule=noise.gradient_rule(),
        public_rows=public,
    )


def public_rows(path: Path, model: ModelFolder) -> list[list[int]]:
    """Token rows of a text file, one row a line.

    Raises:
        DataError: it cannot be read or has no text.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"cannot read public text {path}: {error.strerror}") from error
    tokenizer = model.tokenizer()
    rows = [tokenizer.encode(line, add_special_tokens=False) for line in lines if line.strip()]
    if not rows:
        raise DataError(f"{path} has no text; give public text, one row a line")
    return [list(row[:_MAX_PUBLIC_TOKENS]) for row in rows]


def _score(
    aim: Aim, guesses: Sequence[Guess], hidden: Mapping[int, Hidden], knowledge: Knowledge
) -> Score:
    tokenizer = knowledge.tokenizer
    scorer = Scorer(
        text_of=lambda tokens: str(tokenizer.decode(list(tokens))),
        public_rows=knowledge.public_rows,
        vocab_size=knowledge.embedding_VD.shape[0],
    )
    return scorer.score(aim, [guess for guess in guesses if guess.number in hidden], hidden)
