"""Client memory for a 7B-shaped model: peak resident set against what it must hold.

`python -m benchmarks.memory --json`. The model is zero weights in a sparse file; the trunk is an
echo; nothing is sent. The measured process is `benchmarks.memory_client`.
"""

import json
import math
import tempfile
from pathlib import Path

import msgspec

from benchmarks.isolate import run_isolated
from benchmarks.memory_client import MemoryRequest, MemoryUse
from benchmarks.report import Arguments, emit, parse_arguments, print_table

__all__ = ["SHAPES", "LlamaShape", "compare", "main", "write_sparse_llama"]

_FILE_DTYPE = "F16"
"""As the published checkpoint; every stated dtype but float16 is converted at load."""
_MEGABYTE = 1e6


class LlamaShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of a Llama model, and the cut that is measured."""

    hidden_size: int
    num_blocks: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    lower: int
    upper: int


SHAPES = {
    "standard": LlamaShape(
        hidden_size=4096,
        num_blocks=32,
        num_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        lower=2,
        upper=30,
    ),
    "smoke": LlamaShape(
        hidden_size=512,
        num_blocks=6,
        num_heads=8,
        intermediate_size=1376,
        vocab_size=4000,
        lower=2,
        upper=4,
    ),
}
"""Shapes by profile; `standard` is Llama-2-7B with p = q = 2."""


def write_sparse_llama(folder: Path, shape: LlamaShape) -> None:
    """Write config.json and model.safetensors with zero weights that take no disk space."""
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for name, dims in _tensor_shapes(shape).items():
        end = offset + 2 * math.prod(dims)
        entries[name] = {"dtype": _FILE_DTYPE, "shape": dims, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    (folder / "config.json").write_text(json.dumps(_config(shape)))


def _tensor_shapes(shape: LlamaShape) -> dict[str, list[int]]:
    hidden, wide = shape.hidden_size, shape.intermediate_size
    block = {
        **{f"self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"},
        "mlp.gate_proj.weight": [wide, hidden],
        "mlp.up_proj.weight": [wide, hidden],
        "mlp.down_proj.weight": [hidden, wide],
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
    }
    blocks = {
        f"model.layers.{index}.{name}": dims
        for index in range(shape.num_blocks)
        for name, dims in block.items()
    }
    ends = {
        "model.embed_tokens.weight": [shape.vocab_size, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [shape.vocab_size, hidden],
    }
    return {**blocks, **ends}


def _config(shape: LlamaShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_blocks,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "float16",
    }


def compare(folder: Path, shape: LlamaShape, dtype: str, num_threads: int) -> tuple[MemoryUse, int]:
    """Measure the client in one process and an empty one in another.

    Returns:
        The client's use, and the empty process's peak resident set in bytes.
    """
    request = MemoryRequest(
        model_folder=str(folder), lower=shape.lower, upper=shape.upper, dtype=dtype
    )
    empty = msgspec.structs.replace(request, is_empty=True)
    use, nothing = (
        run_isolated("benchmarks.memory_client", one, MemoryUse, num_threads=num_threads)
        for one in (request, empty)
    )
    return use, nothing.peak_bytes


def _measure(arguments: Arguments) -> dict[str, bool | int | float | str | None]:
    shape = SHAPES[arguments.profile]
    result: dict[str, bool | int | float | str | None] = {"profile": arguments.profile}
    rows: list[tuple[str, int, int, int, int, int, float]] = []
    with tempfile.TemporaryDirectory() as name:
        write_sparse_llama(Path(name), shape)
        for dtype in ("float32", "bfloat16"):
            use, empty_bytes = compare(Path(name), shape, dtype, arguments.threads[-1])
            needed_bytes = use.tensor_bytes + use.activation_bytes + empty_bytes
            ratio = use.peak_bytes / needed_bytes
            sizes = (use.tensor_bytes, use.activation_bytes, empty_bytes)
            after = (use.loaded_peak_bytes, use.peak_bytes)
            in_mb = [round(size / _MEGABYTE) for size in (*sizes, *after)]
            rows.append((dtype, in_mb[0], in_mb[1], in_mb[2], in_mb[3], in_mb[4], ratio))
            keys = ("tensors", "activations", "empty", "peak_load", "peak")
            result |= {f"{key}_mb_{dtype}": size for key, size in zip(keys, in_mb, strict=True)}
            result[f"ratio_{dtype}"] = ratio
    columns = ("dtype", "tensors MB", "activations", "empty", "peak at load", "peak", "ratio")
    print_table("client memory, head and tail, 128 tokens forward and backward", columns, rows)
    result["ratio"] = max(row[-1] for row in rows)
    return result


def main() -> None:
    """Measure both dtypes and report."""
    arguments = parse_arguments("client memory for a 7B-shaped model")
    emit(_measure(arguments), arguments)


if __name__ == "__main__":
    main()
