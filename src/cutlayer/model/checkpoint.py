"""Read the tensors of one part, and no others, into its modules.

It does not find or download models (`folder`), cut them (`partition`) or train them. Each tensor is
read, hashed, converted and let go before the next; nothing is initialised at random. Loaded
weights are frozen and parts are in eval mode: what trains is an adapter. Leaves are hashes of what
the files say, whether it is quantised afterwards or not.
"""

import re
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError, ModelError
from cutlayer.model.families import build_buffers, meta_model, read_layout
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.model.manifest import hash_config, hash_leaf, names_by_leaf
from cutlayer.model.part_settings import TrunkWeights
from cutlayer.model.partition import Cut, Head, Part, PartModule, Tail, Trunk, build_part
from cutlayer.model.placement import Placement, Target, place_all
from cutlayer.model.probe import check_blocks, check_ends
from cutlayer.model.quantised import check_quantisable, quantise_block

__all__ = ["DTYPES", "check_dtype", "load_client_parts", "load_part", "load_parts"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What parts may compute in, by the name that settings use."""

Source = ModelFolder | str | Path

_UNITS = {
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    torch.float16: frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}
"""CPU flags of fast products; each alone will do."""


def load_part(
    source: Source,
    cut: Cut,
    part: Part,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    weights: TrunkWeights = TrunkWeights.FULL,
) -> PartModule:
    """One part with its weights; `.leaves` holds the manifest leaves of what was read.

    Args:
        source: a ModelFolder, or what `resolve_model` takes.
        cut: where the model is cut.
        part: which part.
        dtype: of the weights; a few that the architecture keeps in float32 stay so.
        device: where they go.
        weights: how a trunk's linear layers are kept; the other parts' are never quantised.

    Raises:
        ConfigError: unknown dtype or device, the cut exceeds the model, or weights that are to be
            quantised cannot be.
        ModelError: the architecture cannot be cut; a tensor is missing, extra or of a wrong shape.
    """
    if part is not Part.TRUNK and weights is not TrunkWeights.FULL:
        raise ConfigError(f"the {part} keeps its weights in full, not as {weights}")
    return _Reader(source, dtype, device).read(cut, part, weights=weights)


def load_parts(
    folder: Source,
    cut: Cut,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> tuple[Head, Trunk, Tail]:
    """All three parts of one model; head and tail share a tied embedding. See `load_part`."""
    reader = _Reader(folder, dtype, device)
    head, tail = _read_client_parts(reader, cut)
    return head, cast(Trunk, reader.read(cut, Part.TRUNK)), tail


def load_client_parts(
    source: Source,
    cut: Cut,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> tuple[Head, Tail]:
    """Head and tail, sharing a tied embedding. See `load_part`."""
    return _read_client_parts(_Reader(source, dtype, device), cut)


def check_dtype(dtype: str | torch.dtype, device: str | torch.device) -> str | None:
    """A warning where a dtype is slow on a device, else None.

    Raises:
        ConfigError: unknown dtype or device.
    """
    wanted, place = _dtype_of(dtype), _device_of(device)
    if place.type != "cpu" or wanted is torch.float32:
        return None
    if _cpu_flags() & _UNITS[wanted]:
        return None
    return (
        f"this CPU has no units for {dtype}: products are 8 to 60 times slower than in float32; "
        'set model.dtype = "float32" (the wire may still carry bf16)'
    )


def _read_client_parts(reader: "_Reader", cut: Cut) -> tuple[Head, Tail]:
    head = cast(Head, reader.read(cut, Part.HEAD))
    tail = cast(Tail, reader.read(cut, Part.TAIL, head))
    return head, tail


class _Reader:
    """One model folder, opened once for several parts."""

    def __init__(
        self, source: Source, dtype: str | torch.dtype, device: str | torch.device
    ) -> None:
        self._folder = source if isinstance(source, ModelFolder) else resolve_model(source)
        self._dtype, self._device = _dtype_of(dtype), _device_of(device)
        self._config = self._folder.config
        model = meta_model(self._config)
        layout = read_layout(model)
        self._num_blocks: int = model.config.num_hidden_layers
        self._expected = dict(model.state_dict())
        self._in_fp32 = _kept_in_fp32(model, self._dtype)
        self._is_tied = bool(getattr(self._config, "tie_word_embeddings", False))
        ends = (f"{layout.prefix}.{layout.embedding}.weight", f"{layout.lm_head}.weight")
        self._placement = self._place(model, layout.prefix, ends if self._is_tied else ())
        self._alias = {end: other for end, other in (ends, ends[::-1]) if self._lacks(end)}

    def read(
        self,
        cut: Cut,
        part: Part,
        head: Head | None = None,
        weights: TrunkWeights = TrunkWeights.FULL,
    ) -> PartModule:
        """Build a part and fill it; a tail takes tied tensors from `head`."""
        module = build_part(self._config, cut, part)
        check_blocks(module)
        if weights is not TrunkWeights.FULL:
            check_quantisable(module)
        local = {module.global_name(name): name for name in module.state_dict()}
        source = {name: self._alias.get(name, name) for name in local}
        filled: dict[str, Tensor] = {}
        leaves = {"config": hash_config(self._config)}
        names = names_by_leaf(self._folder.names(), self._num_blocks)
        for leaf in self._leaves_of(module):
            if head is not None and leaf in head.leaves:
                leaves[leaf] = head.leaves[leaf]
                name, weight = _embedding_of(head)
                filled[self._alias.get(name, name)] = weight
            else:
                stream = self._stream(names[leaf], frozenset(source.values()), filled)
                leaves[leaf] = hash_leaf(stream)
            if weights is not TrunkWeights.FULL:
                _quantise(module, leaf, filled, weights)
        if weights is TrunkWeights.FULL:
            _fill(module, {local[name]: filled[source[name]] for name in local}, self._device)
        else:
            _finish(module, self._device)
        if head is not None and self._is_tied:
            _share(head, cast(Tail, module))
        module.leaves = leaves
        return module

    def _lacks(self, name: str) -> bool:
        return name in self._placement.missing

    def _place(self, model: nn.Module, prefix: str, may_miss: Sequence[str]) -> Placement:
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        names = self._folder.names()
        try:
            return place_all(names, self._expected, prefix, may_miss, ignored)
        except ModelError as error:
            raise ModelError(f"{self._folder.path}: {error}") from error

    def _leaves_of(self, module: PartModule) -> list[str]:
        """The leaves that a part holds; the ends first, for what is read last is held twice."""
        blocks = [f"block.{index}" for index in module.block_range]
        if module.part is Part.TRUNK:
            return blocks
        if module.part is Part.HEAD:
            return (["embedding", "lm_head"] if self._alias else ["embedding"]) + blocks
        return (["embedding"] if self._alias else []) + ["lm_head", "norm", *blocks]

    def _stream(
        self, names: Sequence[str], wanted: Container[str], filled: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield a leaf's tensors as the file has them; keep what the part wants, converted."""
        for name in names:
            tensor = self._folder.get(name)
            yield name, tensor
            target = self._placement.targets.get(name)
            if target is not None and target.name in wanted:
                self._check_shape(name, tensor, target)
                self._keep(tensor, target, filled)

    def _check_shape(self, name: str, tensor: Tensor, target: Target) -> None:
        expected = target.of(self._expected[target.name]).shape
        if tensor.shape != expected:
            raise ModelError(
                f"{self._folder.path}: {name} has shape {tuple(tensor.shape)}, its config says "
                f"{tuple(expected)}; config and weights are not of one model"
            )

    def _keep(self, tensor: Tensor, target: Target, filled: dict[str, Tensor]) -> None:
        dtype = tensor.dtype
        if dtype.is_floating_point:
            dtype = torch.float32 if self._in_fp32(target.name) else self._dtype
        if target.expert is None:
            filled[target.name] = tensor.to(self._device, dtype)
            return
        if target.name not in filled:
            shape = self._expected[target.name].shape
            filled[target.name] = torch.empty(shape, dtype=dtype, device=self._device)
        target.of(filled[target.name]).copy_(tensor)


def _quantise(
    module: PartModule, leaf: str, filled: dict[str, Tensor], weights: TrunkWeights
) -> None:
    """Fill and quantise a block of a trunk before the next is read: one alone is here in full."""
    place = int(leaf.removeprefix("block.")) - module.block_range.start
    path = f"base.{module.layout.blocks}.{place}"
    block = module.get_submodule(path)
    names = {name: module.global_name(f"{path}.{name}") for name in block.state_dict()}
    state = {name: filled.pop(source) for name, source in names.items()}
    block.load_state_dict(state, strict=True, assign=True)
    quantise_block(block, weights)


def _fill(module: PartModule, state: dict[str, Tensor], device: torch.device) -> None:
    module.load_state_dict(state, strict=True, assign=True)
    _finish(module, device)


def _finish(module: PartModule, device: torch.device) -> None:
    build_buffers(module.base, module.config, device)
    module.requires_grad_(False)
    module.eval()
    check_ends(module)


def _embedding_of(head: Head) -> tuple[str, nn.Parameter]:
    """The head's embedding and its global name; a Parameter, so that the tail shares it."""
    embedding = head.layout.embedding
    weight = head.base.get_input_embeddings().weight
    return head.global_name(f"base.{embedding}.weight"), cast(nn.Parameter, weight)


def _share(head: Head, tail: Tail) -> None:
    """One memory for a tied embedding that the file has twice."""
    _, embedding = _embedding_of(head)
    lm_head = tail.lm_head
    if isinstance(lm_head, nn.Linear) and torch.equal(lm_head.weight, embedding):
        lm_head.weight = embedding


def _kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether a tensor stays in float32 in a model of this dtype, by transformers' own rule."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    found = re.compile("|".join(rf"(?:^|\.){re.escape(p)}(?:\.|$)" for p in sorted(patterns)))
    return lambda name: bool(patterns) and found.search(name) is not None


def _dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted not in DTYPES.values():
        raise ConfigError(f"dtype={dtype} is not known; choose one of {', '.join(DTYPES)}")
    return cast(torch.dtype, wanted)


def _device_of(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={device} cannot be used here ({reason}); try cpu") from error
    return place


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = (
        line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))
    )
    return frozenset(next(flags, []))
