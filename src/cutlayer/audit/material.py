"""What an audit works on: the owner's rows, held-out rows, canaries, and public text.

It runs and attacks nothing.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cutlayer.audit.live import Material
from cutlayer.audit.planted import plant
from cutlayer.audit.settings import AuditPlan
from cutlayer.audit.trial import Bench
from cutlayer.audit.utility import questions
from cutlayer.client.settings import ClientSettings
from cutlayer.data.assets import ASSETS, fetch
from cutlayer.data.load import Dataset, load_dataset
from cutlayer.data.settings import DataSettings
from cutlayer.data.template import NOT_SCORED, Example, RowLimits
from cutlayer.errors import ConfigError, DataError
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.storage.files import explain_os_errors

__all__ = ["make_bench", "public_tokens", "resolve"]

_ASSET = "asset:"
_MIN_PUBLIC_TOKENS, _MAX_PUBLIC_TOKENS = 4, 64
_MAX_FILE_CHARACTERS = 20_000
_TEXT = ".txt"
_PLANTS = "canary_extraction"
"""The attack for which canaries are planted in a fine-tune."""
_NUM_OTHERS = 200


def resolve(path: str, revision: str | None = None) -> ModelFolder:
    """The model; `asset:NAME` is fetched first."""
    if path.startswith(_ASSET):
        return resolve_model(_fetched(path))
    return resolve_model(path, revision)


def make_bench(
    plan: AuditPlan, client: ClientSettings, model: ModelFolder, names: Sequence[str]
) -> Bench:
    """Everything that the trials of an audit share.

    Args:
        plan: of the audit.
        client: the owner's settings, `on_this_machine`.
        model: both sides'.
        names: attacks.

    Raises:
        DataError: no row, or no private token to attack.
        ConfigError: the client's settings name no data.
    """
    tokenizer = model.tokenizer()
    dataset = _dataset(client.data, model, tokenizer)
    rows = _chosen(dataset.train, plan)
    heldout = dataset.validation[: plan.utility_rows]
    canaries = _canaries(plan, tokenizer, 1 + max(e.row_id for e in _all(dataset)))
    digits = [_secret(canary) for canary in canaries]
    planted = plant(canaries, _other_secrets(tokenizer)) if _PLANTS in names and canaries else None
    material = Material(
        plan=plan,
        client=client,
        rows=[*rows, *canaries],
        heldout=heldout,
        asked=questions(heldout, dataset.train),
        planted=() if planted is None else planted.rows,
    )
    public = [] if plan.public is None else public_tokens(plan, client.data, model, tokenizer)
    return Bench(
        material=material,
        model=model,
        names=names,
        public_rows=public,
        template=_common_end(rows),
        canaries=digits,
        planted=planted,
    )


def public_tokens(
    plan: AuditPlan,
    data: DataSettings | None,
    model: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """Rows of public text.

    Raises:
        DataError: there is none at that place.
        TransportError: an asset cannot be fetched.
    """
    assert plan.public is not None
    place = _fetched(plan.public) if plan.public.startswith(_ASSET) else Path(plan.public)
    texts = _texts(place)
    if texts or data is None:
        rows = list(islice(_token_rows(texts, tokenizer), plan.public_rows))
    else:
        only = data.model_copy(update={"train": place, "validation": None})
        found = _dataset(only.model_copy(update={"validation_fraction": 0.0}), model, tokenizer)
        rows = [example.tokens for example in found.train[: plan.public_rows]]
    if not rows:
        raise DataError(f"audit.public={plan.public}: no text there; name text or data files")
    return rows


def _dataset(
    data: DataSettings | None, model: ModelFolder, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    if data is None:
        raise ConfigError("the client's settings have no [data] section: nothing to audit with")
    config = model.config
    limits = RowLimits(context_length=config.max_position_embeddings, vocab_size=config.vocab_size)
    return load_dataset(data, tokenizer, limits)


def _all(dataset: Dataset) -> Iterator[Example]:
    yield from dataset.train
    yield from dataset.validation


def _chosen(rows: Sequence[Example], plan: AuditPlan) -> list[Example]:
    """The first rows, and more up to the wanted number of private tokens."""
    chosen: list[Example] = []
    num_tokens = 0
    for row in rows:
        if len(chosen) >= plan.rows and num_tokens >= plan.min_tokens:
            break
        chosen.append(row)
        num_tokens += sum(row.is_private or [True] * len(row.tokens))
    if not num_tokens:
        raise DataError("there is no private token to attack: every row is the template's own text")
    return chosen


def _canaries(plan: AuditPlan, tokenizer: PreTrainedTokenizerBase, first_id: int) -> list[Example]:
    """Rows with a random number each; only the number is private."""
    generator = random.Random(f"canaries {plan.seed}")
    made = []
    for place in range(plan.canaries):
        start = tokenizer.encode("My account number is", add_special_tokens=False)
        secret = tokenizer.encode(_digits(generator), add_special_tokens=False)
        # What is scored is predicted from a public token: that leaves whatever is withheld.
        end = tokenizer.encode(". Thank you", add_special_tokens=False)
        tokens = [*start, *secret, *end]
        labels = [NOT_SCORED] * (len(tokens) - 1) + tokens[-1:]
        flags = [False] * len(start) + [True] * len(secret) + [False] * len(end)
        made.append(
            Example(tokens=tokens, labels=labels, row_id=first_id + place, is_private=flags)
        )
    return made


def _digits(generator: random.Random) -> str:
    return "".join(f" {generator.randrange(100):02}" for _ in range(6))


def _other_secrets(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of the same form, as an attacker would make some to learn it."""
    generator = random.Random("the form of canaries")
    return [
        tokenizer.encode(_digits(generator), add_special_tokens=False) for _ in range(_NUM_OTHERS)
    ]


def _secret(canary: Example) -> list[int]:
    pairs = zip(canary.tokens, canary.is_private, strict=True)
    return [token for token, is_private in pairs if is_private]


def _common_end(rows: Sequence[Example]) -> list[int]:
    """Tokens of the template that end every row."""
    common: list[int] = []
    for column in zip(*(_reversed(row) for row in rows), strict=False):
        if len(set(column)) > 1 or column[0][1]:
            break
        common.append(column[0][0])
    return common[::-1]


def _reversed(row: Example) -> list[tuple[int, bool]]:
    flags = row.is_private or [True] * len(row.tokens)
    return list(zip(row.tokens, flags, strict=True))[::-1]


def _fetched(place: str) -> Path:
    name = place.removeprefix(_ASSET)
    if name not in ASSETS:
        raise ConfigError(f"{place}: no such asset; there are {', '.join(sorted(ASSETS))}")
    return fetch(name)


def _texts(place: Path) -> list[Path]:
    """Text files at a place, from all over it; none where it holds data files."""
    with explain_os_errors(f"read {place}"):
        if place.is_dir():
            return sorted(place.rglob(f"*{_TEXT}"), key=lambda path: path.name)
        return [place] if place.suffix == _TEXT else []


def _token_rows(paths: Iterable[Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Paragraphs as rows of tokens, a paragraph of each file in turn."""
    for path in paths:
        with explain_os_errors(f"read {path}"):
            text = path.read_text(encoding="utf-8", errors="replace")[:_MAX_FILE_CHARACTERS]
        for paragraph in text.splitlines():
            tokens = tokenizer.encode(paragraph.strip(), add_special_tokens=False)
            if len(tokens) >= _MIN_PUBLIC_TOKENS:
                yield tokens[:_MAX_PUBLIC_TOKENS]
