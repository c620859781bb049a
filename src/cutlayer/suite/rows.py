"""The rows of a run as files: read, chosen by its sizes and seed, put in the model's form.

It reads no file format (`evaluation.published`) and trains nothing.
"""

from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import Question, Split
from cutlayer.evaluation.published.task_files import Provenance, TaskFolder, write_task
from cutlayer.evaluation.published.templates import Form, form_of
from cutlayer.suite.spec import RunSpec

__all__ = ["HUB", "PACKAGED", "prepare", "questions_of", "scored_split"]

PACKAGED = "packaged"
"""Source of rows: the assets."""
HUB = "hub"
"""Source of rows: a model hub."""
_WITH_OWN_TEST = ("cnn_dailymail", "sentiment", "topics", "xsum")
"""Tasks whose test split comes with its answers."""


def prepare(spec: RunSpec, folder: Path, cache: Path | None) -> TaskFolder:
    """Write the files of a run.

    Args:
        spec: the run.
        folder: gets a folder `task`.
        cache: of assets, hub data and models; None is the usual one.

    Raises:
        DataError: files are missing, truncated or malformed.
        ConfigError: no such task, source or model, or too few rows.
        TransportError: rows or model cannot be fetched.
    """
    from cutlayer.evaluation.published.packaged import choose

    # Rows first: what is wrong with them is known before a model is loaded.
    sizes = spec.sizes
    train, test = choose(
        questions_of(spec.task, spec.source, cache),
        sizes.train_rows,
        sizes.test_rows,
        spec.seed,
        sizes.max_words,
    )
    about = Provenance(source=spec.source, is_demo_scale=spec.source == PACKAGED, seed=spec.seed)
    return write_task(spec.task, train, test, folder / "task", _form(spec, cache), about)


def questions_of(name: str, source: str, cache: Path | None) -> dict[Split, list[Question]]:
    """Questions of a task to learn and to score.

    Args:
        name: of the published task.
        source: packaged, hub, or a folder with the original files.
        cache: of what is fetched.

    Returns:
        Under TEST those of `scored_split`, whatever the files call it.

    Raises:
        DataError: files are missing, truncated or malformed.
        ConfigError: no such task, or the source is neither a word nor a folder.
        TransportError: they cannot be fetched.
    """
    task, scored = published_task(name), scored_split(name)
    if source == PACKAGED:
        from cutlayer.evaluation.published.packaged import packaged_questions

        return packaged_questions(name, cache)
    if source == HUB:
        from cutlayer.evaluation.published.hub import hub_questions

        return {
            Split.TRAIN: hub_questions(name, Split.TRAIN, cache),
            Split.TEST: hub_questions(name, scored, cache),
        }
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"rows of {name}: {source} is no folder; give packaged, hub, or the folder of the "
            "original files"
        )
    return {
        Split.TRAIN: task.read_original(folder, Split.TRAIN),
        Split.TEST: task.read_original(folder, scored),
    }


def scored_split(name: str) -> Split:
    """The split that published tables score: the others' test answers are kept by their authors."""
    return Split.TEST if name in _WITH_OWN_TEST else Split.VALIDATION


def _form(spec: RunSpec, cache: Path | None) -> Form:
    from cutlayer.suite.recipe import open_model

    if spec.form != "auto":
        return Form(spec.form)
    return form_of(open_model(spec, cache).tokenizer())
