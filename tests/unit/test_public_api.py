"""What is public is what `__all__` says; and the size limits that keep files readable."""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import cutlayer

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "cutlayer"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
MODULES = sorted(info.name for info in pkgutil.walk_packages(cutlayer.__path__, "cutlayer."))
_MAX_FILE_LINES, _MAX_FUNCTION_LINES, _MAX_PARAMETERS = 350, 80, 8
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def _parameters(function: Function) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def _is_command(function: Function) -> bool:
    """Parameters of a command are its options: typer wants them one by one."""
    annotations = (a.annotation for a in function.args.args)
    texts = [ast.unparse(annotation) for annotation in annotations if annotation is not None]
    return any(text in ("JsonOption", "typer.Context") for text in texts)


def _has_public_names(tree: ast.Module) -> bool:
    public = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(node, public) and not node.name.startswith("_") for node in tree.body)


@pytest.mark.parametrize("name", ["cutlayer", *MODULES])
def test_all_is_sorted_and_real(name: str) -> None:
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", None)
    if listed is None:
        path = Path(str(module.__file__))
        assert not _has_public_names(ast.parse(path.read_text(encoding="utf-8")))
        return
    missing = [public for public in listed if not hasattr(module, public)]
    assert not missing, f"{name}.__all__ names {missing}, which it does not have"
    # Constants, classes, functions: the order of ruff's isort style.
    assert listed == sorted(listed, key=_kind_and_name)
    assert len(set(listed)) == len(listed)


def _kind_and_name(name: str) -> tuple[int, str]:
    if name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


def test_package_offers_its_whole_public_api() -> None:
    assert cutlayer.__all__ == [
        "Client",
        "ClientSettings",
        "Cut",
        "CutlayerError",
        "Rows",
        "SamplingSettings",
        "ServerSettings",
        "TrunkServer",
        "load_parts",
        "load_settings",
        "pack",
    ]
    for name in cutlayer.__all__:
        assert getattr(cutlayer, name).__module__.startswith("cutlayer."), name


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_says_its_duty_and_stays_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, f"{_name(path)} has no docstring"
    num_lines = len(text.splitlines())
    assert num_lines <= _MAX_FILE_LINES, f"{_name(path)} has {num_lines} lines"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    for function in _functions(path):
        where = f"{_name(path)}:{function.lineno} {function.name}"
        num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
        assert num_lines <= _MAX_FUNCTION_LINES, f"{where} has {num_lines} lines"
        num_parameters = len(_parameters(function))
        assert num_parameters <= _MAX_PARAMETERS or _is_command(function), (
            f"{where} has {num_parameters} parameters"
        )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=_name)
def test_no_module_uses_what_can_run_foreign_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        assert not {"pickle", "marshal", "shelve", "dill"} & set(imported), _name(path)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load"), f"{_name(path)}: {called}"
            trusted = [k for k in node.keywords if k.arg == "trust_remote_code"]
            assert all(ast.unparse(k.value) == "False" for k in trusted), _name(path)
