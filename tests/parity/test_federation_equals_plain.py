"""Rounds over the real server against the plain things that they replace."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer import Client
from cutlayer.client.schedule import batch_plan
from cutlayer.federation.secure.hidden import GroupKey
from cutlayer.model.adapters import initial_state
from tests.federation_worlds import NAMES, at_once, federation, lone_settings, owners
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, running_server, server_settings

PLAIN = {"enabled": False}


def _ends(client: Client) -> dict[str, Tensor]:
    states = client._parts.adapter_states()
    return {**states["head"], **states["tail"]}


def _assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, x in ours.items():
        torch.testing.assert_close(x, theirs[key], rtol=0, atol=atol)


def _run(folder: Path, rules: dict[str, object], **changes: object) -> list[dict[str, Tensor]]:
    """Ends of all members after the federation."""
    folder.mkdir(mode=0o700)
    model = tiny_llama_folder(folder)
    # Alone, or who shared a call with whom would move the last bits, and AdamW what they mean.
    settings = server_settings(model, folder, federation=rules, batch={"max_clients": 1})
    with running_server(settings) as server:
        clients = owners(server, model, folder, **changes)
        at_once([client.train for client in clients])
        ends = [_ends(client) for client in clients]
        for client in clients:
            client.close()
    for other in ends[1:]:
        _assert_close(other, ends[0], atol=0.0)
    return ends


def test_secure_aggregation_equals_plain_aggregation(tmp_path: Path) -> None:
    secure = _run(tmp_path / "secure", federation())
    plain = _run(tmp_path / "plain", federation(secure=PLAIN), federation__share_plain_updates=True)
    _assert_close(secure[0], plain[0], atol=1e-6)


def test_a_hidden_aggregate_equals_a_visible_one(tmp_path: Path) -> None:
    GroupKey.create(tmp_path / "group.key")
    hidden = _run(
        tmp_path / "hidden",
        federation(secure={"hides_aggregate": True}),
        federation__group_key_file=str(tmp_path / "group.key"),
    )
    visible = _run(tmp_path / "visible", federation())
    _assert_close(hidden[0], visible[0], atol=1e-6)


def test_one_local_step_of_fedavg_equals_the_mean_of_members_who_trained_alone(
    tmp_path: Path,
) -> None:
    rules = federation(rounds=1, local_steps=1, secure=PLAIN)
    together = _run(tmp_path / "fed", rules, federation__share_plain_updates=True)[0]
    alone, weights = [], []
    (tmp_path / "alone").mkdir(mode=0o700)
    model = tiny_llama_folder(tmp_path / "alone")
    with running_server(server_settings(model, tmp_path / "alone")) as server:
        for number, name in enumerate(NAMES):
            settings = lone_settings(
                model, tmp_path / "alone", name, 8 + 4 * number,
                train__steps=1, train__schedule="constant",
            )  # fmt: skip
            with client_of(server, settings, name) as client:
                record = client.train().history[0]
                alone.append(_ends(client))
                weights.append(record.num_scored)
    total = sum(weights)
    mean = {
        key: sum(w / total * ends[key].double() for w, ends in zip(weights, alone, strict=True))
        for key in together
    }
    _assert_close(together, {k: x.float() for k, x in mean.items()}, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_every_step_equals_centralised_training(tmp_path: Path, clip_norm: float | None) -> None:
    num_rounds = 12
    strategy = {"kind": "every_step", "lr": 0.02, "beta2": 0.999, "clip_norm": clip_norm}
    rules = federation(rounds=num_rounds, strategy=strategy)
    model = tiny_llama_folder(tmp_path)
    with running_server(server_settings(model, tmp_path, federation=rules)) as server:
        clients = owners(server, model, tmp_path)
        histories = [p.history for p in at_once([client.train for client in clients])]
        losses = _centralised(clients, tmp_path, model, num_rounds, clip_norm)
        for client in clients:
            client.close()
    for step, wanted in enumerate(losses):
        records = [history[step] for history in histories]
        total = sum(record.num_scored for record in records)
        assert sum(r.loss * r.num_scored for r in records) / total == pytest.approx(
            wanted, rel=1e-5
        )
    assert losses[-1] < losses[0]


def _centralised(
    clients: list[Client], folder: Path, model: Path, num_steps: int, clip_norm: float | None
) -> list[float]:
    """Losses of unsplit PEFT on the union of the members' rows of each step."""
    base = AutoModelForCausalLM.from_pretrained(model)
    peft = PeftModel.from_pretrained(base, _untrained(clients[0], folder), is_trainable=True)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.999), weight_decay=0.0)
    plans = []
    for client in clients:
        rows, settings = client.rows(), client.settings.train
        assert settings is not None
        plan = batch_plan(rows, settings.model_copy(update={"steps": num_steps}))
        plans.append((rows.train, plan))
    losses = []
    for step in range(num_steps):
        chosen = [rows[index] for rows, plan in plans for index in plan.rows_of(step)]
        loss_sum, num_scored = torch.zeros(()), 0
        for row in chosen:
            labels = torch.tensor(row.labels)
            logits = peft(input_ids=torch.tensor([row.tokens])).logits[0, :-1].float()
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                logits, labels[1:], ignore_index=-100, reduction="sum"
            )
            num_scored += int((labels[1:] != -100).sum())
        (loss_sum / num_scored).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss_sum.detach()) / num_scored)
        assert math.isfinite(losses[-1])
    return losses


def _untrained(client: Client, folder: Path) -> Path:
    """The adapter that the federation began with, as a PEFT folder."""
    client.export(folder / "first")
    file = folder / "first" / "adapter_model.safetensors"
    layout = {key: list(x.shape) for key, x in load_file(file).items()}
    save_file(initial_state(layout, client.settings.adapter.seed), file)
    return folder / "first"


def test_the_result_generates_and_exports_as_the_member_s_own_run(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    prompt = [65, 66, 67, 68]
    with running_server(server_settings(model, tmp_path, federation=federation())) as server:
        clients = owners(server, model, tmp_path, train__lr=0.1)
        at_once([client.train for client in clients])
        logits = [client.score([prompt])[0] for client in clients]
        clients[0].export(tmp_path / "adapter")
        clients[1].export(tmp_path / "other")
        for client in clients:
            client.close()
    base = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        untrained = base(input_ids=torch.tensor([prompt])).logits[0, -1]
        peft = PeftModel.from_pretrained(base, tmp_path / "adapter")
        wanted = peft(input_ids=torch.tensor([prompt])).logits[0, -1]
    for got in logits:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - untrained).abs().max() > 0.01
    file = "adapter_model.safetensors"
    _assert_close(
        load_file(tmp_path / "adapter" / file), load_file(tmp_path / "other" / file), atol=0.0
    )
