"""A trunk whose blocks are shared out among the ranks of one replica, by the model's own plan.

It does not start processes nor lead them (`server.tensor_parallel`). Attention heads and MLP
columns are split as the config's `base_model_tp_plan` says; norms and everything else are whole on
every rank. Adapters stay whole everywhere: LoRA computes in whole coordinates around the sharded
layers, each rank's gradient is its share of a sum, and the leader gets the sum. So an adapter's
state, norm and optimizer are those of an unsharded trunk.

Shapes: N = tokens of all rows, D = hidden size, I and O = input and output features of a layer.
"""

import hashlib
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

from cutlayer.errors import ConfigError, ModelError
from cutlayer.model import checkpoint
from cutlayer.model.attention import PackedRows
from cutlayer.model.collectives import Ranks
from cutlayer.model.families import Layout, meta_model, read_layout
from cutlayer.model.folder import ModelFolder
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.manifest import hash_config, hash_leaf, names_by_leaf
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.model.placement import Target
from cutlayer.model.probe import check_blocks
from cutlayer.model.rows import Rows
from cutlayer.model.sharded_linear import STYLES, Entry, Shard

__all__ = ["Mirror", "MirroredCall", "ParallelTrunk", "load_parallel_trunk"]

_INNER = re.compile(r"\.inner(?=\.|$)")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class MirroredCall(Protocol):
    """A call that other ranks have computed too; they forget its graph when this is gone."""

    def backward(self, grad_ND: Tensor) -> None:
        """Have the other ranks run backward from the same gradient."""


class Mirror(Protocol):
    """What a leading trunk tells before it computes."""

    def call(self, h_ND: Tensor, rows: Rows, caches: Sequence[RowCache] | None) -> MirroredCall:
        """Have the other ranks run the same call, with the same adapters."""

    def stop(self) -> None:
        """Let the other ranks end."""


class ParallelTrunk(Trunk):
    """One rank's share of a trunk. The leader's is used like any other trunk."""

    def __init__(self, model: PreTrainedModel, layout: Layout, blocks: range, ranks: Ranks) -> None:
        """Slice a whole model on the meta device, then share out the blocks' linear layers.

        Raises:
            ModelError: the family has no plan, or one that cannot be followed with so many ranks.
        """
        super().__init__(model, layout, blocks)
        self.ranks = ranks
        self.mirror: Mirror | None = None
        self.split_dims: dict[str, int] = {}
        """Global name of every tensor that is shared out -> along which dimension."""
        self._is_running = False
        self._entry = Entry(ranks)
        self._hooked: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
        self._shards: list[Shard] = []
        # While its layers are still whole: shares cannot run on the meta device.
        check_blocks(self)
        self._shards = self._share_out(_styles(self, ranks.size))

    def global_name(self, local_name: str) -> str:
        """As `PartModule.global_name`; wrappers around sharded layers do not show."""
        return super().global_name(_INNER.sub("", local_name))

    def own_heads(self, states: Tensor, num_heads: int) -> Tensor:
        """This rank's share of [.., H, E], or all of it where every rank attends with all heads."""
        if num_heads < states.shape[-2]:
            return self.ranks.own(states, -2)
        if self.ranks.rank == 0:
            return states
        # Each rank then has the whole gradient too: of their sum, the leader's counts alone.
        return states.detach() + states * 0

    def _share_out(self, styles: Mapping[str, str]) -> list[Shard]:
        shards = []
        for name, style in styles.items():
            linear = cast(nn.Linear, self.base.get_submodule(name))
            shard = STYLES[style](linear, self._entry)
            self.base.set_submodule(name, shard)
            path = self.global_name(f"base.{name}")
            self.split_dims |= {f"{path}.{part}": dim for part, dim in shard.split_dims.items()}
            shards.append(shard)
        return shards

    def _run(
        self,
        inputs: Tensor,
        rows: Rows,
        caches: Sequence[RowCache] | None,
        blocks: range | None = None,
    ) -> Tensor:
        if blocks not in (None, self.block_range):
            raise ConfigError("a trunk of several processes runs all its blocks, not some of them")
        if self._is_running:
            return super()._run(inputs, rows, caches)
        self._check_rows(inputs, rows, caches)
        # What is refused has to be refused before the other ranks hear of it.
        PackedRows(rows, self._kernel, len(self.block_range), self._windows, caches)
        self._prefixes_of(rows)
        call = None if self.mirror is None else self.mirror.call(inputs, rows, caches)
        if torch.is_grad_enabled():
            self._sum_adapter_gradients()
        self._is_running = True
        try:
            y_ND = super()._run(inputs, rows, caches)
        except RuntimeError as error:
            # Out of memory, perhaps: the other ranks are somewhere else in this call by now.
            self.ranks.give_up(f"a call failed half-way ({error})")
            raise
        finally:
            self._is_running = False
            self._entry.forget()
        if call is None or not y_ND.requires_grad:
            return y_ND
        return cast(Tensor, _Mirrored.apply(y_ND, call))  # type: ignore[no-untyped-call]

    def _sum_adapter_gradients(self) -> None:
        """See to it that every weight of which a rank uses a share gives the leader its whole
        gradient: factors on sharded layers, and prefixes."""
        for weight in () if self.prefixes is None else self.prefixes.weights():
            self._sum_gradient_of(weight)
        for shard in self._shards:
            if not isinstance(shard.inner, LoraLayer):
                continue
            for factors in (shard.inner.lora_A, shard.inner.lora_B):
                for factor in factors.values():
                    self._sum_gradient_of(cast(nn.Parameter, factor.weight))

    def _sum_gradient_of(self, weight: nn.Parameter) -> None:
        if weight.requires_grad and self._hooked.get(id(weight)) is not weight:
            weight.register_hook(self.ranks.add_up_at_leader)
            self._hooked[id(weight)] = weight


