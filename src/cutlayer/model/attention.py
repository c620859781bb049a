"""Attention over packed rows: each row sees its own past and nothing else, without padding.

It does not project, rotate or know families: transformers' modules call it with finished queries,
keys and values, and it calls transformers' own kernel on one row at a time, so that the numbers
are those of the unsplit model. On CUDA, rows without a past go through one varlen kernel.

Shapes: N = tokens of all rows, H = heads, E = head dimension, q = a row's new tokens, k = keys that
they may see.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cutlayer.errors import ConfigError, ModelError
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.row_prefix import RowPrefix
from cutlayer.model.rows import Rows

__all__ = ["PACKED_ATTENTION", "PackedRows", "RowKernel", "row_kernel"]

PACKED_ATTENTION = "cutlayer_packed"
"""The name under which transformers' modules find it."""


class AttentionFunction(Protocol):
    """The signature of transformers' attention functions."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; returns [1, q, H, E] and, perhaps, weights."""


@dataclass(frozen=True)
class RowKernel:
    """The attention function that the unsplit model would use, and the masks that it would get."""

    function: Callable[[nn.Module], AttentionFunction]
    """Transformers' function for one attention module."""
    mask: Callable[[Tensor, int, int | None], Tensor | None]
    """(query [1, H, q, E], cached tokens, window) -> mask [1, 1, q, k], or None for none."""
    is_plain: bool
    """Whether it is softmax attention without caps or sinks, which a varlen kernel can do too."""


def row_kernel(name: str) -> RowKernel:
    """The kernel for an attention implementation that transformers chose for the unsplit model.

    Raises:
        ModelError: unknown name; lists the known ones.
    """
    if name not in _KERNELS:
        raise ModelError(f"attention {name!r} cannot be packed; known: {', '.join(_KERNELS)}")
    return _KERNELS[name]


