"""Many possible continuations of a row through one part at once: a tree of tokens.

Each token of a call sees the nodes of its own past and itself, so that candidates for one place
share their prefix without copies, and hypotheses of different pasts run together. It does not
choose candidates (`shortlist`), score them (`known_noise`) or search (`head_search`).

Shapes: K = new tokens of a call, M = kept nodes, D = hidden size, H = heads, E = head dimension.
"""

from typing import cast

import torch
from torch import Tensor

from cutlayer.model.attention import PackedRows, row_kernel
from cutlayer.model.partition import PartModule
from cutlayer.model.rows import Rows

__all__ = ["TokenTree"]


class TokenTree:
    """Keys and values of the kept nodes of one part."""

    def __init__(self, part: PartModule) -> None:
        """No node is kept yet.

        Args:
            part: head, trunk or tail; used as it is, adapters included.
        """
        self._part = part
        self._kernel = row_kernel(part.layout.attention)
        self._depths_M = torch.zeros(0, dtype=torch.int64)
        self._kept: list[_Kept] = [_Kept() for _ in part.block_range]
        self._pending: _Call | None = None

    @property
    def num_nodes(self) -> int:
        """M."""
        return int(self._depths_M.shape[0])

    @torch.no_grad()
    def run(self, inputs: Tensor, seen_KM: Tensor, depth: int) -> Tensor:
        """Hidden states [K, D] of new tokens, each behind its own past.

        Args:
            inputs: token ids [K] for a head, hidden states [K, D] for the others.
            seen_KM: which kept nodes each one sees, boolean.
            depth: position of all of them in their row.
        """
        num_new = inputs.shape[0]
        depths_K = torch.full((num_new,), depth)
        call = _Call(self._kept, seen_KM, depths_K, self._depths_M, self._part)
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        output = self._part.base(
            **{name: inputs[None]},
            position_ids=depths_K[None],
            use_cache=False,
            packed_rows=call,
        )
        self._pending = call
        return cast(Tensor, output.last_hidden_state[0])

    def pending(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H, K, E] that one block made in the last call."""
        assert self._pending is not None, "nothing was run"
        return self._pending.new[layer]

    def keep(self, chosen_K: Tensor) -> None:
        """Make some tokens of the last call nodes, in the order given, behind the others."""
        call = self._pending
        assert call is not None, "nothing was run"
        self._depths_M = torch.cat([self._depths_M, call.depths_K[chosen_K]])
        for layer, kept in enumerate(self._kept):
            kept.append(*(states[:, :, chosen_K] for states in call.new[layer]))
        self._pending = None

    def select(self, nodes_M: Tensor) -> None:
        """Keep these nodes alone, in this order."""
        self._depths_M = self._depths_M[nodes_M]
        for kept in self._kept:
            kept.select(nodes_M)


class _Kept:
    """Keys and values of one block."""

    def __init__(self) -> None:
        self.key_1HME: Tensor | None = None
        self.value_1HME: Tensor | None = None

    def append(self, key_1HKE: Tensor, value_1HKE: Tensor) -> None:
        self.key_1HME, self.value_1HME = self.with_new(key_1HKE, value_1HKE)

    def with_new(self, key_1HKE: Tensor, value_1HKE: Tensor) -> tuple[Tensor, Tensor]:
        if self.key_1HME is None or self.value_1HME is None:
            return key_1HKE, value_1HKE
        keys = torch.cat([self.key_1HME, key_1HKE], dim=2)
        return keys, torch.cat([self.value_1HME, value_1HKE], dim=2)

    def select(self, nodes_M: Tensor) -> None:
        if self.key_1HME is not None and self.value_1HME is not None:
            self.key_1HME = self.key_1HME[:, :, nodes_M]
            self.value_1HME = self.value_1HME[:, :, nodes_M]


class _Call(PackedRows):
    """What the attention modules are told: one packed row whose mask is the tree."""

    def __init__(
        self,
        kept: list[_Kept],
        seen_KM: Tensor,
        depths_K: Tensor,
        depths_M: Tensor,
        part: PartModule,
    ) -> None:
        num_new = len(depths_K)
        kernel = row_kernel(part.layout.attention)
        super().__init__(Rows(lengths=(num_new,)), kernel, len(kept), None)
        self.depths_K = depths_K
        self.new: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept_states = kept
        self._seen_KN = torch.cat([seen_KM, torch.eye(num_new, dtype=torch.bool)], dim=1)
        self._age_KN = depths_K[:, None] - torch.cat([depths_M, depths_K])[None]
        self._tree_masks: dict[int | None, Tensor] = {}

    def seen(
        self, row: int, layer: int, window: int | None, key_1HqE: Tensor, value_1HqE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All nodes and all new tokens: the mask sorts them out."""
        self.new[layer] = key_1HqE, value_1HqE
        return self._kept_states[layer].with_new(key_1HqE, value_1HqE)

    def mask(self, query: Tensor, start: int, window: int | None) -> Tensor:
        """Additive mask [1, 1, K, M + K]; both kernels take that form."""
        if window not in self._tree_masks:
            seen_KN = self._seen_KN if window is None else self._seen_KN & (self._age_KN < window)
            lowest = torch.finfo(query.dtype).min
            zeros_KN = torch.zeros(seen_KN.shape, dtype=query.dtype)
            self._tree_masks[window] = zeros_KN.masked_fill(~seen_KN, lowest)[None, None]
        return self._tree_masks[window]
