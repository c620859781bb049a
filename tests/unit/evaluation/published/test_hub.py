"""Tasks of a hub, which is a real HTTP server on 127.0.0.1 that the library `datasets` asks."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest

from cutlayer.data.sources import Record
from cutlayer.errors import ConfigError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.coqa import Coqa
from cutlayer.evaluation.published.hub import hub_questions
from cutlayer.evaluation.published.question import Question, Split

SCRIPT = """
import json, sys
from pathlib import Path
from cutlayer.errors import CutlayerError
from cutlayer.evaluation.published.hub import hub_questions
from cutlayer.evaluation.published.coqa import Coqa
from cutlayer.evaluation.published.question import TASKS, HubName, Split

for name in ("broken", "closed", "empty", "gone", "sick"):
    hub = HubName(repository=f"acme/{name}")
    TASKS.register(name)(type(name, (Coqa,), {"hub": hub}))
hub = HubName(repository="abisee/cnn_dailymail", config="9.9.9")
TASKS.register("old")(type("old", (Coqa,), {"hub": hub}))

def outcome(name, split):
    try:
        questions = hub_questions(name, Split(split), Path(sys.argv[1]))
    except CutlayerError as error:
        return [type(error).__name__, str(error)]
    return [[it.key, dict(it.fields), list(it.answers), it.label] for it in questions]

asked = [item.split(":") for item in sys.argv[2:]]
print(json.dumps({":".join(item): outcome(*item) for item in asked}))
"""

SUMMARIES: list[dict[str, object]] = [
    {"document": "Workers began.", "summary": "A bridge was mended.", "id": "101"}
]
STORIES: list[dict[str, object]] = [
    {"article": "A boat sank .", "highlights": "Boat sinks .\nNobody hurt .", "id": "ab12"},
    {"article": "A cat slept .", "highlights": "Cat sleeps .", "id": "cd34"},
]
COQA: list[dict[str, object]] = [
    {
        "source": "mctest",
        "story": "Ann has a boat.",
        "questions": ["Who has one?", "One what?"],
        "answers": {"input_text": ["Ann", "boat"], "answer_start": [0, 10], "answer_end": [3, 14]},
    }
]
PARQUET_BRANCH = "refs/convert/parquet"
CARD = """---
configs:
- config_name: 3.0.0
  data_files:
  - split: train
    path: 3.0.0/train-*
  - split: test
    path: 3.0.0/test-*
---
"""


class Hub:
    """The part of the hub's HTTP interface that `datasets` uses; `folder/owner/name/branch`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_downloads = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, "")

            def do_GET(self) -> None:
                hub.answer(self, "")

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                hub.answer(self, self.rfile.read(length).decode())

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def add(self, repository: str, files: dict[str, object], branch: str = "main") -> None:
        """Put files into a repository: rows become Parquet, anything else is text."""
        for name, content in files.items():
            path = self.folder / repository / branch.replace("/", "_") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, list):
                datasets.Dataset.from_list(content).to_parquet(path)
            else:
                path.write_text(str(content))

    def answer(self, request: BaseHTTPRequestHandler, form: str) -> None:
        pieces = [unquote(piece) for piece in urlsplit(request.path).path.strip("/").split("/")]
        in_api = pieces[0] == "api"
        owner, name, what, *rest = [*pieces[1 + in_api :], "", "", ""]
        repository = self.folder / owner / name
        if (owner, name) == ("acme", "closed"):
            return reply(request, 403, code="GatedRepo")
        if (owner, name) == ("acme", "sick"):
            # Not 500: the client would ask five times, for half a minute.
            return reply(request, 405)
        if not name or not repository.is_dir():
            return reply(request, 404, code="RepoNotFound")
        revision, path = (rest[0] or "main"), "/".join(filter(None, rest[1:]))
        branch = next((it for it in repository.iterdir() if revision in known_as(it)), None)
        if branch is None:
            return reply(request, 404, code="RevisionNotFound")
        if not in_api:
            return self.send_file(request, branch, path)
        if what in ("", "revision"):
            about = {"id": f"{owner}/{name}", "sha": commit_of(branch), "siblings": []}
            return reply(request, 200, json.dumps(about).encode())
        paths = parse_qs(form)["paths"] if what == "paths-info" else tree(branch, path)
        entries = [entry(branch, it) for it in paths if (branch / it).exists()]
        if what == "tree" and not entries:
            return reply(request, 404, code="EntryNotFound")
        return reply(request, 200, json.dumps(entries).encode())

    def send_file(self, request: BaseHTTPRequestHandler, branch: Path, name: str) -> None:
        path = branch / name
        if not path.is_file():
            return reply(request, 404, code="EntryNotFound")
        data = path.read_bytes()
        self.num_downloads += request.command == "GET"
        extra = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return reply(request, 200, data, extra | {"X-Repo-Commit": commit_of(branch)})

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def reply(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    code: str = "",
) -> None:
    request.send_response(status)
    for name, value in {**(headers or {}), "X-Error-Code": code}.items():
        if value:
            request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def commit_of(branch: Path) -> str:
    return hashlib.sha1(str(branch).encode()).hexdigest()


