"""Labels at a server, and a trunk server before an enclave: against the unsplit model."""

import itertools
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cutlayer.client.cached_row import Feed
from cutlayer.client.settings import SamplingSettings
from cutlayer.enclave.owner import SHARED_LABELS, EnclaveClient
from cutlayer.errors import PermissionRefused
from tests.chain_worlds import hop_server, six_blocks
from tests.enclave_worlds import (
    enclave_settings,
    loopback_of,
    owner_of,
    owner_settings,
    running_enclave,
)
from tests.parity.test_enclave_equals_unsplit import _unsplit
from tests.worlds import Table, loopback, running_server

PROMPTS = [[70, 80, 90, 100, 33], [65, 66, 67], [40] * 30]
GREEDY = SamplingSettings(max_new_tokens=10)
NOISE: Table = {"mechanism": "gaussian", "scale": 0.02}
SHARED = {"labels": "server"}


def _hop(lower: int, upper: int, port: int, **privacy: object) -> Table:
    return {
        "lower": lower,
        "upper": upper,
        "connection": {"address": f"127.0.0.1:{port}", "codec": "raw"},
        "privacy": privacy or {"mechanism": "none"},
    }


def _check(
    owner: EnclaveClient, model: Path, folder: Path, num_validation: int
) -> tuple[list[float], list[int]]:
    """Training, evaluation, export and generation of one owner equal the unsplit model's."""
    progress = owner.train()
    owner.export(folder / "first", step=0)
    owner.export(folder / "last")
    losses, weights = _unsplit(model, folder / "first", list(owner.rows().train))
    assert [record.loss for record in progress.history] == pytest.approx(losses, rel=1e-5)
    trained = load_file(folder / "last" / "adapter_model.safetensors")
    assert trained.keys() == weights.keys()
    for key, tensor in trained.items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=2e-5)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "last")
    replies = owner.generate_ids(PROMPTS, GREEDY)
    for prompt, reply, logits_V in zip(PROMPTS, replies, owner.score(PROMPTS), strict=True):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(logits_V, peft(input_ids=tokens).logits[0, -1])
        mask = torch.ones_like(tokens)
        wanted = peft.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
        )
        assert reply == wanted[0, len(prompt) :].tolist()
    assert len(owner.rows().validation) == num_validation
    (loss,) = progress.evaluations.values()
    assert loss == pytest.approx(_mean_loss(peft, owner), rel=1e-5)


def _mean_loss(peft: PeftModel, owner: EnclaveClient) -> float:
    total, count = 0.0, 0
    for row in owner.rows().validation:
        labels = torch.tensor(row.labels)[1:]
        with torch.no_grad():
            logits = peft(input_ids=torch.tensor([row.tokens])).logits[0, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        )
        count += int((labels != -100).sum())
    return total / count


def test_client_server_with_shared_labels_equals_unsplit(tmp_path: Path) -> None:
    model = six_blocks(tmp_path)
    settings = owner_settings(model, tmp_path / "a", data__validation_fraction=0.25, **SHARED)
    with (
        running_enclave(enclave_settings(model, tmp_path)) as server,
        owner_of(server, settings) as owner,
    ):
        assert owner.guarantee == SHARED_LABELS
        _check(owner, model, tmp_path, num_validation=6)


def test_a_server_that_was_not_set_to_take_labels_refuses_them(tmp_path: Path) -> None:
    model = six_blocks(tmp_path)
    with (
        running_enclave(enclave_settings(model, tmp_path, shared_labels=False)) as server,
        owner_of(server, owner_settings(model, tmp_path / "a", **SHARED)) as owner,
        pytest.raises(PermissionRefused, match="shared_labels"),
    ):
        owner.train()


@pytest.mark.parametrize(("labels", "edges"), [("client", (1, 3)), ("server", (1, 2, 4))])
def test_servers_before_the_last_blocks_equal_unsplit(
    tmp_path: Path, edges: tuple[int, ...], labels: str
) -> None:
    model = six_blocks(tmp_path)
    cuts = list(itertools.pairwise(edges))
    hops = [_hop(*cut, port=number) for number, cut in enumerate(cuts, start=2)]
    changes = {"data__validation_fraction": 0.25, "labels": labels, "hops": hops}
    settings = owner_settings(model, tmp_path / "a", **changes)
    inner = enclave_settings(model, tmp_path, model__lower=edges[-1])
    with ExitStack() as stack:
        server = stack.enter_context(running_enclave(inner))
        hosts = [stack.enter_context(running_server(hop_server(model, tmp_path, *c))) for c in cuts]
        owner = stack.enter_context(
            EnclaveClient(
                settings,
                connect=partial(loopback_of, server),
                connect_hops=[partial(loopback, host) for host in hosts],
            )
        )
        _check(owner, model, tmp_path, num_validation=6)
        assert owner.feeder is not None
        assert owner.feeder.num_sent == 24


@pytest.mark.parametrize("lost", ["middle", "inside"])
def test_whoever_loses_rows_of_a_conversation_gets_the_same_bytes_again(
    tmp_path: Path, lost: str
) -> None:
    model = six_blocks(tmp_path)
    hops = [_hop(1, 3, port=2, **NOISE)]
    inner = enclave_settings(model, tmp_path, model__lower=3)
    with ExitStack() as stack:
        inside = [stack.enter_context(running_enclave(inner))]
        middle = [stack.enter_context(running_server(hop_server(model, tmp_path, 1, 3)))]
        owner = stack.enter_context(
            EnclaveClient(
                owner_settings(model, tmp_path / "a", hops=hops),
                connect=lambda: loopback_of(inside[-1]),
                connect_hops=[lambda: loopback(middle[-1])],
            )
        )
        session = owner.generator().session()
        row = session.open_row(40)
        session.step([Feed(row=row, tokens=[70, 80, 90])])
        if lost == "inside":
            inside[0].stop(grace_s=0)
            inside.append(stack.enter_context(running_enclave(inner)))
        else:
            middle[0].stop(grace_s=0)
            middle.append(stack.enter_context(running_server(hop_server(model, tmp_path, 1, 3))))
        owner.trunk.close()
        session.step([Feed(row=row, tokens=[33, 34], num_logits=2)])
        assert session.num_replays >= 1
        ledger = owner._state.privacy.ledger.summary()
        assert ledger.num_vectors == {"generation": 5, "generation.hop2": 5}
