"""A federation of different cuts against the plain things: one model, plain means, one cut."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer import Client, TrunkServer
from cutlayer.client.schedule import batch_plan
from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.model.adapters import initial_state
from cutlayer.model.tensor_file import read_tensors
from tests.cuts_worlds import cut_owners, eight_blocks, lone_adapters, mixed, wide_server
from tests.federation_worlds import at_once, federation, owners
from tests.tiny_models import tiny_llama_folder
from tests.worlds import running_server, server_settings

THREE = {"anna": (1, 7), "bert": (2, 6), "cleo": (3, 5)}
SIX = {
    "anna": (1, 7), "bert": (2, 6), "cleo": (3, 5), "dora": (2, 7), "emil": (1, 4), "fred": (4, 5)
}  # fmt: skip
OPEN = {"enabled": False}
MINE = {"federation__min_cohort": 1, "federation__share_plain_updates": True}
"""Different cuts of few members leave blocks to one: these owners accept that."""


def _state(server: TrunkServer, round_number: int | None = None) -> dict[str, Tensor]:
    assert server.federation is not None
    store = server.federation.store
    number = store.round if round_number is None else round_number
    return dict(Checkpoint.of_files(store._checkpoints.load(number)).state)


def _assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, x in ours.items():
        torch.testing.assert_close(x, theirs[key], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("cuts", "secure"),
    [(THREE, {"value_bits": 32}), (THREE, OPEN), (SIX, {"value_bits": 32})],
    ids=["secure", "open", "six"],
)
def test_every_step_s_gradient_is_that_of_the_unsplit_model_on_all_rows(
    tmp_path: Path, cuts: dict[str, tuple[int, int]], secure: dict[str, object]
) -> None:
    model = eight_blocks(tmp_path)
    # Without a first moment's memory, the moment is the gradient.
    strategy = {"kind": "every_step", "lr": 0.02, "beta1": 0.0}
    rules = mixed(strategy=strategy, secure=secure, min_members=len(cuts), quorum=3)
    with running_server(wide_server(model, tmp_path, rules)) as server:
        clients = cut_owners(server, model, tmp_path, cuts, **MINE)
        at_once([client.train for client in clients])
        start = _state(server, 1)
        assert server.federation is not None
        files = server.federation.store._checkpoints.load(2)
        moments = read_tensors(files, "strategy.safetensors")
        wanted = _unsplit_gradient(clients, tmp_path, model, start)
        for client in clients:
            client.close()
    for key, gradient in wanted.items():
        largest = float((moments[f"{key}.exp_avg"] - gradient).abs().max() / gradient.abs().max())
        assert largest < 1e-5, key
    assert len(wanted) == len(start)


def _unsplit_gradient(
    clients: list[Client], folder: Path, model: Path, start: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Of the mean loss over the rows of all members' second step."""
    clients[0].export(folder / "start")
    file = folder / "start" / "adapter_model.safetensors"
    assert load_file(file).keys() == start.keys()
    save_file(dict(start), file)
    base = AutoModelForCausalLM.from_pretrained(model)
    peft = PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    loss_sum, num_scored = torch.zeros(()), 0
    for client in clients:
        rows, train = client.rows(), client.settings.train
        assert train is not None
        plan = batch_plan(rows, train.model_copy(update={"steps": 2}))
        for index in plan.rows_of(1):
            labels = torch.tensor(rows.train[index].labels)
            logits = peft(input_ids=torch.tensor([rows.train[index].tokens])).logits[0, :-1]
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                logits.float(), labels[1:], ignore_index=-100, reduction="sum"
            )
            num_scored += int((labels[1:] != -100).sum())
    torch.autograd.backward(loss_sum / num_scored)
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in peft.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, dict[str, Tensor]]]:
    """Scored tokens and whole adapter of each member that trains two steps by itself."""
    return lone_adapters(tmp_path_factory.mktemp("alone"), THREE)


