"""Models and adapters that are built while other threads build and compute."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_client_parts, load_part
from cutlayer.model.families import meta_model
from cutlayer.model.partition import Cut, Part
from tests.tiny_models import edit_config, tiny_llama_folder

TIMEOUT_S = 20.0
CUT = Cut(1, 3)


class _Gate:
    """Stops whoever enters, once, until the block around it ends."""

    def __init__(self) -> None:
        self.is_entered = threading.Event()
        self.may_go = threading.Event()

    def stop(self) -> None:
        """Wait inside."""
        self.is_entered.set()
        assert self.may_go.wait(TIMEOUT_S)


@contextmanager
def _stopped_halfway(work: Callable[[], object], gate: _Gate) -> Iterator[None]:
    """Inside, another thread stands in the middle of `work`; afterwards it has finished it."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert gate.is_entered.wait(TIMEOUT_S)
        yield
    finally:
        gate.may_go.set()
        thread.join(TIMEOUT_S)
    assert not failures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama that was saved in bfloat16, as most are."""
    folder = tiny_llama_folder(tmp_path)
    edit_config(folder, dtype="bfloat16")
    return folder


def _stop_in_injection(gate: _Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = LoraModel._create_new_module

    def create(*args: object, **kwargs: object) -> object:
        gate.stop()
        return ordinary(*args, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_new_module", staticmethod(create))


def _stop_in_construction(gate: _Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = LlamaForCausalLM.__init__

    def construct(self: LlamaForCausalLM, *args: object, **kwargs: object) -> None:
        gate.stop()
        ordinary(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", construct)


def test_a_model_is_loaded_whole_while_another_thread_attaches_an_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, gate = load_part(folder, CUT, Part.TRUNK), _Gate()
    _stop_in_injection(gate, monkeypatch)
    with _stopped_halfway(lambda: attach(trunk, AdapterSettings()), gate):
        head, tail = load_client_parts(folder, CUT)
        own = nn.Linear(2, 2)
    assert not any(p.is_meta for part in (head, tail, own) for p in part.parameters())
    assert not any(p.is_meta for p in trunk.parameters())


def test_the_default_dtype_stays_while_another_thread_builds_a_bfloat16_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, gate = AutoConfig.from_pretrained(folder), _Gate()
    assert config.dtype == torch.bfloat16
    _stop_in_construction(gate, monkeypatch)
    with _stopped_halfway(lambda: meta_model(config), gate):
        assert torch.zeros(1).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_models_are_built_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, gate = AutoConfig.from_pretrained(folder), _Gate()
    entered: list[str] = []
    ordinary = AutoModelForCausalLM.from_config

    def build(*args: object, **kwargs: object) -> object:
        entered.append(threading.current_thread().name)
        gate.stop()
        return ordinary(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", build)
    second = threading.Thread(target=meta_model, args=(config,), name="second")
    with _stopped_halfway(lambda: meta_model(config), gate):
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert "second" not in entered
    second.join(TIMEOUT_S)
    assert "second" in entered
