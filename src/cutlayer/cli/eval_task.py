"""`cutlayer eval task` and `cutlayer eval score`: a published task as files, and its score.

The work is in `evaluation.published`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from cutlayer.evaluation.published.question import Prediction, Question, Scored
    from cutlayer.evaluation.published.task_files import TaskFolder
    from cutlayer.evaluation.published.templates import Form

__all__ = ["score", "task"]

_DEMO = "demo-scale: a split of ours, not comparable with published tables"

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A published task.")]
FolderOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Gets the files.")]
SourceOption = Annotated[
    str,
    typer.Option(
        "--from", metavar="SOURCE", help="packaged, hub, or a folder with the original files."
    ),
]
FormOption = Annotated[str | None, typer.Option("--form", metavar="FORM", help="plain or chat.")]
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", metavar="M", help="Folder, GGUF file or hub id; it tells the form."),
]
TrainOption = Annotated[
    int | None, typer.Option("--train-rows", min=0, metavar="N", help="To learn; without it all.")
]
TestOption = Annotated[
    int | None, typer.Option("--test-rows", min=1, metavar="N", help="To score; without it all.")
]
WordsOption = Annotated[
    int | None, typer.Option("--max-words", min=1, metavar="N", help="Leave out longer questions.")
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="S", help="Of the training rows.")]
TemplateOption = Annotated[
    Path | None, typer.Option("--template", metavar="FILE", help="Other words (TOML).")
]
TaskArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="What `cutlayer eval task` wrote.")
]
PredictionsArgument = Annotated[
    Path, typer.Argument(metavar="PREDICTIONS", help="What `cutlayer eval --out` wrote.")
]


def task(
    name: NameArgument,
    folder: FolderOption,
    source: SourceOption = "packaged",
    form: FormOption = None,
    model: ModelOption = None,
    train_rows: TrainOption = None,
    test_rows: TestOption = None,
    max_words: WordsOption = None,
    seed: SeedOption = 0,
    template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a published task as rows to train on and items to score."""
    from cutlayer.evaluation.published.packaged import choose
    from cutlayer.evaluation.published.task_files import Provenance, write_task
    from cutlayer.evaluation.published.templates import read_template
    from cutlayer.suite.rows import questions_of

    out = Output(as_json)
    words = None if template is None else read_template(template, name)
    spoken = _form(form, model)
    _check_folder(folder)
    questions = questions_of(name, source, None)
    train, test = choose(questions, train_rows, test_rows, seed, max_words)
    about = Provenance(source=source, is_demo_scale=source == "packaged", seed=seed)
    _print_task(write_task(name, train, test, folder, spoken, about, words), out)


def score(folder: TaskArgument, file: PredictionsArgument, as_json: JsonOption = False) -> None:
    """The task's official score of predictions of its whole test file."""
    from cutlayer.evaluation.published.catalogue import published_task
    from cutlayer.evaluation.published.predictions import predictions_of
    from cutlayer.evaluation.published.task_files import open_task

    out = Output(as_json)
    opened = open_task(folder)
    questions = opened.questions()
    predictions: Sequence[Prediction] = predictions_of(file, questions)
    scored = published_task(opened.about.task).score(questions, predictions)
    _print_score(opened, scored, questions, out)


def _form(name: str | None, model: Path | None) -> "Form":
    """As named, else as the model is spoken to, else plain."""
    from cutlayer.evaluation.published.templates import Form, form_of

    if name is not None:
        if name not in tuple(Form):
            raise ConfigError(f"no form {name!r}; use {' or '.join(Form)}")
        return Form(name)
    if model is None:
        return Form.PLAIN
    from cutlayer.model.folder import resolve_model

    return form_of(resolve_model(model).tokenizer())


def _check_folder(folder: Path) -> None:
    """Reading takes a while and must not end at a file, nor write into somebody's documents."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "task.json").is_file():
        raise ConfigError(f"{folder} has other files; name a new folder or one of a task")


def _print_task(written: "TaskFolder", out: Output) -> None:
    about = written.about
    out.say(f"{about.task}, {about.form} form, from {about.source}")
    out.say(f"{about.num_train} rows to learn: {written.train}")
    out.say(f"{about.num_test} items to score: {written.test}")
    if about.is_demo_scale:
        out.say(_DEMO)
    values = {name: getattr(about, name) for name in about.__struct_fields__}
    out.result({"folder": written.folder, **values})


def _print_score(
    opened: "TaskFolder", scored: "Scored", questions: "Sequence[Question]", out: Output
) -> None:
    rows = [(name, f"{value:.4f}") for name, value in sorted(scored.metrics.items())]
    note = f" ({_DEMO})" if opened.about.is_demo_scale else ""
    out.table(("metric", "score"), rows, f"{opened.about.task}, {len(questions)} questions{note}")
    out.result(
        {
            "task": opened.about.task,
            "is_demo_scale": opened.about.is_demo_scale,
            "num_questions": len(questions),
            "metrics": dict(scored.metrics),
        }
    )