@pytest.mark.parametrize("kind", ["fedavg", "secure fedavg", "median", "trimmed_mean", "svd"])
def test_a_round_is_the_strategy_s_plain_rule_on_whoever_trained_a_key(
    tmp_path: Path, alone: list[tuple[int, dict[str, Tensor]]], kind: str
) -> None:
    secure = {} if "secure" in kind else OPEN
    strategy = {"kind": kind.removeprefix("secure ")}
    rules = mixed(rounds=1, strategy=strategy, secure=secure)
    model = eight_blocks(tmp_path)
    settings = wide_server(model, tmp_path, rules, max_clients=1)
    with running_server(settings) as server:
        clients = cut_owners(server, model, tmp_path, THREE, **MINE)
        at_once([client.train for client in clients])
        ours = _state(server)
        for client in clients:
            client.close()
    if kind == "svd":
        _assert_products(ours, alone)
        return
    total, wanted = sum(weight for weight, _ in alone), {}
    for key in ours:
        values = torch.stack([adapter[key].double() for _, adapter in alone])
        weights = torch.tensor([weight / total for weight, _ in alone], dtype=torch.float64)
        # Of three members, a fifth at each end leaves one: the median.
        wanted[key] = (
            torch.tensordot(weights, values, 1) if "fedavg" in kind else values.median(0).values
        ).float()
    _assert_close(ours, wanted, atol=1e-6)


def _assert_products(
    ours: Mapping[str, Tensor], alone: list[tuple[int, dict[str, Tensor]]]
) -> None:
    """B A is the best approximation of the weighted mean of the members' B A, layer by layer."""
    total = sum(weight for weight, _ in alone)
    for key_a in [key for key in ours if ".lora_A." in key]:
        key_b = key_a.replace(".lora_A.", ".lora_B.")
        products = [w / total * x[key_b].double() @ x[key_a].double() for w, x in alone]
        u, values, vt = torch.linalg.svd(torch.stack(products).sum(0), full_matrices=False)
        rank = len(ours[key_a])
        best = u[:, :rank] @ values[:rank].diag() @ vt[:rank]
        product = ours[key_b].double() @ ours[key_a].double()
        torch.testing.assert_close(product, best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("secure", [{}, OPEN], ids=["secure", "open"])
def test_equal_cuts_in_mixed_mode_are_the_plain_mode(
    tmp_path: Path, secure: dict[str, object]
) -> None:
    found = []
    for rules in (federation(secure=secure), mixed(secure=secure)):
        folder = tmp_path / str(len(found))
        folder.mkdir(mode=0o700)
        model = tiny_llama_folder(folder)
        settings = server_settings(model, folder, federation=rules, batch={"max_clients": 1})
        with running_server(settings) as server:
            clients = owners(server, model, folder, federation__share_plain_updates=True)
            at_once([client.train for client in clients])
            found.append(_state(server))
            for client in clients:
                client.close()
    _assert_close(found[1], found[0], atol=1e-7)


def test_frozen_a_stays_as_drawn_and_members_send_b_alone(tmp_path: Path) -> None:
    model, rules = eight_blocks(tmp_path), mixed(strategy={"kind": "fedavg_frozen_a"})
    with running_server(wide_server(model, tmp_path, rules)) as server:
        clients = cut_owners(server, model, tmp_path, THREE, adapter__train_a=False, **MINE)
        at_once([client.train for client in clients])
        found = _state(server)
        for client in clients:
            client.close()
    drawn = initial_state({key: list(x.shape) for key, x in found.items()}, seed=0)
    for key, x in found.items():
        assert torch.equal(x, drawn[key]) == (".lora_A." in key), key


def test_every_member_generates_what_the_others_do(tmp_path: Path) -> None:
    """The result is one adapter, wherever its blocks are: at each client, and in each run here."""
    model, prompt = eight_blocks(tmp_path), [97, 98, 97, 98]
    with running_server(wide_server(model, tmp_path, mixed())) as server:
        clients = cut_owners(server, model, tmp_path, THREE, train__lr=0.1, **MINE)
        at_once([client.train for client in clients])
        logits = [client.score([prompt])[0] for client in clients]
        wanted = _state(server)
        for client in clients:
            client.export(tmp_path / "adapter" / client.run_id)
            file = tmp_path / "adapter" / client.run_id / "adapter_model.safetensors"
            _assert_close(load_file(file), wanted, atol=0.0)
            client.close()
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-5)
