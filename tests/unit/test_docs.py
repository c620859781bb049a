"""The documents: up to date, without dead links, and every command in them exists."""

import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from cutlayer.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(cutlayer [^`]+)`")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_.]+")
_MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|Users|mnt|tmp)/[\w.]+")


def _commands(text: str) -> list[list[str]]:
    """Command lines in fenced blocks: `cutlayer` at the start of a line, continued by `\\`."""
    found = []
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith("cutlayer ") else []
            if words:
                found.append(words[1:])
    return found


def _complaint(words: list[str]) -> str | None:
    """What is wrong with a command line, judged by the program's own tree of commands."""
    command, given = typer.main.get_command(app), list(words)
    while given and given[0] in getattr(command, "commands", {}):
        command = command.commands[given.pop(0)]
    options = {
        name: param for param in command.params for name in (*param.opts, *param.secondary_opts)
    }
    seen, num_arguments = set(), 0
    while given:
        word = given.pop(0)
        if not word.startswith("-"):
            num_arguments += 1
            continue
        if word not in options:
            return f"{command.name} has no option {word}"
        seen.add(options[word].name)
        if not getattr(options[word], "is_flag", False):
            if not given:
                return f"{word} has no value"
            given.pop(0)
    return _wrong_number(command.params, seen, num_arguments)


def _wrong_number(params: list[typer.core.TyperOption], seen: set[str], given: int) -> str | None:
    arguments = [p for p in params if p.param_type_name == "argument"]
    least = sum(1 for p in arguments if p.required)
    most = 99 if any(p.nargs == -1 for p in arguments) else len(arguments)
    if not least <= given <= most:
        return f"{given} arguments, {least} to {most} are wanted"
    options = [p for p in params if p.param_type_name == "option"]
    missing = [p.opts[0] for p in options if p.required and p.name not in seen]
    return f"{missing} missing" if missing else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            headings = _HEADING.findall(path.read_text(encoding="utf-8"))
            assert anchor in {_slug(heading) for heading in headings}, f"{page.name}: {target}"


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_path_of_one_machine(page: Path) -> None:
    match = _MACHINE_PATH.search(page.read_text(encoding="utf-8"))
    assert match is None, f"{page.name} names {match and match[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_page_is_one_that_the_program_accepts(page: Path) -> None:
    for words in _commands(page.read_text(encoding="utf-8")):
        complaint = _complaint(words)
        assert complaint is None, f"{page.name}: cutlayer {shlex.join(words)}: {complaint}"


def test_a_wrong_command_line_is_noticed() -> None:
    request = ["provision", "request", "kit", "--name", "trunk"]
    assert _complaint(request) is None
    assert _complaint([*request, "--server"]) is not None
    assert _complaint(["provision", "request", "kit"]) is not None
    assert _complaint(["provision", "request", "--name", "trunk"]) is not None
    assert _complaint(["provisoin"]) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_in_running_text_exists(page: Path) -> None:
    for text in _INLINE.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        command = typer.main.get_command(app)
        for word in shlex.split(text)[1:]:
            known = getattr(command, "commands", None)
            if known is None or word.startswith("-") or _PLACEHOLDER.fullmatch(word):
                break
            assert word in known, f"{page.name} names `{text}`"
            command = known[word]


def test_settings_page_is_what_the_classes_say() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_settings.py"))
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == script["render"](), "run .venv/bin/python docs/make_settings.py"


def _required(project: dict[str, Any]) -> set[str]:
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(name for extra in extras for name in extra)]
    names = {re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in wanted}
    return names - {"cutlayer"}


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = _required(project)
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == names


def test_every_dependency_is_pinned_and_torch_names_no_variant() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert {name.lower() for name in _required(project)} <= pins.keys()
    assert re.fullmatch(r"[\d.]+", pins["torch"])
