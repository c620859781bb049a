"""`cutlayer serve` with its page: real training shows on it, and on the terminal."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer.cli.main import run
from cutlayer.dashboard.fetch import fetch_state
from cutlayer.dashboard.view import PageState
from cutlayer.errors import TransportError
from cutlayer.web.auth import read_token
from tests.tiny_models import tiny_llama_folder
from tests.unit.cli.cli_world import CliWorld, make_world

_FEDERATION = (
    'federation.name="reviews"',
    "federation.rounds=3",
    "federation.members=[]",
    'http.address="127.0.0.1:0"',
)


class Served:
    """A server process with a page."""

    def __init__(self, world: CliWorld) -> None:
        changes = [word for change in _FEDERATION for word in ("--set", change)]
        words = ["-m", "cutlayer.cli.main", "serve", "-c", str(world.server), "--json", *changes]
        self.process = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.ready = json.loads(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.ready['http_port']}"
        self.token_file = world.folder / "server" / "http.token"

    def state(self) -> PageState:
        """What the page shows."""
        return fetch_state(self.url, read_token(self.token_file))

    def metrics(self) -> list[str]:
        """The lines that Prometheus would get."""
        token = {"Authorization": f"Bearer {read_token(self.token_file)}"}
        request = urllib.request.Request(f"{self.url}/metrics", headers=token)
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
        assert isinstance(text, str)
        return text.splitlines()


@pytest.fixture
def world(tmp_path: Path) -> CliWorld:
    return make_world(tiny_llama_folder(tmp_path / "model"), tmp_path)


@pytest.fixture
def served(world: CliWorld) -> Iterator[Served]:
    running = Served(world)
    yield running
    running.process.kill()
    running.process.communicate()


def test_real_training_shows_on_the_page(
    world: CliWorld, served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    before = served.state()
    assert before.server.federation is not None
    assert before.server.federation.phase == "0 members wait, 3 are needed"
    assert before.server.totals.tokens == 0
    address = f"connection.address={served.ready['address']}"
    assert run(["train", "-c", str(world.client), "--set", address, "--json"]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    after = served.state().server
    assert [(r.owner, r.run_id, r.step) for r in after.runs] == [("client", trained["run_id"], 6)]
    assert after.totals.tokens >= trained["num_tokens"] > 0
    assert 0 < after.totals.bytes_up <= trained["bytes_up"]
    assert 0 < after.totals.bytes_down <= trained["bytes_down"]
    lines = served.metrics()
    assert "cutlayer_federation_members 0.0" in lines
    assert "cutlayer_runs 1.0" in lines
    words = ["status", "--url", served.url, "--token-file", str(served.token_file)]
    assert run(words) == 0
    assert "reviews: fedavg, secure aggregation on" in capsys.readouterr().out
    assert run(["runs", "list", "--state", str(world.folder / "server"), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [run["name"] for run in listed] == ["reviews", f"client/{trained['run_id']}"]


def test_the_page_ends_with_the_server(served: Served) -> None:
    token = read_token(served.token_file)
    served.process.terminate()
    _, errors = served.process.communicate(timeout=60)
    assert served.process.returncode == 0
    assert "Traceback" not in errors
    assert token not in errors
    with pytest.raises(TransportError):
        fetch_state(served.url, token)
