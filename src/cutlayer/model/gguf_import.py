"""Turn a GGUF file into a Hugging Face model folder, once, in a cache.

It does not keep the quantisation: weights become float32. It does not guess: an architecture,
tensor or RoPE scaling that it cannot carry over exactly is refused.
"""

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, ReaderTensor, get_tensor_name_map
from gguf.quants import dequantize
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cutlayer.errors import ModelError
from cutlayer.model.families import meta_model
from cutlayer.model.tensor_file import write_tensor_file
from cutlayer.storage.files import explain_os_errors, replace_folder

__all__ = ["ARCHITECTURES", "import_gguf"]

_LAYOUT_VERSION = 1
"""Part of the cache key; raise it when a conversion's result changes."""

_ROPE_FACTORS = "rope_freqs.weight"

T = TypeVar("T")
Undo = Callable[[str, Tensor, PreTrainedConfig], Tensor]


def _unchanged(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    return tensor


def _undo_permutation(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """llama.cpp interleaves the two RoPE halves of every head's q and k rows; put them back."""
    num_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    heads = num_heads.get(name.split(".")[-2])
    if heads is None:
        return tensor
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


ARCHITECTURES: dict[str, Undo] = {
    "llama": _undo_permutation,
    "qwen2": _unchanged,
    "qwen3": _unchanged,
}
"""GGUF architecture -> what llama.cpp's converter did to a tensor, undone."""


def import_gguf(path: Path, cache_folder: Path) -> Path:
    """The model folder made of a GGUF file; converted at the first call, found again later.

    Args:
        path: the .gguf file.
        cache_folder: where conversions are kept, one folder per file content.

    Raises:
        ModelError: no GGUF file, damaged, or of an architecture that is not known.
        StorageError: the cache cannot be written.
    """
    if not path.is_file():
        raise ModelError(f"{path} is not a file; check the path of the GGUF model")
    with explain_os_errors(f"read {path}"), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with explain_os_errors(f"create {cache_folder}"):
        cache_folder.mkdir(parents=True, exist_ok=True)
    target = cache_folder / f"{digest}-v{_LAYOUT_VERSION}"
    with _locked(cache_folder / f"{digest}.lock"):
        if not target.is_dir():
            reader = _open(path)
            replace_folder(target, lambda folder: _convert(reader, path, folder))
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two processes that start together convert once; the second waits and finds the result."""
    with explain_os_errors(f"lock {path}"):
        file = path.open("wb")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise ModelError(
            f"{path} is not a GGUF file or is truncated ({error}); download it again"
        ) from error


def _convert(reader: GGUFReader, path: Path, folder: Path) -> None:
    architecture = _text(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(
            f"{path} has GGUF architecture {architecture!r}; known are {known}; "
            "convert others to safetensors with their own tools"
        )
    _refuse_rope_scaling(reader, path, architecture)
    config = _read_config(reader, path, architecture)
    _restore_rope_factors(reader, path, config)
    layout = _expected_layout(config)
    config.architectures = [_model_class_name(config)]
    names = _names(reader, path, architecture, config, layout)
    write_tensor_file(
        folder / "model.safetensors",
        {name: layout[name] for name in names},
        lambda name: _tensor(names[name], ARCHITECTURES[architecture], config, path),
    )
    config.save_pretrained(folder)
    _read_tokenizer(reader, path).save_pretrained(folder)


def _read_config(reader: GGUFReader, path: Path, architecture: str) -> PreTrainedConfig:
    config = _through_transformers(AutoConfig.from_pretrained, path, "config")
    # The file's name for the model would otherwise travel as a config field.
    vars(config).pop("_model_name_or_path", None)
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise ModelError(f"{path} has no token_embd.weight; it is no language model")
    config.vocab_size = int(embedding.shape[1])
    head_size = _text(reader, f"{architecture}.attention.key_length")
    if head_size and hasattr(config, "head_dim"):
        config.head_dim = int(head_size)
    config.dtype = torch.float32
    return config


def _read_tokenizer(reader: GGUFReader, path: Path) -> PreTrainedTokenizerBase:
    tokenizer = _through_transformers(AutoTokenizer.from_pretrained, path, "tokenizer")
    pre_tokenizer = PRE_TOKENIZERS.get(_text(reader, "tokenizer.ggml.pre"))
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def _through_transformers(load: Callable[..., T], path: Path, what: str) -> T:
    try:
        return load(
            str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"cannot read the {what} of {path}: {error}") from error


def _expected_layout(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Names and shapes of the checkpoint, as meta tensors in float32, without a tied LM head."""
    model = meta_model(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: t for name, t in model.state_dict().items() if name not in tied}


def _model_class_name(config: PreTrainedConfig) -> str:
    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)


def _names(
    reader: GGUFReader,
    path: Path,
    architecture: str,
    config: PreTrainedConfig,
    layout: dict[str, Tensor],
) -> dict[str, ReaderTensor]:
    """Checkpoint name -> the file's tensor; every one of both sides is used, shapes agree."""
    kind = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    name_map = get_tensor_name_map(kind, config.num_hidden_layers)
    wanted = {name_map.get_name(name, try_suffixes=(".weight", ".bias")): name for name in layout}
    found = {tensor.name: tensor for tensor in reader.tensors if tensor.name != _ROPE_FACTORS}
    if missing := sorted(str(name) for name in wanted.keys() - found.keys()):
        raise ModelError(f"{path} lacks the tensors {missing}; download it again")
    if extra := sorted(found.keys() - wanted.keys()):
        raise ModelError(
            f"{path} has tensors that {architecture} has no place for: {extra}; "
            "convert it to safetensors with its own tools"
        )
    for gguf_name, name in wanted.items():
        shape = tuple(int(size) for size in reversed(found[gguf_name].shape))
        if shape != tuple(layout[name].shape):
            raise ModelError(f"{path}: {gguf_name} is {shape}, not {tuple(layout[name].shape)}")
    return {name: found[gguf_name] for gguf_name, name in wanted.items()}


def _tensor(source: ReaderTensor, undo: Undo, config: PreTrainedConfig, path: Path) -> Tensor:
    try:
        values = dequantize(source.data, source.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"{path}: cannot dequantise {source.name}: {error}") from error
    # A copy, because unquantised values are a read-only view of the file.
    shape = [int(size) for size in reversed(source.shape)]
    return undo(source.name, torch.tensor(values).float().reshape(shape), config).contiguous()


def _refuse_rope_scaling(reader: GGUFReader, path: Path, architecture: str) -> None:
    scaling = _text(reader, f"{architecture}.rope.scaling.type")
    if scaling not in ("", "none"):
        raise ModelError(
            f"{path} scales RoPE by {scaling!r}, which GGUF import does not carry over; "
            "use the model's safetensors folder"
        )


def _restore_rope_factors(reader: GGUFReader, path: Path, config: PreTrainedConfig) -> None:
    """Llama 3 stretches RoPE; GGUF keeps the factors per frequency instead of the rule.

    The published rule is put back with the largest factor, and must give the file's factors.
    """
    source = next((t for t in reader.tensors if t.name == _ROPE_FACTORS), None)
    if source is None:
        return
    factors = torch.tensor(dequantize(source.data, source.tensor_type)).float()
    rule = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config.rope_parameters = {**config.rope_parameters, **rule}
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    exponents = torch.arange(len(stretched)) / len(stretched)
    expected = config.rope_parameters["rope_theta"] ** -exponents / stretched
    if expected.shape != factors.shape or not torch.allclose(expected, factors, rtol=1e-4):
        raise ModelError(
            f"{path} has {_ROPE_FACTORS} that do not follow Llama 3's rule; "
            "use the model's safetensors folder"
        )


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _split_then_bytes(pattern: str) -> PreTokenizer:
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([Split(Regex(pattern), behavior="isolated"), byte_level])


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "llama-bpe": _split_then_bytes(_CONTRACTION + _WORDS + r"|\p{N}{1,3}" + _REST),
    "qwen2": _split_then_bytes(_CONTRACTION + _WORDS + r"|\p{N}" + _REST),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
}
"""GGUF's name of a word splitter -> that splitter; GGUF stores the name alone, and transformers
falls back to GPT-2's, which splits digits differently."""
