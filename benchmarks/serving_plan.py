"""What the serving benchmark measures in each profile: models, lengths, repeats.

It measures nothing. The standard profile is planned for under 15 minutes on two idle cores.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.report import Arguments
from benchmarks.serving_clients import ClientsCase
from benchmarks.serving_link import CODEC, LinkCase
from benchmarks.serving_local import LocalCase
from benchmarks.serving_naive import timed_lengths
from benchmarks.serving_prompts import free_prompts, long_prompt, source_prompts
from benchmarks.serving_world import ServedModel, served_model
from benchmarks.subjects import (
    subject_folder,
    write_small_llama,
    write_text_llama,
)

__all__ = ["PetalsShape", "Plan", "make_plan"]


@dataclass(frozen=True, kw_only=True)
class PetalsShape:
    """A shape that Petals was measured with, one thread a side, all blocks remote."""

    case: LocalCase
    petals_share: float
    """Of the local speed that Petals reached with one stream."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All parts."""

    small: LocalCase
    real: LocalCase | None
    """None, in a smoke run, is the small one."""
    petals: list[PetalsShape]
    clients: ClientsCase
    link: LinkCase
    naive_threads: tuple[int, ...]
    naive_forms: dict[str, int]
    """Other mask forms, and at how many lengths each is timed."""
    wire_model: ServedModel
    wire_codec: str
    wire_steps: int
    sampling_model: ServedModel
    sampling_drafts: tuple[str, ...]
    draft_model: str
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What differs between the profiles."""

    prompt: int
    new: int
    real_new: int
    repeats: int
    passage: int
    per_style: int
    num_free: int
    link_new: int
    long_prompt: int
    long_new: int
    wire_steps: int
    num_samples: int
    naive_forms: dict[str, int]


_SIZES = {
    "smoke": _Sizes(
        prompt=16,
        new=8,
        real_new=8,
        repeats=1,
        passage=64,
        per_style=1,
        num_free=1,
        link_new=8,
        long_prompt=192,
        long_new=9,
        wire_steps=60,
        num_samples=64,
        naive_forms={"lengths": 2},
    ),
    "standard": _Sizes(
        prompt=128,
        new=128,
        real_new=48,
        repeats=3,
        passage=256,
        per_style=2,
        num_free=3,
        link_new=64,
        long_prompt=512,
        long_new=128,
        wire_steps=500,
        num_samples=1600,
        naive_forms={"lengths": 4, "2d": 2, "dense-max": 2},
    ),
}
_PETALS_SHARES = {(512, 8): 0.54, (1024, 16): 0.74}
"""Measured: hidden size and blocks of a random Llama, and Petals' share of local speed."""
_NUM_STREAMS = 8
_SHARPER = 30.0
"""Factor of the guessing model's logits: random ones are sure of nothing."""


def make_plan(arguments: Arguments, num_clients: int, work: Path) -> Plan:
    """The profile's plan; models that it needs are written to `work` or fetched."""
    sizes = _SIZES[arguments.profile]
    tiny = served_model("tiny", write_text_llama(work / "tiny"), 2)
    small = tiny
    if not arguments.is_smoke:
        small = served_model("15M", write_small_llama(work / "small"), 1)
    is_tiny = arguments.is_smoke and arguments.model is None
    real = tiny if is_tiny else _real_model(arguments, work)
    threads = arguments.threads[:1] if arguments.is_smoke else arguments.threads
    return Plan(
        small=_local(small, sizes, sizes.new, threads),
        real=None if is_tiny else _local(real, sizes, sizes.real_new, threads),
        petals=[] if arguments.is_smoke else _petals(sizes, work),
        clients=ClientsCase(
            model=small,
            num_clients=num_clients,
            prompt_length=16,
            new_tokens=sizes.new,
            repeats=sizes.repeats,
            server_threads=1,
        ),
        link=_link(real, arguments, sizes, _passages(arguments)),
        naive_threads=threads,
        naive_forms=sizes.naive_forms,
        # A smoke run keeps to few processes: it shares the link's.
        wire_model=tiny if arguments.is_smoke else _wire_model(work),
        wire_codec=CODEC if is_tiny else "raw",
        wire_steps=sizes.wire_steps,
        sampling_model=tiny,
        sampling_drafts=("lookup",) if arguments.is_smoke else ("lookup", "model"),
        draft_model=str(_draft_model(work / "draft")),
        num_samples=sizes.num_samples,
    )


def _real_model(arguments: Arguments, work: Path) -> ServedModel:
    folder = subject_folder(arguments.model, is_smoke=arguments.is_smoke, work_folder=work)
    return served_model("135M" if arguments.model is None else folder.name, folder, 2)


def _local(
    model: ServedModel, sizes: _Sizes, new_tokens: int, threads: tuple[int, ...]
) -> LocalCase:
    return LocalCase(
        model=model,
        prompt_length=sizes.prompt,
        new_tokens=new_tokens,
        num_streams=_NUM_STREAMS,
        threads=threads,
        repeats=sizes.repeats,
    )


def _petals(sizes: _Sizes, work: Path) -> list[PetalsShape]:
    shapes = []
    for (hidden, num_blocks), share in _PETALS_SHARES.items():
        name = f"Llama {hidden} x {num_blocks}"
        folder = _write_llama(work / f"petals-{hidden}", hidden, num_blocks, 32000)
        model = served_model(name, folder, 0, num_blocks)
        case = LocalCase(
            model=model,
            prompt_length=16,
            new_tokens=40,
            num_streams=_NUM_STREAMS,
            threads=(1,),
            repeats=sizes.repeats,
            num_alone=2,
        )
        shapes.append(PetalsShape(case=case, petals_share=share))
    return shapes


def _wire_model(work: Path) -> ServedModel:
    """One block and few tokens: what remains of a step is what it costs to take it."""
    return served_model("one block", _write_llama(work / "wire", 64, 1, 256), 0, 1)


def _draft_model(folder: Path) -> Path:
    """A model that is sure of the token which `tiny` likes most: it is right now and then."""
    model = LlamaForCausalLM.from_pretrained(write_text_llama(folder))
    with torch.no_grad():
        model.lm_head.weight.mul_(_SHARPER)
    model.save_pretrained(folder)
    return folder


def _link(model: ServedModel, arguments: Arguments, sizes: _Sizes, texts: Path | None) -> LinkCase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.folder)
    eos = tokenizer.eos_token_id
    return LinkCase(
        model=model,
        num_threads=max(arguments.threads),
        prompts=[
            *source_prompts(tokenizer, texts, sizes.passage, sizes.per_style),
            *free_prompts(tokenizer, sizes.num_free),
        ],
        eos_ids=[] if arguments.is_smoke or eos is None else [int(eos)],
        new_tokens=sizes.link_new,
        long_prompt=long_prompt(tokenizer, texts, sizes.long_prompt),
        long_new_tokens=sizes.long_new,
        long_repeats=1 if arguments.is_smoke else 2,
        draft="lookup",
        uncached_lengths=timed_lengths(sizes.long_prompt, sizes.long_new),
    )


def _passages(arguments: Arguments) -> Path | None:
    if arguments.is_smoke:
        return None
    # Imported late: the smoke profile needs no asset and no network.
    from cutlayer.data.assets import fetch

    return fetch("bbcnews")


def _write_llama(folder: Path, hidden_size: int, num_blocks: int, vocab_size: int) -> Path:
    """A random Llama with the usual proportions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_blocks,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
