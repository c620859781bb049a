"""The script: reads a request, trains and scores, writes the response.

    python -m centralised REQUEST.json RESPONSE.json [--tied]

With --tied it ends when its stdin does.
"""

import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from .choices import score_choices
from .replies import write_replies
from .request import Request, read_request
from .tie import end_with_stdin
from .tokens import items_of, rows_of
from .training import train, with_adapter

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Answer the request of the first file into the second."""
    if "--tied" in arguments[2:]:
        end_with_stdin()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    request = read_request(Path(arguments[0]))
    torch.set_num_threads(request.threads)
    torch.set_default_device(request.device)
    Path(arguments[1]).write_text(json.dumps(_answer(request)), encoding="utf-8")


def _answer(request: Request) -> dict[str, object]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(request.model, local_files_only=True)
    base = AutoModelForCausalLM.from_pretrained(
        request.model, dtype=torch.float32, local_files_only=True
    ).to(request.device)
    model = base if request.adapter is None else with_adapter(base, request.adapter)
    rows = rows_of(tokenizer, request) if request.order else []
    # Before training: an item that does not fit is found at once.
    asked = items_of(tokenizer, request)
    begin_s = time.monotonic()
    losses = train(model, rows, request)
    trained_s = time.monotonic()
    model.eval()
    with torch.inference_mode():
        scores = score_choices(model, base, asked)
        replies = write_replies(model, tokenizer, asked, request)
    return {
        "losses": losses,
        "log_likelihoods": [scores.get(number, []) for number in range(len(asked))],
        "replies": [replies.get(number, "") for number in range(len(asked))],
        "train_seconds": trained_s - begin_s,
        "score_seconds": time.monotonic() - trained_s,
        "num_train_tokens": sum(len(rows[n].tokens) for step in request.order for n in step),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
