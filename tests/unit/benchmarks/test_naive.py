"""The naive baseline: it computes what the unsplit model computes, and sends what the text says."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.link import LINK_PROFILES, DelayingProxy
from benchmarks.naive import (
    NaiveClient,
    NaiveServer,
    sampled_lengths,
)
from benchmarks.naive_parts import MASK_FORMS, NaivePart, completion_loss, pad_left
from benchmarks.subjects import equal_rows, ragged_rows, write_tiny_llama

LOWER, UPPER, NUM_BLOCKS, HIDDEN = 2, 4, 6, 64
_FORMS = sorted(MASK_FORMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[NaiveServer]:
    with NaiveServer(folder, LOWER, UPPER, num_threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def proxy(server: NaiveServer) -> Iterator[DelayingProxy]:
    with DelayingProxy(server.port, LINK_PROFILES["loopback"]) as running:
        yield running


@pytest.fixture(scope="module")
def client(proxy: DelayingProxy, folder: Path) -> Iterator[NaiveClient]:
    with NaiveClient(proxy.port, folder, LOWER, UPPER) as connected:
        yield connected


@pytest.mark.parametrize("form", _FORMS)
def test_parts_on_a_padded_batch_give_the_unsplit_models_loss(folder: Path, form: str) -> None:
    rows = ragged_rows([5, 12, 9], vocab_size=256)
    batch = pad_left(rows, length=14)
    mask = MASK_FORMS[form].use(MASK_FORMS[form].make(batch.is_real_BS), 14)
    x = batch.tokens_BS
    blocks = (range(LOWER), range(LOWER, UPPER), range(UPPER, NUM_BLOCKS))
    parts = [NaivePart(folder, chosen) for chosen in blocks]
    for part in parts:
        x = part(x, mask, batch.positions_BS)
    loss = completion_loss(parts[-1], x, batch).item()
    assert loss == pytest.approx(_unsplit_loss(folder, rows), rel=1e-6)


def _unsplit_loss(folder: Path, rows: list[list[int]]) -> float:
    """Row by row and without padding: the plainest thing to compare with."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = 0.0
    for row in rows:
        tokens = torch.tensor([row])
        total += model(tokens, labels=tokens).loss.item() * (len(row) - 1)
    return total / sum(len(row) - 1 for row in rows)


@pytest.mark.parametrize("form", ["dense-s", "2d", "lengths"])
def test_a_training_step_sends_four_activations_two_masks_and_positions(
    client: NaiveClient, form: str
) -> None:
    done = client.train_steps(equal_rows(3, 20, 256), steps=2, mask_form=form)
    mask_bytes = {"dense-s": 3 * 20 * 20 * 4, "2d": 3 * 20 * 8, "lengths": 3 * 8}[form]
    payload = 4 * 3 * 20 * HIDDEN * 4 + 2 * mask_bytes + 2 * 8 * 3 * 20
    assert payload <= done.bytes_up[0] + done.bytes_down[0] <= payload + 1000
    assert done.losses[1] < done.losses[0]


def test_the_published_mask_has_4096_columns_whatever_the_rows(client: NaiveClient) -> None:
    done = client.train_steps(equal_rows(1, 8, 256), steps=1, mask_form="dense-max")
    assert done.bytes_up[0] > 4096 * 4096 * 4


def test_training_moves_all_three_parts(folder: Path) -> None:
    """Were one part's optimizer not stepping, the losses of its frozen twin would be the same."""
    rows = equal_rows(2, 16, 256)
    with (
        NaiveServer(folder, LOWER, UPPER, num_threads=1) as server,
        NaiveClient(server.port, folder, LOWER, UPPER) as client,
    ):
        losses = client.train_steps(rows, steps=4, mask_form="2d").losses
    assert losses == pytest.approx(_joint_training(folder, rows, steps=4), rel=1e-5)


def _joint_training(folder: Path, rows: list[list[int]], steps: int) -> list[float]:
    blocks = (range(LOWER), range(LOWER, UPPER), range(UPPER, NUM_BLOCKS))
    parts = [NaivePart(folder, chosen) for chosen in blocks]
    weights = [weight for part in parts for weight in part.trainable()]
    optimizer = torch.optim.AdamW(weights, lr=5e-4)
    batch, losses = pad_left(rows), []
    for _ in range(steps):
        x = batch.tokens_BS
        for part in parts:
            x = part(x, batch.is_real_BS, batch.positions_BS)
        loss = completion_loss(parts[-1], x, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_generation_is_the_unsplit_models_greedy_continuation(folder: Path) -> None:
    prompt = equal_rows(1, 10, 256)[0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)
    with (
        NaiveServer(folder, LOWER, UPPER, num_threads=1) as server,
        NaiveClient(server.port, folder, LOWER, UPPER) as client,
    ):
        for form in _FORMS:
            done = client.generate(prompt, 6, form, lengths_sampled=None)
            assert list(done.tokens) == whole[0, 10:].tolist()


def test_a_sampled_generation_sums_the_bytes_of_all_its_tokens(client: NaiveClient) -> None:
    prompt = equal_rows(1, 12, 256)[0]
    sampled = client.generate(prompt, 15, "2d", lengths_sampled=4)
    whole = client.generate(prompt, 15, "2d", lengths_sampled=None)
    assert len(sampled.measured_lengths) == 4
    assert sampled.bytes_up == pytest.approx(whole.bytes_up, rel=0.01)


def test_lengths_are_sampled_evenly_with_both_ends() -> None:
    assert sampled_lengths(256, 32, 8) == [256, 260, 265, 269, 274, 278, 283, 287]
    assert sampled_lengths(256, 3, 8) == [256, 257, 258]


def test_the_proxy_counts_the_clients_socket_bytes(
    client: NaiveClient, proxy: DelayingProxy
) -> None:
    before = proxy.counters()
    done = client.train_steps(equal_rows(1, 8, 256), steps=2, mask_form="2d")
    crossed = proxy.counters() - before
    assert 0 <= crossed.bytes_up - sum(done.bytes_up) < 200
    assert 0 <= crossed.bytes_down - sum(done.bytes_down) < 200


def test_two_clients_take_steps_in_turn(folder: Path) -> None:
    rows = equal_rows(1, 8, 256)
    with NaiveServer(folder, LOWER, UPPER, num_threads=1, num_clients=2) as server:
        clients = [NaiveClient(server.port, folder, LOWER, UPPER) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(one.train_steps, rows, 3, "2d") for one in clients]
            results = [each.result(timeout=60) for each in waiting]
        for one in clients:
            one.close()
    assert [len(result.seconds) for result in results] == [3, 3]
