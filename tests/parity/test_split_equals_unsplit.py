"""Head, trunk and tail of every family against the unsplit model of transformers.

In float32: bit for bit where a row is alone, within 1e-5 where ragged rows are packed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cutlayer.model.checkpoint import load_parts
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.loss import NOT_SCORED, completion_loss_sum
from cutlayer.model.partition import Cut, Head, PartModule, Tail, Trunk
from cutlayer.model.rows import Rows, pack
from tests.tiny_models import EXTRA_FAMILIES, FAMILIES, NUM_BLOCKS, tiny_model

TOLERANCE = 1e-5
NUM_DECODE_STEPS = 12
# Longer than every sliding window, shorter, and in between; the first row alone too.
ROWS = [[(7 * i + 3 * n) % 250 for i in range(n)] for n in (9, 3, 14, 1)]
CUT = Cut(1, NUM_BLOCKS - 1)

Caches = list[list[RowCache]]


@dataclass
class Split:
    """The three parts and the model that they must equal."""

    folder: Path
    unsplit: PreTrainedModel
    head: Head
    trunk: Trunk
    tail: Tail

    @property
    def parts(self) -> tuple[PartModule, PartModule, PartModule]:
        return self.head, self.trunk, self.tail

    def logits(self, rows: Rows, caches: Caches | None = None) -> Tensor:
        own = caches or [None, None, None]
        return self.tail(self.trunk(self.head(rows, own[0]), rows, own[1]), rows, own[2])

    def caches(self, num_rows: int) -> Caches:
        return [[RowCache(len(p.block_range), 64) for _ in range(num_rows)] for p in self.parts]


def split(family: str, tmp_path: Path, cut: Cut = CUT) -> Split:
    folder, unsplit = tiny_model(family, tmp_path)
    return Split(folder, unsplit, *load_parts(folder, cut))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def promised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=sorted(EXTRA_FAMILIES))
def extra(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(request.param, tmp_path_factory.mktemp("model"))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative where the values are larger than 1."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).detach().abs().max()
    return float(difference / theirs.detach().abs().max().clamp(min=1.0))


def unsplit_rows(model: PreTrainedModel) -> list[Tensor]:
    return [model(torch.tensor([row])).logits[0] for row in ROWS]


def check_rows_alone(split: Split) -> None:
    for row, theirs in zip(ROWS, unsplit_rows(split.unsplit), strict=True):
        assert torch.equal(split.logits(pack([row])), theirs)


def check_packed_rows(split: Split) -> None:
    theirs = torch.cat(unsplit_rows(split.unsplit))
    assert distance(split.logits(pack(ROWS)), theirs) <= TOLERANCE


def decode_unsplit(model: PreTrainedModel) -> Iterator[Tensor]:
    """Logits of the last token of each row, step by step; the greedy token is fed back."""
    caches = [DynamicCache(config=model.config) for _ in ROWS]
    tokens: Sequence[Sequence[int]] = ROWS
    for _ in range(NUM_DECODE_STEPS + 1):
        steps = zip(tokens, caches, strict=True)
        logits = [
            model(torch.tensor([row]), past_key_values=cache, use_cache=True).logits[0, -1]
            for row, cache in steps
        ]
        tokens = [[int(row.argmax())] for row in logits]
        yield torch.stack(logits)


def check_decode(split: Split) -> None:
    caches = split.caches(len(ROWS))
    rows = pack(ROWS)
    for theirs in decode_unsplit(split.unsplit):
        last = torch.tensor(rows.offsets[1:]) - 1
        ours = split.logits(rows, caches)[last]
        assert distance(ours, theirs) <= TOLERANCE
        tokens = [[int(row.argmax())] for row in theirs]
        rows = pack(tokens, starts=[cache.length for cache in caches[0]])
    ends = [len(row) + NUM_DECODE_STEPS for row in ROWS]
    assert [cache.length for cache in caches[2]] == ends


@torch.no_grad()
def test_each_row_alone_equals_the_unsplit_model_to_the_bit(promised: Split) -> None:
    check_rows_alone(promised)


@torch.no_grad()
def test_packed_ragged_rows_equal_the_unsplit_model(promised: Split) -> None:
    check_packed_rows(promised)


@torch.no_grad()
def test_cached_decode_of_ragged_rows_equals_the_unsplit_model(promised: Split) -> None:
    check_decode(promised)


@torch.no_grad()
def test_cached_decode_of_one_row_equals_the_unsplit_model_to_the_bit(promised: Split) -> None:
    row = ROWS[2]
    cache, caches = DynamicCache(config=promised.unsplit.config), promised.caches(1)
    rows = pack([row])
    for _ in range(NUM_DECODE_STEPS):
        theirs = promised.unsplit(
            rows.tokens_N[None], past_key_values=cache, use_cache=True
        ).logits[0, -1]
        assert torch.equal(promised.logits(rows, caches)[-1], theirs)
        rows = pack([[int(theirs.argmax())]], starts=[caches[0][0].length])


@torch.no_grad()
@pytest.mark.parametrize("cut", [Cut(0, NUM_BLOCKS), Cut(0, 1), Cut(3, 4), Cut(2, 4)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "granite", "smollm3"])
def test_every_cut_equals_the_unsplit_model_to_the_bit(
    family: str, cut: Cut, tmp_path: Path
) -> None:
    check_rows_alone(split(family, tmp_path, cut))


def linear_names(model: nn.Module) -> list[str]:
    linear = (nn.Linear, Conv1D)
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, linear)}
    return sorted(names - {"lm_head"})


def lora_settings(model: PreTrainedModel) -> peft.LoraConfig:
    is_transposed = any(isinstance(module, Conv1D) for module in model.modules())
    return peft.LoraConfig(
        r=4,
        target_modules=linear_names(model),
        init_lora_weights=False,
        fan_in_fan_out=is_transposed,
    )


def lora_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if "lora_" in name}


def inject_lora(split: Split, whole: nn.Module, settings: peft.LoraConfig) -> dict[str, Tensor]:
    """LoRA on the parts with the whole model's weights; their parameters by global name."""
    theirs = {n.removeprefix("base_model.model."): p for n, p in lora_weights(whole).items()}
    ours: dict[str, Tensor] = {}
    for part in split.parts:
        peft.inject_adapter_in_model(settings, part.base)
        for name, parameter in lora_weights(part).items():
            ours[part.global_name(name)] = parameter
            with torch.no_grad():
                parameter.copy_(theirs[part.global_name(name)])
    assert ours.keys() == theirs.keys()
    return ours


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_every_lora_gradient_equal_the_unsplit_model(family: str, tmp_path: Path) -> None:
    model = split(family, tmp_path)
    settings = lora_settings(model.unsplit)
    whole = peft.get_peft_model(model.unsplit, settings)
    ours = inject_lora(model, whole, settings)
    labels = [[NOT_SCORED] * (len(row) // 2) + row[len(row) // 2 :] for row in ROWS]

    their_loss = torch.zeros(())
    num_scored = 0
    for row, label in zip(ROWS, labels, strict=True):
        logits = whole(torch.tensor([row])).logits[0, :-1]
        targets = torch.tensor(label[1:], dtype=torch.int64)
        their_loss = their_loss + nn.functional.cross_entropy(logits, targets, reduction="sum")
        num_scored += int((targets != NOT_SCORED).sum())
    (their_loss / num_scored).backward()

    rows = pack(ROWS)
    y_ND = model.trunk(model.head(rows), rows)
    loss_sum, num_tokens = completion_loss_sum(
        model.tail, y_ND, rows, torch.tensor([x for label in labels for x in label])
    )
    (loss_sum / num_tokens).backward()

    assert num_tokens == num_scored
    assert distance(loss_sum / num_tokens, their_loss / num_scored) <= TOLERANCE
    for name, parameter in lora_weights(whole).items():
        gradient = ours[name.removeprefix("base_model.model.")].grad
        assert gradient is not None, name
        assert distance(gradient, parameter.grad) <= TOLERANCE, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_families_of_the_usual_layout_come_for_free(extra: Split) -> None:
    check_rows_alone(extra)
    check_packed_rows(extra)
    check_decode(extra)
