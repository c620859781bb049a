"""Numbers of training that every method shares, so that methods differ in nothing else.

It trains nothing. The unsplit script (`centralised`) gets the same numbers in its request.
"""

from pathlib import Path

from cutlayer.client.settings import Schedule, TrainSettings
from cutlayer.data.assets import fetch
from cutlayer.data.batches import BatchPlan
from cutlayer.errors import ConfigError
from cutlayer.model.adapter_settings import AdapterSettings, PrefixSettings
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.model.optimizer import AdamWSettings
from cutlayer.suite.spec import RunSpec

__all__ = [
    "ALPHA",
    "CLIP_NORM",
    "MAX_LENGTH",
    "NUM_VIRTUAL_TOKENS",
    "RANK",
    "adapter_settings",
    "batch_plan",
    "max_length",
    "open_model",
    "train_settings",
]

RANK = 8
"""Of LoRA, on all linear layers of the blocks."""
ALPHA = 16.0
"""Of LoRA."""
NUM_VIRTUAL_TOKENS = 16
"""Vectors of a prefix."""
CLIP_NORM = 1.0
"""Largest norm of a step's mean gradient, over the adapters of all parts."""
MAX_LENGTH = 1024
"""Tokens of a training row at most; of a longer one its prompt is cut at the start."""

_ASSET = "asset:"


def adapter_settings(spec: RunSpec) -> AdapterSettings:
    """What is trained.

    Raises:
        ConfigError: no such kind of adapter.
    """
    known = ("lora", "prefix", "sparse")
    if spec.adapter not in known:
        raise ConfigError(f"adapter {spec.adapter!r} is unknown; choose one of {', '.join(known)}")
    return AdapterSettings.model_validate(
        {
            "kinds": [spec.adapter],
            "rank": RANK,
            "alpha": ALPHA,
            "seed": spec.seed,
            "prefix": PrefixSettings(num_virtual_tokens=NUM_VIRTUAL_TOKENS),
        }
    )


def train_settings(spec: RunSpec) -> TrainSettings:
    """How one owner who has all rows trains: AdamW at a constant rate, saved once at the end."""
    sizes = spec.sizes
    return TrainSettings(
        steps=sizes.steps,
        rows_per_step=sizes.rows_per_step,
        micro_batch_rows=sizes.micro_batch_rows,
        lr=sizes.lr,
        schedule=Schedule.CONSTANT,
        clip_norm=CLIP_NORM,
        optimizer=AdamWSettings(),
        save_every=sizes.steps,
        seed=spec.seed,
    )


def batch_plan(spec: RunSpec, num_rows: int) -> BatchPlan:
    """The rows of every step, as `client.schedule.batch_plan` has them for `train_settings`."""
    sizes = spec.sizes
    return BatchPlan(
        num_rows=num_rows,
        rows_per_step=min(sizes.rows_per_step, num_rows),
        seed=spec.seed,
        steps=sizes.steps,
        micro_batch_rows=sizes.micro_batch_rows,
    )


def max_length(spec: RunSpec, context_length: int) -> int:
    """Tokens of a training row at most, for `DataSettings.max_length`.

    Args:
        spec: the run; some kinds of adapters take positions of the context.
        context_length: of the model.
    """
    return min(MAX_LENGTH, context_length - adapter_settings(spec).num_positions)


def open_model(spec: RunSpec, cache: Path | None) -> ModelFolder:
    """The run's model; `path` of what comes back is a folder that transformers reads too.

    Args:
        spec: its `model` is a folder, GGUF file, hub id or asset:NAME.
        cache: of assets and converted models; None is the usual one.

    Raises:
        ModelError: nothing of that name, or it cannot be read.
        ConfigError: no such asset.
        TransportError: an asset cannot be fetched.
    """
    name: str | Path = spec.model
    if spec.model.startswith(_ASSET):
        name = fetch(spec.model.removeprefix(_ASSET), cache)
    return resolve_model(name, cache_folder=cache)
