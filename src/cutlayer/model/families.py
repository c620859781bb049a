"""What differs per architecture, and where a model of the usual layout keeps its pieces.

It does not run or load models. Nothing else knows a family's name. A family that is not in the
table is cut by the usual layout; what the layout cannot explain is refused by name.
"""

import copy
import inspect
import re
import threading
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cutlayer.errors import ModelError

__all__ = [
    "FAMILIES",
    "Family",
    "Layout",
    "build_buffers",
    "enter_unchanged",
    "family_of",
    "meta_model",
    "read_layout",
    "rotates_by_batch",
    "slice_config",
    "windows",
]

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")
ROTARY = re.compile(r"rotary|rope", re.IGNORECASE)
ATTENDING_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
SCALE = "scalar_embed_scale"
BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
MIXERS = re.compile(r"Mamba|Recurrent|DeltaNet|LinearAttention|ShortConv|Indexer|Lightning")
"""Class names of modules that carry something from token to token besides attention."""
PER_BLOCK_FIELDS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Config lists with one entry per block that base models read while they run."""
_ONE_AT_A_TIME = threading.Lock()
"""Building a model, transformers replaces defaults of the whole process and puts them back; two
at once could put back each other's."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table."""

    neutral: Mapping[str, float] = field(default_factory=dict)
    """Attributes of the base model that later parts set, so that hidden states enter unchanged."""
    positions: str | None = None
    """Learned positions that the base model adds to whatever enters it; zero in later parts."""
    refused: str | None = None
    """Why it cannot be cut, where the layout alone would not show it."""


_SCALED = Family(neutral={"embedding_multiplier": 1.0})

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(positions="wpe"),
    "granite": _SCALED,
    "granitemoe": _SCALED,
    "granitemoeshared": _SCALED,
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a causal LM keeps its pieces; names are those of the transformers modules."""

    prefix: str
    """Of the base model within the causal LM: "model", "transformer"..."""
    embedding: str
    """Of the token embedding within the base model."""
    blocks: str
    """Of the block list within the base model."""
    norm: str
    """Of the final norm within the base model."""
    lm_head: str
    """Of the LM head within the causal LM."""
    attention: str
    """The attention implementation that transformers chooses for the unsplit model."""


def family_of(config: PreTrainedConfig) -> Family:
    """The table's row for a config, or that of a model of the usual layout."""
    return FAMILIES.get(config.model_type, Family())


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The whole causal LM without memory: every tensor is float32, on the meta device.

    Raises:
        ModelError: the config is no decoder-only model that transformers knows.
    """
    _check_config(config)
    try:
        with _ONE_AT_A_TIME, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=False, dtype=torch.float32
            )
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"transformers cannot build {config.model_type!r}: {error}") from error
    return cast(PreTrainedModel, model.eval())


def read_layout(model: PreTrainedModel) -> Layout:
    """Find the pieces of a causal LM by the usual layout.

    Raises:
        ModelError: names what is missing, or what it has that no part would own.
    """
    base, prefix = _base_of(model)
    blocks = _blocks_of(base, model.config.num_hidden_layers)
    _check_mixing(getattr(base, blocks))
    layout = Layout(
        prefix=prefix,
        embedding=_name_of(base, base.get_input_embeddings(), "token embedding"),
        blocks=blocks,
        norm=_norm_of(base),
        lm_head=_name_of(model, model.get_output_embeddings(), "LM head"),
        attention=str(model.config._attn_implementation),
    )
    owned = {layout.embedding, layout.blocks, layout.norm, family_of(model.config).positions}
    _check_leftovers(base, owned)
    _check_leftovers(model, {prefix, layout.lm_head})
    return layout


def windows(config: PreTrainedConfig) -> list[int | None] | None:
    """Every block's sliding window in tokens; None where only the attention modules know it."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return None
    window = getattr(config, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in layer_types]


def slice_config(config: PreTrainedConfig, blocks: range) -> None:
    """Make a config, in place, say that the model has these blocks only."""
    for name in PER_BLOCK_FIELDS:
        values = getattr(config, name, None)
        if isinstance(values, list | tuple) and len(values) == config.num_hidden_layers:
            setattr(config, name, list(values[blocks.start : blocks.stop]))
    config.num_hidden_layers = len(blocks)


def enter_unchanged(base: nn.Module, family: Family) -> None:
    """Make the base model of a later part pass hidden states to its first block as they are."""
    for name, value in family.neutral.items():
        setattr(base, name, value)
    if family.positions is not None:
        setattr(base, family.positions, NoPositions())
    for name, child in list(base.named_children()):
        # On a base model itself it is the embedding's dropout, which the head has applied.
        if isinstance(child, nn.Dropout):
            setattr(base, name, nn.Identity())