def load_parallel_trunk(
    source: ModelFolder | str | Path,
    cut: Cut,
    dtype: str | torch.dtype,
    device: str | torch.device,
    ranks: Ranks,
) -> ParallelTrunk:
    """This rank's share of a trunk with its weights; no rank ever holds all of them.

    Raises:
        ConfigError: unknown dtype or device, or the cut exceeds the model.
        ModelError: as `checkpoint.load_part`; or the plan cannot be followed; or the ranks read
            different files.
        TransportError: a rank is gone or silent.
    """
    trunk = _ShardReader(source, dtype, device, ranks).read_trunk(cut)
    # One rank's disk may be much slower than another's.
    ranks.meet()
    _compare_files(trunk)
    return trunk


class _MirroredContext(FunctionCtx):
    call: MirroredCall


class _Mirrored(torch.autograd.Function):
    """Where a gradient comes back, the other ranks hear of it first."""

    @staticmethod
    def forward(ctx: _MirroredContext, y_ND: Tensor, call: MirroredCall) -> Tensor:
        ctx.call = call
        return y_ND.view_as(y_ND)

    @staticmethod
    def backward(ctx: _MirroredContext, grad_ND: Tensor) -> tuple[Tensor, None]:
        ctx.call.backward(grad_ND)
        return grad_ND, None


_WHOLE = frozenset({"replicated_with_grad_allreduce"})
"""Styles of small frozen weights that every rank has; their gradients are never needed."""


def _styles(trunk: Trunk, num_ranks: int) -> dict[str, str]:
    """Name within the base model of every linear layer to share out -> style.

    Raises:
        ModelError: no plan, a style that is not known, or widths or heads that cannot be shared.
    """
    kind, blocks = trunk.config.model_type, trunk.layout.blocks
    plan = getattr(trunk.config, "base_model_tp_plan", None) or {}
    styles = {}
    for name, module in trunk.base.named_modules():
        style = plan.get(_NUMBER.sub(".*", name)) if name.startswith(f"{blocks}.") else None
        if style is not None and style not in _WHOLE:
            _check_layer(kind, name, module, style, num_ranks)
            styles[name] = style
    for name, _ in trunk.base.named_parameters():
        if name.startswith(f"{blocks}.") and _NUMBER.sub(".*", name) in plan:
            raise ModelError(f"{kind} shares out {name}, which is no linear layer; {_ADVICE}")
    if not styles:
        raise ModelError(f"{kind} has no plan for tensor parallelism; {_ADVICE}")
    for name, style in styles.items():
        if style == "colwise" and "att" in name:
            _check_heads(trunk, name, num_ranks)
    return styles


