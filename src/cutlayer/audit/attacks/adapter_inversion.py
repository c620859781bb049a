"""Which tokens taught an adapter: those whose embeddings span its update.

It reads updates that left in the open, and orders nothing: a span has no positions. It is exact for
plain gradients of fewer tokens than the update has rows. AdamW divides every value by its own
root, which destroys the span: then it says nothing, as far as it can tell.

Shapes: V = vocabulary, D = hidden size, M = rows of the stacked update, K = its rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess, time_limit
from cutlayer.audit.evidence import Evidence, Update
from cutlayer.audit.knowledge import Knowledge
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import initial_state
from cutlayer.model.partition import Head
from cutlayer.model.rows import pack

__all__ = ["AdapterInversion"]

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_LAYERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")
"""What the first block applies to its normed input, by the families' names."""
_RANK_TOLERANCE = 1e-4
_CLOSE = 0.1
"""Share of the median distance below which a token is taken to be in the span."""
_CHUNK = 4096
_DEFAULT_SEED = 0
"""`AdapterSettings.seed` unless an owner changes it; the server is told it anyway."""


class _Seen(Exception):
    """Ends a forward once the first layer's input is known."""


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Vectors that the update is made of, and what each token would have put there."""

    rows_MD: Tensor = field(repr=False)
    candidates_VD: Tensor = field(repr=False)


@ATTACKS.register("adapter_inversion")
class AdapterInversion:
    """Checks every token of the vocabulary against the span of the first block's update.

    The gradient of lora_A of a layer is a sum over tokens of something times the layer's input, so
    its rows lie in the span of the inputs, which in the first block are normed embeddings. As long
    as lora_B is zero, lora_A has no gradient: then the gradient of lora_B lies in the span of
    lora_A times the inputs. A row's last token predicts nothing and so leaves no trace.

    Source: Petrov et al., DAGER (arXiv 2405.15586), section 4.1; its search over sequences, and
    UTR (arXiv 2601.17533), go on from here.
    """

    aim = Aim.BAG
    about = "span check of adapter updates (DAGER, arXiv 2405.15586)"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """One bag of tokens per update; empty where the update has no span, or time ended.

        Raises:
            ConfigError: no update left in the open, or the head has no adapted attention layer.
        """
        if not evidence.updates:
            raise ConfigError(
                "adapter_inversion needs adapter updates that left in the open; this recording has "
                "none: it is of a single run, or the federation aggregates securely"
            )
        is_time_up = time_limit(effort)
        paths = _first_layers(evidence.updates[0], knowledge)
        inputs_VD = _first_inputs(knowledge.parts[0], paths[0])
        guesses = []
        for number, update in enumerate(evidence.updates, start=1):
            if is_time_up():
                guesses.append(
                    Guess(number=update.round, tokens=(), confidences=(), num_unfinished=1)
                )
                continue
            guesses.append(_guess(update, paths, inputs_VD))
            effort.on_progress(number / len(evidence.updates))
        return guesses


def _first_layers(update: Update, knowledge: Knowledge) -> list[str]:
    """Paths of the first block's attention inputs that the update has, in the unsplit model."""
    found = sorted(
        key.removeprefix(_PREFIX).removesuffix(_A)
        for key in update.tensors
        if key.endswith(_A) and ".0." in key
    )
    paths = [path for path in found if path.rpartition(".")[2] in _LAYERS]
    if knowledge.cut.lower == 0 or not paths:
        raise ConfigError(
            "adapter_inversion needs the update of the first block's attention layers; "
            f"the cut is {knowledge.cut.lower}, layers of block 0 in the update: {len(found)}"
        )
    return paths


@torch.no_grad()
def _first_inputs(head: Head, path: str) -> Tensor:
    """What each token alone gives to the first block's attention layers, [V, D]."""
    layer = next(m for name, m in head.named_modules() if head.global_name(name) == path)
    seen: list[Tensor] = []

    def stop(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2).float())
        raise _Seen

    hook = layer.register_forward_pre_hook(stop)
    num_tokens = head.base.get_input_embeddings().weight.shape[0]
    try:
        for begin in range(0, num_tokens, _CHUNK):
            try:
                head(pack([[token] for token in range(begin, min(begin + _CHUNK, num_tokens))]))
            except _Seen:
                continue
    finally:
        hook.remove()
    return torch.cat(seen)


def _guess(update: Update, paths: list[str], inputs_VD: Tensor) -> Guess:
    tensors = update.tensors
    stacked_MD = torch.cat([tensors[f"{_PREFIX}{path}{_A}"].float() for path in paths])
    if bool(stacked_MD.any()):
        span = _Span(rows_MD=stacked_MD, candidates_VD=inputs_VD)
    else:
        # Of the values, last by name: queries have no gradient at a row's first token.
        span = _output_span(tensors, paths[-1], inputs_VD)
    distances_V = _distances(span)
    # Of one that spans everything no token is far: it tells nothing.
    limit = _CLOSE * float(distances_V.median())
    found = (distances_V < limit).nonzero().squeeze(1)
    found = found[distances_V[found].argsort()]
    confidences = (1 - distances_V[found] / max(limit, 1e-30)).clamp(0, 1)
    return Guess(
        number=update.round,
        tokens=tuple(found.tolist()),
        confidences=tuple(confidences.tolist()),
    )


def _output_span(tensors: Mapping[str, Tensor], path: str, inputs_VD: Tensor) -> _Span:
    """By lora_B, where lora_A is still what everybody begins with."""
    key = f"{_PREFIX}{path}{_A}"
    start = initial_state({key: tuple(tensors[key].shape)}, _DEFAULT_SEED)
    return _Span(
        rows_MD=tensors[f"{_PREFIX}{path}{_B}"].float(), candidates_VD=inputs_VD @ start[key].T
    )


def _distances(span: _Span) -> Tensor:
    """Relative distance [V] of each candidate from the span; 1 where the span is empty or whole."""
    _, sizes_K, basis_KD = torch.linalg.svd(span.rows_MD, full_matrices=False)
    rank = int((sizes_K > _RANK_TOLERANCE * sizes_K[0]).sum()) if bool(sizes_K[0] > 0) else 0
    if rank == 0 or rank >= min(span.rows_MD.shape):
        # As many directions as rows: there may be more tokens than these can tell.
        return torch.ones(len(span.candidates_VD))
    basis_KD, candidates_VD = basis_KD[:rank], span.candidates_VD
    rest_VD = candidates_VD - candidates_VD @ basis_KD.T @ basis_KD
    sizes_V = candidates_VD.norm(dim=1)
    # The embedding of padding is zero, which lies in every span.
    is_empty_V = sizes_V < 1e-6 * sizes_V.max()
    distances_V: Tensor = rest_VD.norm(dim=1) / sizes_V.clamp_min(1e-30)
    return distances_V.masked_fill(is_empty_V, 1.0)