def rotates_by_batch(config: PreTrainedConfig) -> int | None:
    """The length from which rotary frequencies depend on the longest row of a call, if any.

    Such rows must not share a call, or a long row changes its neighbours.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    if not any(item.get("rope_type") in BATCH_DEPENDENT_ROPE for item in nested):
        return None
    original = getattr(config, "original_max_position_embeddings", None)
    found = [item.get("original_max_position_embeddings") or original for item in nested]
    return min([int(length) for length in found if length], default=0)


def build_buffers(base: nn.Module, config: PreTrainedConfig, device: torch.device) -> None:
    """Make what a checkpoint does not hold: rotary frequencies, embedding scales.

    Raises:
        ModelError: names a buffer that cutlayer does not know how to make.
    """
    for path, module in list(base.named_modules()):
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                _build_buffer(base, path, name, config, device)


class NoPositions(nn.Module):
    """Learned positions of a later part: the head has added them."""

    def forward(self, positions: Tensor, *_: object, **__: object) -> Tensor:
        """Zero, whatever the positions."""
        return torch.zeros((), device=positions.device)


def _check_config(config: PreTrainedConfig) -> None:
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(f"{kind} is an encoder-decoder; cutlayer cuts decoder-only models")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"this {kind} checkpoint is quantised; dequantise it first")
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ModelError(f"the config of {kind} has no num_hidden_layers; is it a text model?")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENDING_LAYER_TYPES)
    if others:
        raise ModelError(
            f"{kind} has blocks of type {', '.join(others)}; cutlayer cuts models whose blocks "
            f"all attend ({', '.join(sorted(ATTENDING_LAYER_TYPES))})"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(f"{kind} shares keys and values between blocks; a cut would part them")
    if reason := family_of(config).refused:
        raise ModelError(f"{kind} cannot be cut: {reason}")


def _base_of(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    kind, prefix = model.config.model_type, model.base_model_prefix
    base = getattr(model, prefix, None)
    if not isinstance(base, PreTrainedModel):
        raise ModelError(f"{kind} has no base model {prefix!r}; cutlayer cannot cut it")
    # A class attribute of every transformers model, without a public reader.
    if model._is_stateful or not model._supports_attention_backend:
        what = "keeps a recurrent state" if model._is_stateful else "has attention of its own"
        raise ModelError(f"{kind} {what}; cutlayer needs transformers' attention interface")
    missing = {"inputs_embeds", "position_ids"} - inspect.signature(base.forward).parameters.keys()
    if missing:
        raise ModelError(f"the base model of {kind} does not take {', '.join(sorted(missing))}")
    return base, prefix


def _name_of(parent: nn.Module, child: nn.Module | None, what: str) -> str:
    for name, module in parent.named_children():
        if module is child:
            return name
    raise ModelError(f"{type(parent).__name__} has no {what} of its own; cutlayer cannot cut it")


def _blocks_of(base: nn.Module, num_blocks: int) -> str:
    names = [
        name
        for name, child in base.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_blocks
    ]
    if len(names) != 1:
        found = f"{len(names)} lists of {num_blocks} blocks"
        raise ModelError(f"{type(base).__name__} has {found}; cutlayer needs exactly one")
    return names[0]


def _norm_of(base: nn.Module) -> str:
    for name in FINAL_NORMS:
        if isinstance(getattr(base, name, None), nn.Module):
            return name
    raise ModelError(
        f"{type(base).__name__} has no final norm under any of {', '.join(FINAL_NORMS)}"
    )


def _check_leftovers(parent: nn.Module, owned: Container[str | None]) -> None:
    for name, child in parent.named_children():
        if name not in owned and any(True for _ in child.parameters()):
            raise ModelError(
                f"{type(parent).__name__}.{name} holds weights that belong to no part; "
                "cutlayer needs a table entry for this architecture"
            )
    for name, _ in parent.named_parameters(recurse=False):
        raise ModelError(f"{type(parent).__name__}.{name} is a weight that belongs to no part")


def _check_mixing(blocks: nn.Module) -> None:
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Conv1d) or MIXERS.search(type(module).__name__):
            raise ModelError(
                f"block module {name} ({type(module).__name__}) mixes tokens without attention; "
                "cutlayer cuts models whose blocks attend only"
            )


def _build_buffer(
    base: nn.Module, path: str, name: str, config: PreTrainedConfig, device: torch.device
) -> None:
    module = base.get_submodule(path)
    if ROTARY.search(type(module).__name__):
        # From the whole config: a part's own may lack some kinds of layers.
        base.set_submodule(path, type(module)(config).to(device))
    elif name == "embed_scale" and isinstance(scale := getattr(module, SCALE, None), int | float):
        module.embed_scale = torch.tensor(float(scale), device=device)
    else:
        raise ModelError(
            f"{type(base).__name__}.{path}.{name} is not in the checkpoint and cutlayer does not "
            "know how to make it; it needs a table entry for this architecture"
        )
