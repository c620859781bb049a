"""Head, trunk and tail: the architecture's own base model with its block list sliced.

It does not read weights (`checkpoint`), train (`adapters`) or know families (`families`): parts
come from here on the meta device.

Shapes: N = tokens of all rows, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cutlayer.errors import ConfigError, CutlayerError, DataError
from cutlayer.model.attention import PACKED_ATTENTION, PackedRows, row_kernel
from cutlayer.model.cut import Cut, Part
from cutlayer.model.families import (
    Layout,
    enter_unchanged,
    family_of,
    meta_model,
    read_layout,
    rotates_by_batch,
    slice_config,
    windows,
)
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.row_prefix import PrefixSource, RowPrefix, ends_of, shifted_positions
from cutlayer.model.rows import Rows
from cutlayer.model.threads import FEW_TOKENS, with_threads
from cutlayer.model.views import BaseViews
from cutlayer.model.walk import Inputs, Walk, drawn_like, learn_walk, says_only

__all__ = ["Cut", "Head", "Part", "PartModule", "Tail", "Trunk", "build_part"]


class PartModule(nn.Module):
    """What head, trunk and tail share: one run of blocks that works on packed rows."""

    part: Part

    def __init__(self, model: PreTrainedModel, layout: Layout, blocks: range) -> None:
        """Take the base model out of a whole causal LM and slice it; use `build_part`.

        Args:
            model: the whole model on the meta device, which is used up.
            layout: where its pieces are.
            blocks: global indices of the part's blocks.
        """
        super().__init__()
        self.block_range = blocks
        self.layout = layout
        self.config: PreTrainedConfig = type(model.config).from_dict(model.config.to_dict())
        self.hidden_size: int = self.config.hidden_size
        self.decode_threads: int | None = None
        """Compute threads of calls with few cached tokens; None leaves the process's own."""
        self.prefixes: PrefixSource | None = None
        """Trained keys and values before rows; None where no adapter has any."""
        self.leaves: dict[str, str] = {}
        """Manifest leaves of what was loaded; empty until then."""
        self.base = cast(PreTrainedModel, getattr(model, layout.prefix))
        self._kernel = row_kernel(layout.attention)
        whole = windows(self.config)
        self._windows = None if whole is None else whole[blocks.start : blocks.stop]
        self._context = getattr(self.config, "max_position_embeddings", None)
        self._shared_rope_limit = rotates_by_batch(self.config)
        self._walks: dict[tuple[range, str], Walk | None] = {}
        self._slice()
        self._views = BaseViews(self.base, layout.blocks, blocks)

    def run_blocks(
        self,
        h_ND: Tensor,
        rows: Rows,
        caches: Sequence[RowCache] | None = None,
        blocks: range | None = None,
    ) -> Tensor:
        """Hidden states through the part's base model, or some of its blocks; [N, D] each way."""
        return self._run(h_ND, rows, caches, blocks)

    def own_heads(self, states: Tensor, num_heads: int) -> Tensor:
        """What this process, which attends with `num_heads` key-value heads, has of [.., H, E]."""
        return states

    def zeros_ND(self, num_tokens: int) -> Tensor:
        """Hidden states of the dtype and on the device of the part's weights."""
        weight = next(p for p in self.parameters() if p.is_floating_point())
        return torch.zeros(num_tokens, self.hidden_size, dtype=weight.dtype, device=weight.device)

    def global_name(self, local_name: str) -> str:
        """The name that a parameter or module of this part has in the unsplit model."""
        prefix = f"base.{self.layout.blocks}."
        if local_name.startswith(prefix):
            index, _, rest = local_name.removeprefix(prefix).partition(".")
            block = self.block_range[int(index)]
            return ".".join(
                filter(None, (self.layout.prefix, self.layout.blocks, str(block), rest))
            )
        if local_name.startswith("base."):
            return f"{self.layout.prefix}.{local_name.removeprefix('base.')}"
        return local_name

    def _run(
        self,
        inputs: Tensor,
        rows: Rows,
        caches: Sequence[RowCache] | None,
        blocks: range | None = None,
    ) -> Tensor:
        self._check_rows(inputs, rows, caches)
        blocks = self.block_range if blocks is None else blocks
        prefixes, limit = self._prefixes_of(rows), self._shared_rope_limit
        if limit is not None and rows.num_rows > 1 and max(ends_of(rows, prefixes)) > limit:
            return self._run_one_by_one(inputs, rows, caches, blocks)
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"

        def prepared(inputs: Tensor = inputs) -> dict[str, object]:
            packed = PackedRows(rows, self._kernel, len(blocks), self._windows, caches, prefixes)
            return {
                name: inputs[None],
                "position_ids": shifted_positions(rows, prefixes).to(inputs.device)[None],
                "use_cache": False,
                "packed_rows": packed,
            }

        is_decode = caches is not None and rows.num_tokens <= FEW_TOKENS
        with with_threads(self.decode_threads if is_decode else None):
            base, walk = self._views.of(blocks), None
            if is_decode and torch.is_inference_mode_enabled():
                walk = self._walk(base, (blocks, name), lambda: prepared(drawn_like(inputs)))
            given = prepared()
            states = base(**given).last_hidden_state if walk is None else walk(given)
        cast(PackedRows, given["packed_rows"]).finish()
        return cast(Tensor, states[0])

    def _walk(
        self, base: PreTrainedModel, key: tuple[range, str], prepared: Callable[[], Inputs]
    ) -> Walk | None:
        """The straight way through a base model for such inputs, learnt when first asked for."""
        if key not in self._walks:
            blocks = getattr(base, self.layout.blocks)
            others = [child for child in base.children() if child is not blocks]
            self._walks[key] = None
            # What fails here fails again below, where it is told, or was for want of room.
            with suppress(CutlayerError):
                self._walks[key] = learn_walk(base, [*blocks, *others], prepared)
        return self._walks[key]

    def _prefixes_of(self, rows: Rows) -> Sequence[RowPrefix | None] | None:
        """What stands before each row, which must leave room for it in the model's context."""
        prefixes = None if self.prefixes is None else self.prefixes.of_rows(rows)
        self._check_length(max(ends_of(rows, prefixes)))
        return prefixes

    def _run_one_by_one(
        self, inputs: Tensor, rows: Rows, caches: Sequence[RowCache] | None, blocks: range
    ) -> Tensor:
        outputs = []
        for row, (length, start) in enumerate(zip(rows.lengths, rows.starts, strict=True)):
            begin = rows.offsets[row]
            alone = Rows(lengths=(length,), starts=(start,))
            cache = None if caches is None else [caches[row]]
            outputs.append(self._run(inputs[begin : begin + length], alone, cache, blocks))
        return torch.cat(outputs)

    def _check_rows(self, inputs: Tensor, rows: Rows, caches: Sequence[RowCache] | None) -> None:
        expected = (rows.num_tokens, self.hidden_size)[: inputs.ndim]
        if inputs.ndim not in (1, 2) or inputs.shape != expected:
            raise ConfigError(f"{self.part} got {tuple(inputs.shape)}, its rows say {expected}")
        if caches is not None and len(caches) != rows.num_rows:
            raise ConfigError(f"{len(caches)} caches for {rows.num_rows} rows; give one per row")
        self.check_context(rows)

    def check_context(self, rows: Rows, num_before: int = 0) -> None:
        """Refuse rows that this model is not made for.

        Args:
            rows: new tokens and where they start.
            num_before: positions that an adapter's prefix takes from each row.

        Raises:
            DataError: a row is longer than the model's context.
        """
        self._check_length(num_before + max(ends_of(rows, None)))

    def _check_length(self, longest: int) -> None:
        if self._context is not None and longest > self._context:
            raise DataError(
                f"a row of {longest} tokens exceeds the model's context of {self._context}; "
                "shorten it (a prefix counts too)"
            )

    def _slice(self) -> None:
        base, layout, blocks = self.base, self.layout, self.block_range
        base.set_attn_implementation(PACKED_ATTENTION)
        sliced = nn.ModuleList(getattr(base, layout.blocks)[blocks.start : blocks.stop])
        setattr(base, layout.blocks, sliced)
        for local, block in enumerate(sliced):
            for module in block.modules():
                # Global, it would index the sliced config and the cache of this run wrongly.
                if isinstance(vars(module).get("layer_idx"), int):
                    vars(module)["layer_idx"] = local
        if self.part is not Part.TAIL:
            setattr(base, layout.norm, nn.Identity())
        if self.part is not Part.HEAD:
            setattr(base, layout.embedding, None)
            enter_unchanged(base, family_of(self.config))
        slice_config(base.config, blocks)


