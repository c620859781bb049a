"""A prefix as the folder that PEFT reads as PREFIX_TUNING. It does not join parts (`export`).

Shapes: P = vectors per block, L = blocks, H = key-value heads, E = width of a head.
"""

import json
from pathlib import Path

import torch
from peft import PrefixTuningConfig, TaskType
from torch import Tensor

from cutlayer.errors import ModelError
from cutlayer.model.adapter_settings import AdapterSettings
from cutlayer.model.adapters import AdapterState
from cutlayer.model.exported_base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ExportedBase
from cutlayer.model.prefix import PREFIX_KEY
from cutlayer.model.tensor_file import write_tensor_file

__all__ = ["check_prefix", "write_prefix"]


def check_prefix(state: AdapterState, settings: AdapterSettings) -> None:
    """Refuse a state that is no prefix of these settings over all blocks from the first.

    Raises:
        ModelError: a block is missing, or the settings have another length.
    """
    vectors = _by_block(state)
    missing = sorted(set(range(max(vectors, default=0) + 1)) - vectors.keys())
    if missing or not vectors:
        raise ModelError(
            f"the prefix has no vectors for block {(missing or [0])[0]}; PEFT's format has them "
            "for every block: train all parts (adapter.parts)"
        )
    lengths = {len(values) for values in state.values()}
    if lengths != {settings.prefix.num_virtual_tokens}:
        raise ModelError(f"the prefix has {sorted(lengths)} vectors; give its own settings")


def write_prefix(
    folder: Path, state: AdapterState, settings: AdapterSettings, base: ExportedBase
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    PEFT keeps one tensor [P, L * 2 * H * E]: keys and values of the first block, of the second...

    Raises:
        ModelError: the base model has other blocks.
    """
    vectors, model = _by_block(state), base.files().config
    if len(vectors) != model.num_hidden_layers:
        raise ModelError(
            f"the prefix is of {len(vectors)} blocks, {base.name} has {model.num_hidden_layers}; "
            "PEFT's format has vectors for every block: train all parts (adapter.parts)"
        )
    width = vectors[0][0].shape[1]
    num_heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base.name,
        inference_mode=True,
        num_virtual_tokens=settings.prefix.num_virtual_tokens,
        num_layers=len(vectors),
        num_attention_heads=num_heads,
        num_transformer_submodules=1,
        token_dim=width,
        encoder_hidden_size=width,
        prefix_projection=False,
    )
    config.save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG
    table = json.loads(path.read_bytes())
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    joined = torch.cat([states for block in sorted(vectors) for states in vectors[block]], dim=1)
    tensors = {"prompt_embeddings": joined.contiguous()}
    write_tensor_file(folder / ADAPTER_WEIGHTS, tensors, tensors.__getitem__)


def _by_block(state: AdapterState) -> dict[int, tuple[Tensor, Tensor]]:
    """Global block -> keys and values [P, H * E]."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, values in state.items():
        match = PREFIX_KEY.fullmatch(key)
        if match is None:
            raise ModelError(f"the adapter state has {key}, which is no vector of a prefix")
        found.setdefault(int(match["block"]), {})[key.rpartition("_")[2]] = values
    for block, both in found.items():
        if len(both) != 2:
            raise ModelError(f"the prefix of block {block} has only its {min(both)}")
    return {block: (both["key"], both["value"]) for block, both in found.items()}
