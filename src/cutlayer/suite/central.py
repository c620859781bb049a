"""The unsplit counterpart of a run: asks the independent script, and reads what it answers.

It trains nothing itself: `centralised` does, in a process of its own. Both sides of a comparison
begin with the same adapter and see the same rows in the same order.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cutlayer.errors import ConfigError, StorageError
from cutlayer.evaluation.published.question import Prediction, Question
from cutlayer.evaluation.published.task_files import TaskFolder
from cutlayer.model.adapter_settings import AdapterSettings
from cutlayer.model.adapters import AdapterState, initial_state, layout_of
from cutlayer.model.cut import Cut, Part
from cutlayer.model.exported_base import ADAPTER_WEIGHTS, ExportedBase
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import build_part
from cutlayer.model.prefix_export import write_prefix
from cutlayer.model.tensor_file import write_tensor_file
from cutlayer.storage.files import explain_os_errors, private_folder, write_atomic
from cutlayer.suite import centralised, recipe
from cutlayer.suite.compute import Compute
from cutlayer.suite.result import Figures
from cutlayer.suite.sharing import steps_of
from cutlayer.suite.spec import Method, RunSpec

__all__ = ["run_central"]

_REQUEST, _RESPONSE, _LOG = "request.json", "response.json", "log"
_REFUSED = 2
"""Status of the script where what it was asked cannot be done."""
_CLASS = re.compile(r"[A-Za-z_][\w.]*")
# Its folder goes to the end of the path: names beside it must not hide installed packages.
_START = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module('centralised', run_name='__main__', alter_sys=True)"
)


class _Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """As the script's own `Adapter`."""

    kind: str
    file: str
    rank: int
    alpha: float
    num_virtual_tokens: int


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """As the script's own `Request`."""

    model: str
    threads: int
    device: str
    train: str
    test: str
    context_length: int
    max_length: int
    append_eos: bool
    order: list[tuple[int, ...]]
    micro_batch_rows: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float
    adapter: _Adapter | None


class _Response(msgspec.Struct, frozen=True, kw_only=True):
    losses: tuple[float, ...]
    log_likelihoods: list[tuple[float, ...]]
    """Of each item, in order; none for a reply."""
    replies: list[str]
    """Of each item, in order; empty for a choice."""
    train_seconds: float
    score_seconds: float
    num_train_tokens: int


def run_central(
    spec: RunSpec, task: TaskFolder, folder: Path, compute: Compute, cache: Path | None
) -> Figures:
    """Train, unless the method is UNTUNED, and score, without the split model.

    Args:
        spec: the run.
        task: rows to learn and to score.
        folder: request, response and log go below it; it is made.
        compute: threads and device of torch.
        cache: of assets and converted models; None is the usual one.

    Raises:
        ConfigError: PEFT has no counterpart of the adapter, or the script refuses or fails.
        ModelError: the model cannot be read.
        DataError: no rows to learn, or files of the task are damaged.
        StorageError: the folder cannot be written, or the answer cannot be read.
    """
    model = recipe.open_model(spec, cache)
    # The script opens files alone: of a hub's model all of them have to be there.
    model.fetch_tokenizer()
    model.layout()
    place = private_folder(folder / "unsplit")
    request = _request(spec, task, model, place, compute)
    write_atomic(place / _REQUEST, msgspec.json.encode(request))
    _run_script(place, compute.threads)
    return _figures(_response(place / _RESPONSE), task.questions())


def _request(
    spec: RunSpec, task: TaskFolder, model: ModelFolder, folder: Path, compute: Compute
) -> _Request:
    is_untuned = spec.method is Method.UNTUNED
    train = recipe.train_settings(spec)
    context = int(model.config.max_position_embeddings)
    taken = 0 if is_untuned else recipe.adapter_settings(spec).num_positions
    assert train.clip_norm is not None
    adamw = train.optimizer
    return _Request(
        model=str(model.path),
        threads=compute.threads,
        device=compute.device,
        train=str(task.train),
        test=str(task.test),
        context_length=context - taken,
        max_length=recipe.max_length(spec, context),
        append_eos=task.data_settings().append_eos,
        order=[] if is_untuned else steps_of(spec, task),
        micro_batch_rows=spec.sizes.micro_batch_rows,
        lr=train.lr,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
        clip_norm=train.clip_norm,
        adapter=None if is_untuned else _adapter(spec, model, folder),
    )


