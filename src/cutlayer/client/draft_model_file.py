"""A small local model that guesses: where it comes from, and whether it may guess for this model.

It does not decide what to guess (`draft_model`). It runs on the project's own parts, uncut, so a
rejected guess is a truncation of the cache and no code of a checkpoint is ever run.

Shapes: N = new tokens, D = hidden size, V = vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cutlayer.errors import ConfigError
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.partition import Cut, Head, Tail, Trunk
from cutlayer.model.rows import pack

__all__ = ["SmallModel", "load_small_model"]

_PROBE = "Größe 12,345.6\n\n\tif x_1 != 'it''s': return  # naïve — 日本語 🙂"
"""Equal vocabularies may still merge differently; such text shows it."""
_WHERE = "generation.speculation.model"
_LONG_CONTEXT = 2**20
"""Where a model does not say how long its context is."""


class SmallModel:
    """The weights, shared by all streams; each stream has a row of its own."""

    def __init__(self, parts: tuple[Head, Trunk, Tail], vocab_size: int) -> None:
        """Take loaded parts.

        Args:
            parts: of the whole small model.
            vocab_size: logits of the model that verifies, V.
        """
        self._parts = parts
        self._vocab_size = vocab_size

    def new_row(self) -> "SmallModelRow":
        """A row without tokens."""
        return SmallModelRow(self._parts, self._vocab_size)


class SmallModelRow:
    """One stream's caches over the small model; a `NextTokenModel`."""

    def __init__(self, parts: tuple[Head, Trunk, Tail], vocab_size: int) -> None:
        self._parts = parts
        self._vocab_size = vocab_size
        self._caches = [RowCache(len(part.block_range), self.context_length) for part in parts]

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return self._caches[-1].length

    @property
    def context_length(self) -> int:
        """Tokens that it can hold."""
        return int(getattr(self._parts[0].config, "max_position_embeddings", _LONG_CONTEXT))

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        for cache in self._caches:
            cache.truncate(length)

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens, at least one; logits [V] after the last of them."""
        head, trunk, tail = self._parts
        rows = pack([tokens], [self.length])
        layout = rows.without_tokens()
        h_ND = trunk(head(rows, self._caches[:1]), layout, self._caches[1:2])
        logits_1V = tail(h_ND, layout, self._caches[2:], torch.tensor([len(tokens) - 1]))
        return _of_width(logits_1V[0].float().cpu(), self._vocab_size)


def load_small_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    dtype: str = "float32",
    device: str = "cpu",
) -> SmallModel:
    """Load the model that guesses.

    Args:
        name: folder, GGUF file or hub id.
        tokenizer: of the model that verifies; the small one must have the same.
        vocab_size: logits of the model that verifies, V.
        dtype: compute type of the small model.
        device: where it runs.

    Raises:
        ConfigError: another tokenizer; the text says where they differ.
        ModelError: it cannot be read.
    """
    folder = resolve_model(name)
    _check_tokenizer(folder, name, tokenizer)
    whole = Cut(0, folder.config.num_hidden_layers)
    return SmallModel(load_parts(folder, whole, dtype, device), vocab_size)


def _check_tokenizer(folder: ModelFolder, name: str, ours: PreTrainedTokenizerBase) -> None:
    theirs = folder.tokenizer()
    difference = _difference(ours, theirs)
    if difference is not None:
        raise ConfigError(
            f"{_WHERE}={name!r} cannot guess for this model: {difference}; choose a small model "
            'with the same tokenizer, or generation.speculation.kind = "lookup"'
        )


def _difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    our_ids, their_ids = ours.get_vocab(), theirs.get_vocab()
    if len(our_ids) != len(their_ids):
        return f"its tokenizer has {len(their_ids)} tokens, the model's own {len(our_ids)}"
    num_other = sum(their_ids.get(token) != index for token, index in our_ids.items())
    if num_other:
        return f"{num_other} tokens have another number in its tokenizer"
    if ours.encode(_PROBE) != theirs.encode(_PROBE):
        return "its tokenizer splits the same text differently"
    return None


def _of_width(logits_V: Tensor, vocab_size: int) -> Tensor:
    """Same tokenizer, other padding of the LM head: tokens that one side lacks cannot be drawn."""
    missing = vocab_size - len(logits_V)
    if missing <= 0:
        return logits_V[:vocab_size]
    return torch.cat([logits_V, logits_V.new_full((missing,), -torch.inf)])