_ADVICE = "use a larger accelerator, or fewer blocks in the trunk (model.lower, model.upper)"


def _check_layer(kind: str, name: str, module: nn.Module, style: str, num_ranks: int) -> None:
    if style not in STYLES or not isinstance(module, nn.Linear):
        raise ModelError(
            f"{kind} shares out {name} ({type(module).__name__}) as {style!r}; known for linear "
            f"layers: {', '.join(STYLES)}; {_ADVICE}"
        )
    width = module.in_features if style.startswith("rowwise") else module.out_features
    if width % num_ranks:
        raise ModelError(
            f"{kind}: the {width} features of {name} cannot be shared out among {num_ranks} "
            "processes; choose a number that divides them (torchrun --nproc-per-node)"
        )


def _check_heads(trunk: Trunk, name: str, num_ranks: int) -> None:
    """Whole attention heads only."""
    kind = trunk.config.model_type
    for count_name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(trunk.config, count_name, None)
        if isinstance(count, int) and count % num_ranks:
            raise ModelError(
                f"{kind}: {count_name}={count} cannot be shared out among {num_ranks} "
                "processes; choose a number that divides it (torchrun --nproc-per-node)"
            )
    attention = trunk.base.get_submodule(name.rpartition(".")[0])
    width = cast(nn.Linear, trunk.base.get_submodule(name)).out_features // num_ranks
    head_width = getattr(attention, "head_dim", None)
    if isinstance(head_width, int) and width % head_width:
        raise ModelError(
            f"{kind}: {name} has no whole heads of {head_width} for each of {num_ranks} "
            "processes; choose fewer (torchrun --nproc-per-node)"
        )


class _ShardReader(checkpoint._Reader):
    """Reads and hashes every tensor of the trunk, one at a time, and keeps this rank's share."""

    def __init__(
        self,
        source: ModelFolder | str | Path,
        dtype: str | torch.dtype,
        device: str | torch.device,
        ranks: Ranks,
    ) -> None:
        super().__init__(source, dtype, device)
        self._ranks = ranks
        self._split_dims: Mapping[str, int] = {}

    def read_trunk(self, cut: Cut) -> ParallelTrunk:
        """Build this rank's trunk and fill it."""
        model = meta_model(self._config)
        blocks = cut.blocks(Part.TRUNK, self._num_blocks)
        trunk = ParallelTrunk(model, read_layout(model), blocks, self._ranks)
        self._split_dims = trunk.split_dims
        local = {trunk.global_name(name): name for name in trunk.state_dict()}
        names = names_by_leaf(self._folder.names(), self._num_blocks)
        filled: dict[str, Tensor] = {}
        trunk.leaves = {"config": hash_config(self._config)}
        for leaf in self._leaves_of(trunk):
            stream = self._stream(names[leaf], frozenset(local), filled)
            trunk.leaves[leaf] = hash_leaf(stream)
        checkpoint._fill(trunk, {local[name]: filled[name] for name in local}, self._device)
        return trunk

    def _keep(self, tensor: Tensor, target: Target, filled: dict[str, Tensor]) -> None:
        dim = self._split_dims.get(target.name)
        if dim is not None:
            # A copy: a view would keep the whole tensor in memory.
            tensor = self._ranks.own(tensor, dim).clone(memory_format=torch.contiguous_format)
        super()._keep(tensor, target, filled)


def _compare_files(trunk: ParallelTrunk) -> None:
    """Refuse ranks that read different weights: their sums would mean nothing."""
    text = "\n".join(f"{leaf} {digest}" for leaf, digest in sorted(trunk.leaves.items()))
    own = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    device = next(trunk.parameters()).device
    digests = trunk.ranks.gather(own.to(device)).view(trunk.ranks.size, -1)
    different = [rank for rank, digest in enumerate(digests) if not digest.equal(digests[0])]
    if different:
        raise ModelError(
            f"ranks {different} read other weights or another config than rank 0; give all "
            "processes the same model folder"
        )
