"""The commands as processes: provision, serve, doctor, train, talk, export, purge."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cutlayer.demo.processes import serving
from tests.tiny_models import tiny_llama_folder
from tests.unit.cli.cli_world import CliWorld, make_world

PROMPT = "ababm:"


def _command(*words: object, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cutlayer.cli.main", *map(str, words), "--json"],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _result(*words: object, stdin: str = "", code: int = 0) -> dict[str, object]:
    done = _command(*words, stdin=stdin)
    assert done.returncode == code, done.stderr
    value = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Iterator[tuple[CliWorld, str]]:
    world = make_world(model, tmp_path)
    with serving(world.server, tmp_path) as server:
        yield world, server.address


def test_the_whole_way_from_keys_to_purge(
    served: tuple[CliWorld, str], model: Path, tmp_path: Path
) -> None:
    world, address = served
    client = ("--config", world.client, "--set", f"connection.address={address}")
    assert _result("doctor", *client)["ok"] is True
    trained = _result("train", *client)
    assert (trained["step"], trained["new_steps"]) == (6, 6)
    assert trained["guarantee"] == "no noise: none"
    assert (tmp_path / "run" / "settings.toml").exists()
    assert _result("train", *client)["new_steps"] == 0
    greedy = ("--set", "sampling.max_new_tokens=4")
    replies = _result("generate", PROMPT, "ab:", *client, *greedy)["replies"]
    assert isinstance(replies, list)
    assert _result("generate", *client, *greedy, stdin=f"{PROMPT}\n")["replies"] == replies[:1]
    talk = _result("chat", *client, *greedy, stdin="hello\n\nagain\n/exit\nnever\n")
    assert [turn["message"] for turn in talk["turns"]] == ["hello", "again"]  # type: ignore[attr-defined]
    exported = _result("export", *client, "-o", tmp_path / "peft", "--merge", tmp_path / "merged")
    assert exported["step"] == 6
    _check_export(model, tmp_path)
    assert _result("purge", tmp_path / "run")["kept"] == [str(tmp_path / "run" / "ledger.jsonl")]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ledger.jsonl"]


def _check_export(model: Path, folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, str(folder / "peft")).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.allclose(adapted(tokens).logits, merged(tokens).logits, atol=1e-4)
        with adapted.disable_adapter():
            plain = adapted(tokens).logits
    assert not torch.allclose(plain, merged(tokens).logits, atol=1e-3)


def test_saved_settings_train_the_same_run_again(served: tuple[CliWorld, str]) -> None:
    world, address = served
    first = _result(
        "train", "-c", world.client, "--set", f"connection.address={address}", "--hide-settings"
    )
    again = _result("train", "-c", world.folder / "run" / "settings.toml")
    assert again["run_id"] == first["run_id"]
    assert again["settings_digest"] == first["settings_digest"]
    assert again["new_steps"] == 0


def test_a_revoked_client_is_refused_with_code_9(served: tuple[CliWorld, str]) -> None:
    world, address = served
    published = ("--publish", world.keys.server / "revoked.pem")
    _result("provision", "revoke", "client", "--authority", world.keys.authority, *published)
    refused = _result("train", "-c", world.client, "--set", f"connection.address={address}", code=9)
    assert refused["error"] == "PermissionRefused"


def test_a_server_with_another_cut_is_refused_with_code_3(served: tuple[CliWorld, str]) -> None:
    world, address = served
    override = ("--set", f"connection.address={address}", "--set", "model.lower=0")
    assert _result("train", "-c", world.client, *override, code=3)["error"] == "SpecMismatch"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_says_so_and_exits_0(
    number: signal.Signals, model: Path, tmp_path: Path
) -> None:
    world = make_world(model, tmp_path)
    words = [sys.executable, "-m", "cutlayer.cli.main", "serve", "-c", str(world.server), "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        ready = json.loads(run.stdout.readline())
        assert ready["event"] == "ready"
        assert len(ready["model_digest"]) == 64
        os.kill(run.pid, number)
        rest, errors = run.communicate(timeout=60)
    assert run.returncode == 0
    assert json.loads(rest.splitlines()[-1])["event"] == "stopped"
    assert "draining" in errors
    assert "Traceback" not in errors


def test_a_server_that_cannot_start_leaves_no_process_and_says_why(
    model: Path, tmp_path: Path
) -> None:
    world = make_world(model, tmp_path)
    (world.keys.server / "key.pem").unlink()
    done = _command("serve", "-c", world.server)
    assert done.returncode == 2
    assert "key.pem" in json.loads(done.stdout)["message"]
    assert "Traceback" not in done.stderr
