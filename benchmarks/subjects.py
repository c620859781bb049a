"""What the benchmarks run on: a model folder and rows of token ids, made or fetched.

It measures nothing. Rows are random token ids: time and bytes do not depend on their meaning.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "equal_rows",
    "ragged_rows",
    "subject_folder",
    "write_small_llama",
    "write_text_llama",
    "write_tiny_llama",
]


_END = "<|end|>"


def write_text_llama(folder: Path) -> Path:
    """As `write_tiny_llama`, with a tokenizer whose tokens are bytes; returns the folder."""
    write_tiny_llama(folder, vocab_size=264)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)
    fast.save_pretrained(folder)
    return folder


def write_tiny_llama(
    folder: Path, *, num_blocks: int = 6, hidden_size: int = 64, vocab_size: int = 256
) -> Path:
    """Write a random Llama of a few blocks as a plain model folder, and return the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_small_llama(folder: Path) -> Path:
    """Write a random Llama of 15 million parameters as a plain model folder; returns the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def subject_folder(model: str | None, *, is_smoke: bool, work_folder: Path) -> Path:
    """The model to measure.

    Args:
        model: a local folder, a GGUF file or a hub id; None takes the profile's own.
        is_smoke: the profile's own model is a tiny random one, without any download.
        work_folder: where a tiny model is written.
    """
    if model is None and is_smoke:
        return write_tiny_llama(work_folder / "tiny-llama")
    # Imported late: the smoke profile needs no asset and no network.
    from cutlayer.data.assets import fetch
    from cutlayer.model.folder import resolve_model

    return Path(resolve_model(model or fetch("smollm2")).path)


def equal_rows(num_rows: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random rows of one length."""
    return ragged_rows([length] * num_rows, vocab_size, seed)


def ragged_rows(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random rows of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]
