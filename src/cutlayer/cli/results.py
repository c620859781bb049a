"""What owners' commands print, be the later blocks a trunk and a tail or in an enclave.

It opens no owner and trains nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.cli.output import Output, format_bytes

if TYPE_CHECKING:
    from cutlayer.cli.progress import TrainingProgress
    from cutlayer.client.owner import DataOwner
    from cutlayer.client.run_state import Progress

__all__ = [
    "print_exported",
    "print_replies",
    "print_training",
    "reply_pairs",
    "training_totals",
]


def print_replies(owner: "DataOwner", prompts: Sequence[str], out: Output) -> list[str]:
    """One reply streams; several are made together and printed one after the other."""
    if len(prompts) == 1:
        replies = owner.generate(prompts, on_piece=lambda piece: out.stream(piece.text))
        out.stream("\n")
        return replies
    replies = owner.generate(prompts)
    for number, reply in enumerate(replies, 1):
        out.say(f"[{number}] {reply}")
    return replies


def reply_pairs(prompts: Sequence[str], replies: Sequence[str]) -> list[dict[str, str]]:
    """For JSON: each prompt with its reply."""
    pairs = zip(prompts, replies, strict=True)
    return [{"prompt": asked, "reply": reply} for asked, reply in pairs]


def print_exported(step: int, output: Path, merge: Path | None, out: Output) -> None:
    """Where the adapter of a step was written, and the merged model."""
    out.say(f"adapter of step {step} written to {output}")
    if merge is not None:
        out.say(f"model with the adapter merged in written to {merge}")
    out.result({"step": step, "output": str(output), "merged": merge and str(merge)})


def training_totals(
    owner: "DataOwner", progress: "Progress", shown: "TrainingProgress"
) -> dict[str, object]:
    """Steps, losses, time and bytes of a training."""
    losses = [record.loss for record in progress.history]
    validation = list(progress.evaluations.values())
    num_tokens = max(1, shown.num_tokens)
    return {
        "step": progress.step,
        "best_step": progress.best_step,
        "new_steps": shown.num_steps,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "validation_loss": validation[-1] if validation else None,
        "seconds": round(shown.seconds, 3),
        "tokens_per_s": round(shown.num_tokens / shown.seconds, 2),
        "bytes_up": owner.trunk.bytes_sent,
        "bytes_down": owner.trunk.bytes_received,
        "bytes_up_per_token": round(owner.trunk.bytes_sent / num_tokens, 2),
        "bytes_down_per_token": round(owner.trunk.bytes_received / num_tokens, 2),
    }


def print_training(
    result: dict[str, object], unit: str, measured: str, guarantee: str, out: Output
) -> None:
    """One line on a training.

    Args:
        result: with `training_totals`.
        unit: of `step`: step or round.
        measured: what else was counted.
        guarantee: what protects what left.
        out: where it goes.
    """
    if not result["new_steps"]:
        out.say(f"{unit} {result['step']}: there was nothing left to train")
        return
    up, down = result["bytes_up_per_token"], result["bytes_down_per_token"]
    assert isinstance(up, float)
    assert isinstance(down, float)
    out.say(
        f"{unit} {result['step']}: loss {result['loss_first']:.4f} to {result['loss_last']:.4f}, "
        f"{measured}, per token {format_bytes(up)} up and {format_bytes(down)} down; {guarantee}"
    )
