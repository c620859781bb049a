"""The unsplit baseline and the small pieces around it."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.isolate import process_environment, run_isolated
from benchmarks.report import emit, median, parse_arguments
from benchmarks.subjects import equal_rows, ragged_rows, subject_folder, write_tiny_llama
from benchmarks.unsplit import (
    Decoding,
    Training,
    UnsplitRequest,
    measure_decoding,
    measure_training,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


def test_training_steps_lower_the_loss(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    done = measure_training(model, equal_rows(2, 16, 256), steps=4, lr=5e-3)
    assert list(done.losses) == sorted(done.losses, reverse=True)
    assert len(done.seconds) == 4


def test_padding_of_ragged_rows_does_not_change_the_loss(folder: Path) -> None:
    rows = ragged_rows([4, 11], 256)
    done = measure_training(AutoModelForCausalLM.from_pretrained(folder), rows, steps=1)
    model, total = AutoModelForCausalLM.from_pretrained(folder), 0.0
    for row in rows:
        tokens = torch.tensor([row])
        total += model(tokens, labels=tokens).loss.item() * (len(row) - 1)
    assert done.losses[0] == pytest.approx(total / 13, rel=1e-6)


def test_training_starts_from_a_given_adapter(folder: Path, tmp_path: Path) -> None:
    rows = equal_rows(1, 12, 256)
    first = AutoModelForCausalLM.from_pretrained(folder)
    trained = measure_training(first, rows, steps=3, lr=1e-2)
    state = {key: value.contiguous() for key, value in get_peft_model_state_dict(first).items()}
    # The wrapped model's own keys lack the prefix that PEFT puts before them.
    prefixed = {f"base_model.model.{key}": value for key, value in state.items()}
    save_file(prefixed, tmp_path / "adapter.safetensors")
    second = AutoModelForCausalLM.from_pretrained(folder)
    again = measure_training(second, rows, steps=1, adapter_file=tmp_path / "adapter.safetensors")
    assert again.losses[0] < trained.losses[2]


def test_decoding_is_the_librarys_own_greedy_text(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = equal_rows(1, 10, 256)[0]
    done = measure_decoding(model, prompt, new_tokens=6)
    whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)
    assert list(done.tokens) == whole[0, 10:].tolist()
    assert len(done.seconds) == 5


def test_both_measurements_run_in_processes_of_their_own(folder: Path) -> None:
    rows = equal_rows(1, 8, 256)
    train = UnsplitRequest(model_folder=str(folder), rows=rows, steps=1)
    decode = UnsplitRequest(model_folder=str(folder), rows=rows, new_tokens=2)
    assert len(run_isolated("benchmarks.unsplit", train, Training, num_threads=1).seconds) == 1
    assert len(run_isolated("benchmarks.unsplit", decode, Decoding, num_threads=1).tokens) == 2


def test_a_failed_measurement_is_an_error() -> None:
    request = UnsplitRequest(model_folder="/nowhere", rows=[[1]], steps=1)
    with pytest.raises(RuntimeError, match="status 1"):
        run_isolated("benchmarks.unsplit", request, Training, num_threads=1)


def test_measured_processes_wait_passively() -> None:
    environment = process_environment(2)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == "2"


def test_the_smoke_model_needs_no_download(tmp_path: Path) -> None:
    folder = subject_folder(None, is_smoke=True, work_folder=tmp_path)
    assert (folder / "model.safetensors").is_file()


def test_the_result_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = parse_arguments("x", ["--profile", "smoke", "--json", "--threads", "1,2,4"])
    emit({"ratio": 1.25, "ok": True}, arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"ratio": 1.25, "ok": True}
    assert arguments.threads == (1, 2, 4)
    assert arguments.is_smoke


def test_warm_up_steps_are_left_out_of_the_median() -> None:
    assert median([9.0, 1.0, 2.0, 3.0], skip=1) == 2.0
