"""What attacks are measured on: a model, private rows, and public text of another kind.

It measures nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.subjects import write_text_llama
from cutlayer.audit.attack import ATTACKS
from cutlayer.audit.material import make_bench
from cutlayer.audit.settings import AuditPlan
from cutlayer.audit.trial import Bench, Case
from cutlayer.client.local_run import on_this_machine
from cutlayer.client.settings import ClientSettings
from cutlayer.data.assets import fetch
from cutlayer.data.domains import domain_settings, domains, write_domain
from cutlayer.model.folder import resolve_model
from cutlayer.settings import parse_settings

__all__ = ["Subject", "real_subject", "same_norm_noise", "tiny_subject"]

_WORDS = ("ward", "court", "ship", "film", "team", "dose", "loan", "road")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What all recordings of a benchmark share."""

    bench: Bench


def tiny_subject(folder: Path, model: str | None) -> Subject:
    """A tiny random model with byte tokens and a few made-up rows."""
    path = write_text_llama(folder / "tiny") if model is None else Path(model)
    rows = folder / "rows.jsonl"
    records = [{"text": f"{a} {b}", "kind": "ab"[i % 2]} for i, (a, b) in enumerate(_pairs())]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    public = folder / "public.txt"
    public.write_text("".join(f"the {word} of the other town\n" for word in _WORDS))
    data: dict[str, object] = {
        "train": str(rows),
        "prompt_template": "{text}:",
        "completion_template": "{kind}",
        "chat_template": False,
        "append_eos": False,
    }
    return _subject(path, data, public=str(public), rows=4, min_tokens=20, public_rows=8)


def real_subject(folder: Path, model: str | None) -> Subject:
    """SmolLM2-135M; product reviews are private, news is public."""
    path = Path(resolve_model(model or str(fetch("smollm2"))).path)
    chosen = domains(fetch("sentiment"), 0, 60, 20, ("amazon",))["amazon"]
    (folder / "rows").mkdir()
    data = domain_settings(*write_domain(chosen, folder / "rows"))
    table = data.model_dump(mode="json")
    return _subject(path, table, public="asset:bbcnews", rows=24, min_tokens=320, public_rows=1500)


def same_norm_noise(case: Case, seed: int = 0) -> Case:
    """The same case with noise in place of every tensor, each vector with its old norm."""
    generator = torch.Generator().manual_seed(seed)

    def noised(x_LD: Tensor | None) -> Tensor | None:
        return None if x_LD is None else _like(x_LD, generator)

    observations = tuple(
        replace(
            seen,
            h_LD=_like(seen.h_LD, generator),
            y_LD=noised(seen.y_LD),
            gradient_LD=noised(seen.gradient_LD),
            input_gradient_LD=noised(seen.input_gradient_LD),
        )
        for seen in case.evidence.observations
    )
    return replace(case, evidence=replace(case.evidence, observations=observations))


def _like(x_LD: Tensor, generator: torch.Generator) -> Tensor:
    noise_LD = torch.randn(x_LD.shape, generator=generator)
    scale_L1: Tensor = x_LD.norm(dim=1, keepdim=True) / noise_LD.norm(dim=1, keepdim=True)
    return noise_LD * scale_L1


def _subject(model: Path, data: Mapping[str, object], **plan: object) -> Subject:
    table = {
        "model": {"path": str(model), "lower": 1, "upper": 2},
        "connection": {"address": "127.0.0.1:1", "plaintext": True, "codec": "bf16"},
        "privacy": {"mechanism": "none"},
        "data": dict(data),
        "train": {"steps": 1},
    }
    client = parse_settings(ClientSettings, table, "the benchmark's client")
    settings = {"client": "client.toml", "utility_rows": 0, "canaries": 0, **plan}
    folder = resolve_model(str(model))
    audit = AuditPlan.model_validate(settings)
    bench = make_bench(audit, on_this_machine(client, folder.path), folder, ATTACKS.names)
    return Subject(bench=bench)


def _pairs() -> list[tuple[str, str]]:
    return [(a, b) for a in _WORDS for b in _WORDS if a != b][:12]
