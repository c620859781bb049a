"""Losses of a federation with the strategy `every_step` against centralised training.

K owners over mutual TLS with secure aggregation as by default, one server, one process; against
unsplit PEFT on the union of their rows with one AdamW. It measures no time.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from benchmarks.parity_server import parity_client, parity_server
from benchmarks.split import make_kits
from benchmarks.subjects import write_text_llama
from benchmarks.unsplit import new_peft_model
from cutlayer import Client
from cutlayer.client.run_state import StepRecord
from cutlayer.client.train import Report
from cutlayer.data.template import Example
from cutlayer.model.adapters import initial_state

__all__ = ["compare_losses"]

_LR, _BETA1, _BETA2 = 2e-3, 0.9, 0.999
_NAME = "parity"
_TOPICS = ("trade", "music", "law", "sport")


def compare_losses(folder: Path, num_clients: int, num_steps: int) -> float:
    """Largest relative difference of a step's loss, over all steps."""
    model = write_text_llama(folder / "text-llama")
    names = [f"member{number}" for number in range(num_clients)]
    kits = make_kits(folder / "loss-kits", names)
    with ExitStack() as stack:
        server = stack.enter_context(
            parity_server(
                model, folder / "loss-state", kits.server, _federation(num_clients, num_steps)
            )
        )
        clients = [
            stack.enter_context(
                parity_client(
                    model, folder / name, server.port, kits.clients[name], _owner(folder, number)
                )
            )
            for number, name in enumerate(names)
        ]
        with ThreadPoolExecutor(num_clients) as threads:
            records = list(threads.map(_train, clients))
        examples = [example for client in clients for example in client.rows().train]
    ours = [_mean_loss([own[step] for own in records]) for step in range(1, num_steps + 1)]
    theirs = _centralised(model, examples, num_steps)
    if not theirs[-1] < theirs[0]:
        raise RuntimeError(f"nothing was learnt: losses {theirs[0]} to {theirs[-1]}")
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def _federation(num_clients: int, num_steps: int) -> dict[str, dict[str, object]]:
    strategy = {"kind": "every_step", "lr": _LR, "beta1": _BETA1, "beta2": _BETA2}
    return {
        "federation": {
            "name": _NAME,
            "rounds": num_steps,
            "adapter": {"rank": 8, "alpha": 16},
            "strategy": strategy,
            # Nobody may miss a step, or the union of the rows is another one.
            "min_members": num_clients,
            "quorum": num_clients,
        }
    }


def _owner(folder: Path, number: int) -> dict[str, dict[str, object]]:
    """Settings of an owner whose rows, ragged and of its own number, are all in every step."""
    num_rows = 3 + 2 * number
    rows = [
        {"text": "ab" * (1 + (place + number) % 7), "topic": _TOPICS[(place + number) % 4]}
        for place in range(num_rows)
    ]
    path = folder / f"rows{number}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "federation": {"name": _NAME},
        "data": {
            "train": str(path),
            "prompt_template": "{text}:",
            "completion_template": " {topic}",
            "chat_template": False,
        },
        "train": {"rows_per_step": num_rows, "micro_batch_rows": 2},
    }


def _train(client: Client) -> dict[int, StepRecord]:
    """What the owner saw of each step; a repeated attempt of a round has the same loss."""
    seen: dict[int, StepRecord] = {}

    def on_step(report: Report) -> None:
        seen[report.record.step] = report.record

    client.train(on_step)
    return seen


def _mean_loss(records: Sequence[StepRecord]) -> float:
    """Over all scored tokens of all members."""
    total = sum(record.num_scored for record in records)
    return sum(record.loss * record.num_scored for record in records) / total


def _centralised(model: Path, examples: Sequence[Example], num_steps: int) -> list[float]:
    """Losses of unsplit PEFT on all rows in every step, row by row."""
    peft_model = new_peft_model(AutoModelForCausalLM.from_pretrained(model))
    trained = [(n, p) for n, p in peft_model.named_parameters() if p.requires_grad]
    layout = {name.replace(".default", ""): list(p.shape) for name, p in trained}
    set_peft_model_state_dict(peft_model, initial_state(layout, seed=0))
    adamw = torch.optim.AdamW(
        [p for _, p in trained], lr=_LR, betas=(_BETA1, _BETA2), weight_decay=0.0
    )
    num_scored = sum(label >= 0 for example in examples for label in example.labels)
    losses = []
    for _ in range(num_steps):
        loss_sum = 0.0
        for example in examples:
            logits = peft_model(torch.tensor([example.tokens])).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor(example.labels[1:]), ignore_index=-100, reduction="sum"
            )
            torch.autograd.backward(loss / num_scored)
            loss_sum += float(loss.detach())
        adamw.step()
        adamw.zero_grad()
        losses.append(loss_sum / num_scored)
    return losses