def _adapter(spec: RunSpec, model: ModelFolder, folder: Path) -> _Adapter:
    """The fresh weights that a split run of this spec draws, as a file that PEFT reads."""
    settings = recipe.adapter_settings(spec)
    if spec.adapter == "sparse":
        raise ConfigError(
            "PEFT has no counterpart of the adapter 'sparse'; centralised runs take lora or prefix"
        )
    state = _fresh(spec, model, settings)
    with explain_os_errors(f"write the adapter to {folder}"):
        if spec.adapter == "prefix":
            write_prefix(folder, state, settings, ExportedBase(name=str(model.path), folder=model))
        else:
            write_tensor_file(folder / ADAPTER_WEIGHTS, state, state.__getitem__)
    return _Adapter(
        kind=spec.adapter,
        file=str(folder / ADAPTER_WEIGHTS),
        rank=settings.rank,
        alpha=settings.alpha,
        num_virtual_tokens=settings.prefix.num_virtual_tokens,
    )


def _fresh(spec: RunSpec, model: ModelFolder, settings: AdapterSettings) -> AdapterState:
    num_blocks = int(model.config.num_hidden_layers)
    cut = Cut(spec.head_blocks, num_blocks - spec.tail_blocks)
    parts = [build_part(model.config, cut, part) for part in Part]
    shapes = {k: shape for part in parts for k, shape in layout_of(part, settings).items()}
    return initial_state(shapes, settings.seed)


def _run_script(folder: Path, threads: int) -> None:
    package = Path(centralised.__path__[0])
    files = [str(folder / _REQUEST), str(folder / _RESPONSE)]
    command = [sys.executable, "-P", "-c", _START, str(package.parent), *files, "--tied"]
    # The script ends when the pipe does, also where this process is killed.
    reads, writes = os.pipe()
    try:
        with explain_os_errors(f"write {folder / _LOG}"), (folder / _LOG).open("wb") as log:
            ended = subprocess.run(
                command, stdin=reads, stdout=log, stderr=log, env=_environment(threads), check=False
            )
    finally:
        os.close(reads)
        os.close(writes)
    if ended.returncode != 0:
        raise _explain(ended.returncode, folder / _LOG)


def _environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _explain(status: int, log: Path) -> ConfigError:
    """What its author said of a refusal; of anything else no word: a library's may hold a text."""
    said = log.read_text(encoding="utf-8", errors="replace").strip()
    last = said.splitlines()[-1] if said else ""
    if status == _REFUSED:
        return ConfigError(f"unsplit training: {last.removeprefix('error: ')}")
    # Its own log goes with the run's folder; what this process says is kept for its owner alone.
    print(said, file=sys.stderr)
    if status < 0:
        return ConfigError(
            f"unsplit training was ended by signal {-status}; if memory ran out, lower "
            "sizes.micro_batch_rows; the run's log has more"
        )
    kind = _CLASS.match(last)
    name = f" ({kind[0]})" if kind is not None and kind[0].endswith("Error") else ""
    return ConfigError(
        f"unsplit training failed with status {status}{name}; the run's log has more"
    )


def _response(path: Path) -> _Response:
    with explain_os_errors(f"read {path}"):
        raw = path.read_bytes()
    try:
        return msgspec.json.decode(raw, type=_Response)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} is damaged: {error}; run it again") from error


def _figures(response: _Response, questions: Sequence[Question]) -> Figures:
    if len(response.replies) != len(questions):
        raise StorageError(
            f"unsplit training answered {len(response.replies)} of {len(questions)} questions; "
            "write the task again"
        )
    answers = zip(questions, response.log_likelihoods, response.replies, strict=True)
    return Figures(
        predictions=[_prediction(question, scores, reply) for question, scores, reply in answers],
        losses=response.losses,
        train_seconds=response.train_seconds,
        score_seconds=response.score_seconds,
        num_train_tokens=response.num_train_tokens,
    )


def _prediction(question: Question, scores: tuple[float, ...], reply: str) -> Prediction:
    if not question.choices:
        return Prediction(text=reply)
    # The first of equals, as evaluation does.
    chosen = scores.index(max(scores))
    return Prediction(text=question.choices[chosen], log_likelihoods=scores)