class PackedRows:
    """Everything that one call of a part tells its attention modules."""

    def __init__(
        self,
        rows: Rows,
        kernel: RowKernel,
        num_blocks: int,
        windows: Sequence[int | None] | None,
        caches: Sequence[RowCache] | None = None,
        prefixes: Sequence[RowPrefix | None] | None = None,
    ) -> None:
        """Check that the caches hold what the rows continue.

        Args:
            rows: lengths and starts of the B rows.
            kernel: the attention function of the unsplit model.
            num_blocks: of the part.
            windows: sliding window of each local block in tokens as the config says, None for
                no limit; or None altogether where only the attention modules know.
            caches: one per row, or None where nothing is cached.
            prefixes: one per row, or None where no row has any.

        Raises:
            ConfigError: caches are missing or hold other lengths than the rows start at.
        """
        _check_caches(rows, caches)
        self.rows = rows
        self.kernel = kernel
        self.caches = caches
        self.prefixes = prefixes if prefixes is not None and any(prefixes) else None
        self.num_calls = 0
        self._num_blocks = num_blocks
        self._windows = windows
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def finish(self) -> None:
        """Count the new tokens as cached.

        Raises:
            ModelError: a block mixes tokens in another way than one packed attention.
        """
        if self.num_calls != self._num_blocks:
            raise ModelError(
                f"{self.num_calls} attention calls in {self._num_blocks} blocks: this "
                "architecture mixes tokens otherwise too; cutlayer cannot cut it"
            )
        for cache, length in zip(self.caches or (), self.rows.lengths, strict=False):
            cache.advance(length)

    def check_window(self, layer: int, passed: int | None) -> None:
        """Config and attention module must have one opinion about a block's window.

        Raises:
            ModelError: they have not.
        """
        if self._windows is not None and self._windows[layer] != passed:
            raise ModelError(
                f"block {layer} of this part attends with window {passed}, its config says "
                f"{self._windows[layer]}; cutlayer needs a table entry for this architecture"
            )

    def seen(
        self, row: int, layer: int, window: int | None, key_1HqE: Tensor, value_1HqE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All keys and values that one row's new tokens may see; the new ones are cached."""
        keys, values = key_1HqE, value_1HqE
        start = self.rows.starts[row]
        if self.caches is not None:
            cached = self.caches[row].append(layer, keys, values)
            keys, values = cached if start else (keys, values)
        prefix = None if self.prefixes is None else self.prefixes[row]
        if prefix is not None:
            keys, values = prefix.before(layer, keys, values)
        past = self.past(row)
        if window is None or past < window:
            return keys, values
        first = past - window + 1
        return keys[:, :, first:], values[:, :, first:]

    def past(self, row: int) -> int:
        """Keys before a row's first new token: those of its prefix and those that are cached."""
        prefix = None if self.prefixes is None else self.prefixes[row]
        return self.rows.starts[row] + (0 if prefix is None else prefix.num_seen)

    def mask(self, query: Tensor, past: int, window: int | None) -> Tensor | None:
        """The row's mask [1, 1, q, k], shared by all blocks of the call, or None."""
        key = (query.shape[2], past, window)
        if key not in self._masks:
            self._masks[key] = self.kernel.mask(query, past, window)
        return self._masks[key]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: PackedRows | None = None,
    sliding_window: int | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over packed rows: [1, H, N, E] each, out [1, N, H, E].

    Raises:
        ModelError: the architecture hides the rows from its attention or has masks of its own.
    """
    if packed_rows is None or attention_mask is not None:
        fault = "builds masks of its own" if packed_rows else "does not get keyword arguments"
        raise ModelError(f"{type(module).__name__} {fault}; cutlayer cannot cut this architecture")
    layer = cast(int, module.layer_idx)
    packed_rows.check_window(layer, sliding_window)
    packed_rows.num_calls += 1
    options["sliding_window"] = sliding_window
    rows = packed_rows.rows
    if rows.num_rows == 1:
        return _attend(packed_rows, 0, module, query, key, value, options), None
    if _fits_varlen(packed_rows, query, value, options):
        return _attend_varlen(rows, query, key, value, options), None
    pieces = [states.split(rows.lengths, dim=2) for states in (query, key, value)]
    outputs = [
        _attend(packed_rows, row, module, query, key, value, options)
        for row, (query, key, value) in enumerate(zip(*pieces, strict=True))
    ]
    return torch.cat(outputs, dim=1), None


def _attend(
    packed_rows: PackedRows,
    row: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Mapping[str, object],
) -> Tensor:
    """One row's attention, by transformers' own function, [1, q, H, E]."""
    window = cast(int | None, options["sliding_window"])
    function = packed_rows.kernel.function(module)
    key, value = packed_rows.seen(row, cast(int, module.layer_idx), window, key, value)
    mask = packed_rows.mask(query, packed_rows.past(row), window)
    return function(module, query, key, value, mask, **options)[0]


def _fits_varlen(
    packed_rows: PackedRows, query: Tensor, value: Tensor, options: Mapping[str, object]
) -> bool:
    return (
        query.is_cuda
        and _VARLEN is not None
        and packed_rows.kernel.is_plain
        and packed_rows.caches is None
        and packed_rows.prefixes is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and not options.get("dropout")
    )


def _attend_varlen(
    rows: Rows, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, object]
) -> Tensor:
    """All rows, none of which has a past, in one call of the varlen kernel, [1, N, H, E]."""
    assert _VARLEN is not None
    window = cast(int | None, options["sliding_window"])
    ends = torch.tensor(rows.offsets, dtype=torch.int32, device=query.device)
    longest = max(rows.lengths)
    packed = [states[0].transpose(0, 1).contiguous() for states in (query, key, value)]
    output_NHE = _VARLEN(
        *packed,
        ends,
        ends,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output_NHE[None]


def _check_caches(rows: Rows, caches: Sequence[RowCache] | None) -> None:
    if caches is None:
        if any(rows.starts):
            raise ConfigError(f"rows start at {rows.starts} but no caches were given")
        return
    lengths = tuple(cache.length for cache in caches)
    if lengths != rows.starts:
        raise ConfigError(f"rows start at {rows.starts} but the caches hold {lengths} tokens")


def _allowed(num_new: int, start: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the keys that `seen` returns each new token may see, boolean [1, 1, q, k]."""
    first = 0 if window is None else max(0, start - window + 1)
    new_q1 = torch.arange(start, start + num_new, device=device)[:, None]
    seen_1k = torch.arange(first, start + num_new, device=device)[None]
    allowed_qk = seen_1k <= new_q1
    if window is not None:
        allowed_qk &= seen_1k > new_q1 - window
    return allowed_qk[None, None]


def _sdpa_mask(query: Tensor, start: int, window: int | None) -> Tensor | None:
    num_new = query.shape[2]
    past = start if window is None else min(start, window - 1)
    # Transformers passes a mask wherever a window could cut, even if it cuts nothing: the kernel
    # that runs then, and so the last bit, must be the same.
    if (window is not None and past + num_new >= window) or (num_new > 1 and start > 0):
        return _allowed(num_new, start, window, query.device)
    return None


def _eager_mask(query: Tensor, start: int, window: int | None) -> Tensor | None:
    if query.shape[2] == 1:
        return None
    allowed = _allowed(query.shape[2], start, window, query.device)
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~allowed, lowest
    )


def _find_varlen() -> Callable[..., Tensor] | None:
    """torch's varlen kernel, where this torch has one that takes all that we pass."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa"}
    is_enough = needed <= inspect.signature(varlen_attn).parameters.keys()
    return cast(Callable[..., Tensor], varlen_attn) if is_enough else None


_VARLEN = _find_varlen()
_sdpa = cast(AttentionFunction, AttentionInterface()["sdpa"])


def _sdpa_function(module: nn.Module) -> AttentionFunction:
    return _sdpa


def _eager_function(module: nn.Module) -> AttentionFunction:
    home = sys.modules[type(module).__module__]
    function = getattr(home, "eager_attention_forward", None)
    if function is None:
        raise ModelError(f"{home.__name__} has no eager_attention_forward; cutlayer cannot cut it")
    return cast(AttentionFunction, function)


_KERNELS = {
    "sdpa": RowKernel(function=_sdpa_function, mask=_sdpa_mask, is_plain=True),
    "eager": RowKernel(function=_eager_function, mask=_eager_mask, is_plain=False),
}

AttentionInterface.register(PACKED_ATTENTION, packed_attention)
