"""Tiny random models of many families, saved the way a hub folder looks.

It does not cut, load or train them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

__all__ = [
    "EXTRA_FAMILIES",
    "FAMILIES",
    "edit_config",
    "save_tokenizer",
    "tiny_llama_folder",
    "tiny_model",
]

NUM_BLOCKS = 4
SLIDING_WINDOW = 6
VOCAB_SIZE = 264
"""256 bytes and room for the special tokens."""

SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

COMMON: dict[str, object] = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}

ALTERNATING = ["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2)

FAMILIES: dict[str, Mapping[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING_WINDOW, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ALTERNATING,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "phi3": {"sliding_window": SLIDING_WINDOW},
    "gpt2": {"num_key_value_heads": None, "n_inner": 48, "intermediate_size": None},
    "gpt_neox": {"num_key_value_heads": None},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "tie_word_embeddings": True,
    },
}
"""What each family needs beyond `COMMON`; None drops a key that the family does not know."""

ROUTED: dict[str, object] = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "shared_expert_intermediate_size": 16,
}
LATENT: dict[str, object] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
}
HEADS: dict[str, object] = {"head_dim": 8}
WINDOWED: dict[str, object] = {
    **HEADS,
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ALTERNATING,
}

EXTRA_FAMILIES: dict[str, Mapping[str, object]] = {
    "arcee": HEADS,
    "cohere": {},
    "cohere2": WINDOWED,
    "deepseek_v2": {**LATENT, **ROUTED, "topk_method": "greedy"},
    "deepseek_v3": {**LATENT, **ROUTED},
    "dots1": {**ROUTED, **HEADS, "n_shared_experts": 1},
    "ernie4_5": HEADS,
    "ernie4_5_moe": {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2},
    "exaone4": WINDOWED,
    "gemma": HEADS,
    "gemma4_text": {
        **WINDOWED,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**ROUTED, **HEADS},
    "glm4_moe_lite": {**LATENT, **ROUTED},
    "gpt_oss": {**WINDOWED, **ROUTED},
    "granitemoe": ROUTED,
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 4},
    "minicpm3": LATENT,
    "minimax_m2": {**ROUTED, **HEADS},
    "ministral": {**HEADS, "sliding_window": SLIDING_WINDOW},
    "mixtral": {**ROUTED, **HEADS, "sliding_window": SLIDING_WINDOW},
    "olmo": {},
    "olmo3": {"sliding_window": SLIDING_WINDOW, "layer_types": ALTERNATING},
    "olmoe": ROUTED,
    "persimmon": {},
    "phi": {},
    "phimoe": ROUTED,
    "qwen2_moe": ROUTED,
    "qwen3_moe": {**ROUTED, **HEADS},
    "seed_oss": HEADS,
    "solar_open": {**ROUTED, **HEADS},
    "starcoder2": {"sliding_window": SLIDING_WINDOW},
    "vaultgemma": {**WINDOWED, "query_pre_attn_scalar": 8},
}
"""Families without a table entry or a promise, cut by the usual layout alone."""


def tiny_model(
    family: str, tmp_path: Path, seed: int = 0, **changes: object
) -> tuple[Path, PreTrainedModel]:
    """A random model of one family and the folder that it was saved to, tokenizer included.

    Args:
        family: a key of `FAMILIES` or `EXTRA_FAMILIES` (the config's `model_type`).
        tmp_path: where the folder is made.
        seed: of all weights; biases and norms are random too, so that none is a no-op.
        changes: of the config.
    """
    torch.manual_seed(seed)
    special = FAMILIES[family] if family in FAMILIES else EXTRA_FAMILIES[family]
    settings = {k: v for k, v in {**COMMON, **special, **changes}.items() if v is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    _stir(model)
    folder = tmp_path / f"tiny-{family}"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder, model


def tiny_llama_folder(tmp_path: Path, seed: int = 0) -> Path:
    """The folder of a tiny random llama with a byte-level tokenizer and a chat template."""
    return tiny_model("llama", tmp_path, seed)[0]


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer (ids 0..255 are the bytes' symbols) with a chat template."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def edit_config(folder: Path, **changes: object) -> None:
    """Overwrite keys of a saved `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
