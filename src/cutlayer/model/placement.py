"""Which tensor of a checkpoint belongs where in the modules: prefixes, renames, fused experts.

It does not read tensors. Checkpoints keep names of the first release, modules of the newest:
experts, above all, are single matrices in files and one stacked tensor in memory.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cutlayer.errors import ModelError

__all__ = ["Placement", "Target", "place_all"]

_EXPERT = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<index>\d+)\."
    r"(?P<kind>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_HALVES: Mapping[str, Literal["gate", "up", "all"]] = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "all",
    "w2": "all",
}
_RENAMES = (
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
    (".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight"),
    (".block_sparse_moe.", ".mlp."),
    (".mlp.gate.weight", ".mlp.router.weight"),
    (".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
    (".mlp.moe_statics.", ".mlp.gate.moe_statics."),
    ("embed_out.", "lm_head."),
)
"""Old and new spelling; a name is tried as it is first."""
_DERIVED = re.compile(r"rotary_emb\.(?:\w+_)?inv_freq$|\.attn\.(?:masked_)?bias$")
"""What old releases saved although it follows from the config."""


@dataclass(frozen=True)
class Target:
    """Where one tensor of the checkpoint goes."""

    name: str
    """Of the tensor in the unsplit model's modules."""
    expert: int | None = None
    """Index in the stack of experts; None is the whole tensor."""
    half: Literal["gate", "up", "all"] = "all"
    """Rows of the expert's matrix: first half, second half or all."""

    def of(self, whole: Tensor) -> Tensor:
        """The view of the module's tensor that this one fills."""
        if self.expert is None:
            return whole
        piece = whole[self.expert]
        if self.half == "all":
            return piece
        middle = piece.shape[0] // 2
        return piece[:middle] if self.half == "gate" else piece[middle:]


@dataclass(frozen=True)
class Placement:
    """All tensors of a checkpoint, placed."""

    targets: Mapping[str, Target]
    """File's name -> where it goes; a name without an entry is derived from the config."""
    missing: frozenset[str]
    """Module names that no tensor of the file fills, where a tied one may."""


def place_all(
    file_names: Iterable[str],
    expected: Mapping[str, Tensor],
    prefix: str,
    may_miss: Sequence[str],
    ignored: Iterable[str],
) -> Placement:
    """Find every tensor's place and check that the checkpoint is complete and nothing more.

    Args:
        file_names: of the checkpoint.
        expected: all tensors of the unsplit model, on the meta device.
        prefix: of the base model, which some checkpoints leave out.
        may_miss: module names of which one may be absent (tied embedding and LM head).
        ignored: patterns of names that the architecture leaves unread.

    Raises:
        ModelError: names the missing or extra tensors.
    """
    patterns = [re.compile(pattern) for pattern in ignored]
    targets: dict[str, Target] = {}
    extra = []
    for name in sorted(file_names):
        target = _target(name, expected, prefix)
        if target is not None:
            targets[name] = target
        elif not _DERIVED.search(name) and not any(p.search(name) for p in patterns):
            extra.append(name)
    if extra:
        raise ModelError(
            f"the checkpoint has tensors that its config has no place for: {_some(extra)}; "
            "they are of another model, or of an architecture whose names cutlayer cannot translate"
        )
    return Placement(targets, _missing(targets.values(), expected, may_miss))


def _target(name: str, expected: Mapping[str, Tensor], prefix: str) -> Target | None:
    for spelling in _spellings(name, prefix):
        if spelling in expected:
            return Target(spelling)
        match = _EXPERT.fullmatch(spelling)
        if match is None:
            continue
        half = _HALVES[match["kind"]]
        fused = match["experts"] + (".down_proj" if half == "all" else ".gate_up_proj")
        if fused in expected and int(match["index"]) < expected[fused].shape[0]:
            return Target(fused, int(match["index"]), half)
    return None


def _spellings(name: str, prefix: str) -> list[str]:
    found = [name, f"{prefix}.{name}"]
    for old, new in _RENAMES:
        found += [spelling.replace(old, new) for spelling in found if old in spelling]
    return found


def _missing(
    targets: Iterable[Target], expected: Mapping[str, Tensor], may_miss: Sequence[str]
) -> frozenset[str]:
    filled: Counter[str] = Counter()
    for target in targets:
        whole = expected[target.name]
        filled[target.name] += target.of(whole).numel()
    missing = [name for name, whole in expected.items() if filled[name] != whole.numel()]
    tied = [name for name in missing if name in may_miss and not filled[name]]
    lacking = [name for name in missing if name not in tied]
    if lacking or len(tied) == len(may_miss) > 0:
        raise ModelError(
            f"the checkpoint lacks (or fills in part or twice) {_some(lacking or tied)}; "
            "download it again"
        )
    return frozenset(tied)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