class Head(PartModule):
    """Embedding and blocks [0, lower): tokens in, h out."""

    part = Part.HEAD

    def forward(self, rows: Rows, caches: Sequence[RowCache] | None = None) -> Tensor:
        """Hidden states [N, D] of packed rows.

        Args:
            rows: B packed rows with their tokens.
            caches: one per row, holding `rows.starts` tokens; None where nothing is cached.

        Raises:
            ConfigError: the rows have no tokens, or caches do not fit them.
            DataError: a row exceeds the model's context, or a token its vocabulary.
        """
        if rows.tokens_N is None:
            raise ConfigError("the head needs rows with tokens; these have lengths only")
        embedding = self.base.get_input_embeddings().weight
        lowest, highest = (int(bound) for bound in rows.tokens_N.aminmax())
        if lowest < 0 or highest >= embedding.shape[0]:
            raise DataError(
                f"token {lowest if lowest < 0 else highest} is not in the model's vocabulary of "
                f"{embedding.shape[0]}; is this the model's own tokenizer?"
            )
        return self._run(rows.tokens_N.to(embedding.device), rows, caches)


class Trunk(PartModule):
    """Blocks [lower, upper): hidden states in and out."""

    part = Part.TRUNK

    def forward(
        self,
        h_ND: Tensor,
        rows: Rows,
        caches: Sequence[RowCache] | None = None,
        blocks: range | None = None,
    ) -> Tensor:
        """Hidden states [N, D] to hidden states [N, D].

        Args:
            h_ND: what enters the first of the blocks.
            rows: as in `Head.forward`.
            caches: as in `Head.forward`.
            blocks: global indices of the blocks to run, some of the trunk's; None is all.

        Raises:
            ConfigError: as `Head.forward`, or the trunk does not have these blocks.
        """
        return self._run(h_ND, rows, caches, blocks)