def known_as(branch: Path) -> tuple[str, str]:
    return branch.name.replace("_", "/"), commit_of(branch)


def tree(branch: Path, folder: str) -> list[str]:
    return [str(it.relative_to(branch)) for it in sorted((branch / folder).rglob("*"))]


def entry(branch: Path, name: str) -> dict[str, object]:
    path = branch / name
    kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
    oid = hashlib.sha1(name.encode()).hexdigest()
    return {"type": kind, "path": name, "size": size, "oid": oid}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a task as files, one of several configs, one as a script and damaged ones."""
    running = Hub(tmp_path_factory.mktemp("hub"))
    running.add("stanfordnlp/coqa", {"data/train-0.parquet": COQA, "README.md": "A card.\n"})
    configs = {"3.0.0/train-0.parquet": STORIES, "3.0.0/test-0.parquet": STORIES[1:]}
    running.add("abisee/cnn_dailymail", {"README.md": CARD, **configs})
    running.add("EdinburghNLP/xsum", {"xsum.py": "raise SystemExit('ran')\n", "README.md": "A"})
    running.add("EdinburghNLP/xsum", {"default/test/0000.parquet": SUMMARIES}, PARQUET_BRANCH)
    running.add("acme/broken", {"train.parquet": COQA, "README.md": "A"})
    path = running.folder / "acme" / "broken" / "main" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    running.add("acme/empty", {"README.md": "A"})
    yield running
    running.stop()


def run(cache: Path, *asked: str, **environment: str) -> dict[str, list[list[object]]]:
    """What asking for `task:split` gave, in a process of its own: settings are read at import."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cache), *asked],
        env=os.environ | {"HF_HOME": str(cache / "home")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, list[list[object]]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the downloads of `online` are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub: Hub, cache: Path) -> dict[str, list[list[object]]]:
    """What a hub that can be reached gives, all in one process: starting one takes seconds."""
    working = ("coqa:train", "coqa:test", "cnn_dailymail:train", "cnn_dailymail:test", "xsum:test")
    refused = [f"{name}:train" for name in ("broken", "closed", "empty", "gone", "old", "sick")]
    return run(cache, *working, *refused, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")


def told(questions: list[Question]) -> list[list[object]]:
    return [[it.key, dict(it.fields), list(it.answers), it.label] for it in questions]


def of_rows(task: str, rows: list[dict[str, object]], split: Split) -> list[list[object]]:
    records = [Record(row, "made up") for row in rows]
    return told(published_task(task).read_records(records, split))


def test_a_task_of_the_hub_is_its_rows(online: dict[str, list[list[object]]]) -> None:
    assert online["coqa:train"] == of_rows("coqa", COQA, Split.TRAIN)
    assert len(online["coqa:train"]) == 2


def test_one_of_several_configs_and_its_splits_are_read(
    online: dict[str, list[list[object]]],
) -> None:
    assert online["cnn_dailymail:train"] == of_rows("cnn_dailymail", STORIES, Split.TRAIN)
    assert online["cnn_dailymail:test"] == of_rows("cnn_dailymail", STORIES[1:], Split.TEST)


def test_of_a_script_the_hub_s_own_conversion_is_read(
    online: dict[str, list[list[object]]],
) -> None:
    assert online["xsum:test"] == of_rows("xsum", SUMMARIES, Split.TEST)


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        ("coqa:test", "DataError", "coqa of the hub has no split 'test'; its splits are train"),
        ("broken:train", "DataError", "acme/broken of the hub came damaged or without data"),
        ("empty:train", "DataError", "acme/empty of the hub came damaged or without data"),
        ("gone:train", "ConfigError", "doesn't exist on the Hub or cannot be accessed"),
        ("closed:train", "ConfigError", "is a gated dataset on the Hub"),
        ("old:train", "ConfigError", "3.0.0"),
        ("sick:train", "TransportError", "the hub cannot be reached or does not answer"),
    ],
)
def test_what_the_hub_cannot_give_is_explained(
    online: dict[str, list[list[object]]], asked: str, kind: str, message: str
) -> None:
    found, text = online[asked]
    assert found == kind
    assert message in str(text)
    assert "Ann" not in str(text)


def test_without_the_hub_the_cache_serves(
    online: dict[str, list[list[object]]], hub: Hub, cache: Path
) -> None:
    num_downloads = hub.num_downloads
    found = run(cache, "coqa:train", "gone:train", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert found["coqa:train"] == online["coqa:train"]
    kind, text = found["gone:train"]
    assert kind == "TransportError"
    assert "not in the cache and the hub cannot be reached" in str(text)
    assert hub.num_downloads == num_downloads


def test_a_task_that_no_hub_has_says_what_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coqa, "hub", None)
    with pytest.raises(ConfigError, match="no hub has the task coqa; take its packaged or orig"):
        hub_questions("coqa", Split.TRAIN)
    with pytest.raises(ConfigError, match=r"no published task is called 'squad'; known: .*coqa"):
        hub_questions("squad", Split.TRAIN)


def test_a_folder_that_would_shadow_the_hub_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stanfordnlp" / "coqa").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="working folder holds stanfordnlp/coqa"):
        hub_questions("coqa", Split.TRAIN)