class Tail(PartModule):
    """Blocks [upper, n), final norm and LM head: hidden states in, logits out."""

    part = Part.TAIL

    def __init__(self, model: PreTrainedModel, layout: Layout, blocks: range) -> None:
        """As `PartModule`; the rest of the causal LM turns normed states into logits."""
        super().__init__(model, layout, blocks)
        self.lm_head: nn.Module = getattr(model, layout.lm_head)
        setattr(model, layout.prefix, _NormedStates())
        self._is_bare: bool | None = None
        """Whether logits are what the LM head says and nothing else; None while nobody knows."""
        # In a tuple, so that the LM head is registered once.
        self._causal_lm = (model,)

    def forward(
        self,
        y_ND: Tensor,
        rows: Rows,
        caches: Sequence[RowCache] | None = None,
        select_N: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, V], or [S, V] for the S places of the packed order in `select_N` (int64).

        Raises:
            ConfigError: caches or shapes do not fit the rows.
        """
        normed_ND = self._run(y_ND, rows, caches)
        if select_N is not None:
            normed_ND = normed_ND[select_N.to(normed_ND.device)]
        return self.logits(normed_ND)

    def logits(self, normed_ND: Tensor) -> Tensor:
        """Logits of normed states, by the causal LM's own forward with its scales and caps."""
        (model,) = self._causal_lm
        # An adapter may have wrapped the registered one.
        if getattr(model, self.layout.lm_head) is not self.lm_head:
            setattr(model, self.layout.lm_head, self.lm_head)
        normed_1ND = normed_ND[None]
        if torch.is_inference_mode_enabled():
            if self._is_bare is None:
                self._is_bare = says_only(model, self.lm_head, drawn_like(normed_1ND))
            if self._is_bare:
                return cast(Tensor, self.lm_head(normed_1ND)[0])
        return cast(Tensor, model(inputs_embeds=normed_1ND, use_cache=False).logits[0])


def build_part(config: PreTrainedConfig, cut: Cut, part: Part) -> PartModule:
    """One part of a model, without memory for its weights (meta device).

    Raises:
        ConfigError: the cut exceeds the model.
        ModelError: the architecture cannot be cut; names what is missing.
    """
    model = meta_model(config)
    layout = read_layout(model)
    blocks = cut.blocks(part, model.config.num_hidden_layers)
    return _CLASSES[part](model, layout, blocks)


_CLASSES: dict[Part, type[PartModule]] = {Part.HEAD: Head, Part.TRUNK: Trunk, Part.TAIL: Tail}


class _Output:
    """What a base model returns, reduced to its states; everything else is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _NormedStates(nn.Module):
    """Stands where the causal LM had its base model: the tail has run that already."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _Output:
        return _Output(inputs_embeds)
