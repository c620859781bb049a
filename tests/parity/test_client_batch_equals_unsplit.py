"""Clients that share the trunk's calls learn what the unsplit model learns from all their rows.

Shapes: N = tokens of a micro-batch, D = hidden size.
"""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from cutlayer import Client, Cut, load_parts
from cutlayer.client.run_state import StepRecord
from cutlayer.errors import CutlayerError, ProtocolError
from cutlayer.model.adapters import AdapterState
from cutlayer.model.loss import completion_loss_sum
from cutlayer.model.partition import Head, Tail, Trunk
from cutlayer.model.rows import Rows, pack
from cutlayer.server.batches import TrunkCall, TrunkResult
from cutlayer.server.host import TrunkHost
from cutlayer.storage.files import private_folder
from tests.tiny_models import tiny_model
from tests.unit.server.trunk_world import (
    SETTINGS,
    backward_call,
    finished,
    forward_call,
    opening,
    random_ND,
    random_state,
    tiny_host,
    tiny_trunk,
)
from tests.worlds import client_of, client_settings, running_server, server_settings, write_rows

CUT = Cut(1, 3)
FEDERATION, ROUND = "fed", "fed.r1.a1"
ROW_LENGTHS = {
    "a": [[7, 3]],
    "b": [[5], [2, 9]],
    "c": [[4, 4, 4], [6], [1]],
    "d": [[11], [3, 3]],
}
"""Lengths of the rows of each micro-batch of each client: other numbers for everybody."""


@dataclass
class _Member:
    """One client's step: its rows, and where it stands."""

    name: str
    micros: list[Rows]
    head: Head
    tail: Tail
    outputs: dict[int, Tensor] = field(default_factory=dict)
    num_backward: int = 0

    def next_call(self) -> TrunkCall | None:
        """FORWARD of all micro-batches before the first BACKWARD, as with several in flight."""
        done = len(self.outputs)
        if done < len(self.micros):
            rows = self.micros[done]
            header = forward_call(rows.lengths, ROUND, micro=done)
            return TrunkCall(owner=self.name, header=header, tensor=self.head(rows).detach())
        if self.num_backward == len(self.micros):
            return None
        is_last = self.num_backward == len(self.micros) - 1
        header_b = backward_call(ROUND, micro=self.num_backward, is_last=is_last)
        return TrunkCall(owner=self.name, header=header_b, tensor=self._grad(self.num_backward))

    def take(self, result: TrunkResult) -> None:
        if len(self.outputs) < len(self.micros):
            assert result.tensor is not None
            self.outputs[len(self.outputs)] = result.tensor
        else:
            self.num_backward += 1

    def _grad(self, micro: int) -> Tensor:
        rows, y_ND = self.micros[micro], self.outputs[micro].detach().requires_grad_()
        assert rows.tokens_N is not None
        completion_loss_sum(self.tail, y_ND, rows, rows.tokens_N)[0].backward()
        assert y_ND.grad is not None
        return y_ND.grad


def _rows(lengths: Sequence[int], seed: int) -> Rows:
    numbers = random.Random(seed)
    return pack([[numbers.randrange(256) for _ in range(length)] for length in lengths])


def _members(model: Path) -> dict[str, _Member]:
    head, _, tail = load_parts(model, CUT)
    return {
        name: _Member(name, [_rows(ls, 10 * i + j) for j, ls in enumerate(micros)], head, tail)
        for i, (name, micros) in enumerate(ROW_LENGTHS.items())
    }


def _host(tmp_path: Path, names: Sequence[str], **limits: object) -> TrunkHost:
    """All start from the same weights, as the members of a federation's round do."""
    trunk = tiny_trunk(tmp_path)
    host = tiny_host(tmp_path, trunk, **limits)
    start = random_state(trunk, 3)
    host.begin_round(ROUND, SETTINGS, dict.fromkeys(names, start))
    for name in names:
        host.open_run(name, opening(ROUND, federation=FEDERATION))
    return host


def _gradients(host: TrunkHost, name: str) -> AdapterState:
    return host._runs[name, ROUND]._adapter.gradients()


def _unsplit_gradients(
    model: PreTrainedModel, rows: Sequence[Rows], start: AdapterState
) -> AdapterState:
    config = LoraConfig(
        r=SETTINGS.rank,
        lora_alpha=SETTINGS.alpha,
        target_modules=[key.split(".")[-3] for key in start],
        layers_to_transform=[1, 2],
    )
    peft = get_peft_model(model, config)
    set_peft_model_state_dict(peft, start)
    loss_sum = torch.zeros(())
    for part in rows:
        assert part.tokens_N is not None
        for tokens in part.tokens_N.split(part.lengths):
            logits = peft(input_ids=tokens[None]).logits[0, :-1].float()
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                logits, tokens[1:], reduction="sum"
            )
    loss_sum.backward()
    named = {n.replace(".default.", "."): p.grad for n, p in peft.named_parameters()}
    return {key: named[key] for key in start}  # type: ignore[misc]


def _far(ours: AdapterState, theirs: AdapterState) -> float:
    """Norm of the difference, relative."""
    flat, other = (torch.cat([s[k].flatten() for k in sorted(theirs)]) for s in (ours, theirs))
    return float(torch.linalg.vector_norm(flat - other) / torch.linalg.vector_norm(other))


def _sum(states: Sequence[AdapterState]) -> AdapterState:
    return {key: torch.stack([state[key] for state in states]).sum(0) for key in states[0]}


def _in_any_order(host: TrunkHost, members: dict[str, _Member], seed: int) -> Iterator[int]:
    """Serve everybody; whoever is drawn and wants the same kind of call shares it."""
    numbers = random.Random(seed)
    while True:
        calls = {n: call for n, m in members.items() if (call := m.next_call()) is not None}
        if not calls:
            return
        kind = numbers.choice(sorted({type(call.header).__name__ for call in calls.values()}))
        same = [n for n, call in calls.items() if type(call.header).__name__ == kind]
        drawn = numbers.sample(same, numbers.randint(1, len(same)))
        results = host.run_together([calls[name] for name in drawn])
        for name, result in zip(drawn, results, strict=True):
            assert isinstance(result, TrunkResult)
            members[name].take(result)
        yield len(drawn)


@pytest.mark.parametrize("seed", range(6))
def test_sum_of_gradients_is_the_unsplit_model_s_in_any_order_of_arrival(
    tmp_path: Path, seed: int
) -> None:
    model, whole = tiny_model("llama", tmp_path)
    members = _members(model)
    host = _host(tmp_path, list(members), max_graph_bytes=200_000 if seed % 3 == 2 else 1 << 30)
    shared = list(_in_any_order(host, members, seed))
    assert max(shared) > 1
    assert host.graph_bytes == 0
    rows = [micro for member in members.values() for micro in member.micros]
    expected = _unsplit_gradients(whole, rows, random_state(tiny_trunk(tmp_path), 3))
    assert _far(_sum([_gradients(host, name) for name in members]), expected) < 1e-5


def test_each_client_s_gradient_is_that_of_its_own_rows(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)[0]
    members = _members(model)
    host = _host(tmp_path, list(members))
    list(_in_any_order(host, members, 1))
    start = random_state(tiny_trunk(tmp_path), 3)
    for name, member in members.items():
        fresh = tiny_model("llama", tmp_path)[1]
        assert _far(_gradients(host, name), _unsplit_gradients(fresh, member.micros, start)) < 1e-5


def test_client_alone_gets_the_bits_of_the_plain_trunk(tmp_path: Path) -> None:
    host = _host(tmp_path, ["a"])
    h_ND, grad_ND = random_ND(7, 0), random_ND(7, 1)
    y_ND = host.forward("a", forward_call([4, 3], ROUND), h_ND)
    grad_in_ND, sq_norm = host.backward("a", backward_call(ROUND), grad_ND)
    trunk, adapter = host._trunk, host._runs["a", ROUND]._adapter
    ours = adapter.gradients()
    for parameter in adapter.parameters():
        parameter.grad = None
    adapter.activate()
    leaf_ND = h_ND.clone().requires_grad_()
    plain_ND = trunk(leaf_ND, Rows(lengths=(4, 3)))
    plain_ND.backward(grad_ND)
    assert torch.equal(y_ND, plain_ND)
    assert grad_in_ND is not None
    assert leaf_ND.grad is not None
    assert torch.equal(grad_in_ND, leaf_ND.grad)
    assert all(torch.equal(value, ours[key]) for key, value in adapter.gradients().items())
    assert sq_norm == adapter.sq_norm()


def _calls(names: str, tensors: dict[str, Tensor] | None = None) -> list[TrunkCall]:
    return [
        TrunkCall(
            owner=name,
            header=forward_call([4, 3], ROUND),
            tensor=(tensors or {}).get(name, random_ND(7, ord(name))),
        )
        for name in names
    ]


def _back(names: str, tensors: dict[str, Tensor] | None = None) -> list[TrunkCall]:
    return [
        TrunkCall(
            owner=name,
            header=backward_call(ROUND),
            tensor=(tensors or {}).get(name, random_ND(7, ord(name) + 50)),
        )
        for name in names
    ]


def _good(results: Sequence[TrunkResult | CutlayerError | RuntimeError]) -> list[TrunkResult]:
    assert all(isinstance(result, TrunkResult) for result in results)
    return [result for result in results if isinstance(result, TrunkResult)]


def _without(tmp_path: Path, names: str) -> TrunkHost:
    """The same clients served one after the other, and no others."""
    private_folder(tmp_path / "alone")
    host = _host(tmp_path / "alone", list(names))
    for name in names:
        _good(host.run_together(_calls(name)))
        _good(host.run_together(_back(name)))
    return host


def _assert_no_trace(host: TrunkHost, others: TrunkHost, names: str) -> None:
    for name in names:
        assert _far(_gradients(host, name), _gradients(others, name)) < 1e-6
        for side in (host, others):
            side._runs[name, ROUND].commit(finished(1, 7))
        ours, theirs = (h._runs[name, ROUND]._adapter.state() for h in (host, others))
        assert _far(ours, theirs) < 1e-6


def test_straggler_leaves_no_trace_and_comes_out_right_itself(tmp_path: Path) -> None:
    host = _host(tmp_path, ["a", "b", "c"])
    _good(host.run_together(_calls("abc")))
    _good(host.run_together(_back("ac")))
    assert host.graph_bytes == 0
    assert all((value == 0).all() for value in _gradients(host, "b").values())
    _good(host.run_together(_back("b")))
    _assert_no_trace(host, _without(tmp_path, "abc"), "abc")


def test_gradients_of_a_joint_call_are_laid_out_as_their_parameters(tmp_path: Path) -> None:
    host = _host(tmp_path, ["a", "b"])
    _good(host.run_together(_calls("ab")))
    _good(host.run_together(_back("ab")))
    for parameter in host._runs["a", ROUND]._adapter.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()


def test_latecomers_of_other_calls_are_recomputed_together(tmp_path: Path) -> None:
    host = _host(tmp_path, ["a", "b", "c", "d"])
    _good(host.run_together(_calls("ab")))
    _good(host.run_together(_calls("cd")))
    _good(host.run_together(_back("a")))
    _good(host.run_together(_back("c")))
    assert host.joint_of("b", backward_call(ROUND)).graph is None
    _good(host.run_together(_back("db")))
    _assert_no_trace(host, _without(tmp_path, "abcd"), "abcd")


@pytest.mark.parametrize("dies_before", ["forward", "backward", "late"])
def test_dead_client_leaves_no_trace(tmp_path: Path, dies_before: str) -> None:
    host = _host(tmp_path, ["a", "b", "c"])
    _good(host.run_together(_calls("ac" if dies_before == "forward" else "abc")))
    if dies_before == "backward":
        host.open_run("b", opening(ROUND, federation=FEDERATION))
        assert host.joint_of("a", backward_call(ROUND)).owners == {"a", "c"}
    _good(host.run_together(_back("ac")))
    host.open_run("b", opening(ROUND, federation=FEDERATION))
    assert host.graph_bytes == 0
    _assert_no_trace(host, _without(tmp_path, "ac"), "ac")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_client_that_sends_nan_is_told_so_and_the_others_do_not_notice(
    tmp_path: Path, value: float
) -> None:
    host = _host(tmp_path, ["a", "b", "c"])
    bad = random_ND(7, 0)
    bad[2, 5] = value
    a, b, c = host.run_together(_calls("abc", {"b": bad}))
    assert isinstance(b, ProtocolError)
    assert "NaN or infinite" in str(b)
    _good([a, c])
    _good(host.run_together(_calls("b")))
    a, b, c = host.run_together(_back("abc", {"b": bad}))
    assert isinstance(b, ProtocolError)
    _good([a, c])
    _assert_no_trace(host, _without(tmp_path, "ac"), "ac")


def test_output_that_overflows_within_the_trunk_poisons_nobody_else(tmp_path: Path) -> None:
    host = _host(tmp_path, ["a", "b", "c"])
    adapter = host._runs["b", ROUND]._adapter
    adapter.load({key: value * 1e30 for key, value in adapter.state().items()})
    a, b, c = host.run_together(_calls("abc"))
    assert isinstance(b, ProtocolError)
    assert "output" in str(b)
    _good([a, c])
    _good(host.run_together(_back("ac")))
    assert host.graph_bytes == 0
    _assert_no_trace(host, _without(tmp_path, "ac"), "ac")


def test_overflowing_gradient_within_a_joint_backward_poisons_nobody_else(tmp_path: Path) -> None:
    host = _host(tmp_path, ["a", "b", "c"])
    _good(host.run_together(_calls("abc")))
    a, b, c = host.run_together(_back("abc", {"b": torch.full((7, 32), 3e38)}))
    assert isinstance(b, ProtocolError)
    assert "gradients" in str(b)
    assert all((value == 0).all() for value in _gradients(host, "b").values())
    assert host.graph_bytes == 0
    _good([a, c])
    _assert_no_trace(host, _without(tmp_path, "ac"), "ac")


def test_call_that_does_not_fit_is_its_own_client_s_error(tmp_path: Path) -> None:
    host = _host(tmp_path, ["a", "b", "c"])
    too_long = TrunkCall(owner="b", header=forward_call([200], ROUND), tensor=random_ND(200, 0))
    unknown = TrunkCall(owner="z", header=forward_call([7], ROUND), tensor=random_ND(7, 0))
    shape = TrunkCall(owner="c", header=forward_call([4], ROUND), tensor=random_ND(7, 0))
    results = host.run_together([_calls("a")[0], too_long, unknown, shape])
    assert [type(result).__name__ for result in results] == [
        "TrunkResult",
        "DataError",
        "StepExpired",
        "ProtocolError",
    ]
    _good(host.run_together(_back("a")))
    _assert_no_trace(host, _without(tmp_path, "a"), "a")


def test_repeated_backward_is_answered_from_the_last_reply(tmp_path: Path) -> None:
    host = _host(tmp_path, ["a", "b"])
    _good(host.run_together(_calls("ab")))
    first = _good(host.run_together(_back("ab")))
    before = _gradients(host, "a")
    again = _good(host.run_together(_back("a")))
    assert torch.equal(again[0].tensor, first[0].tensor)  # type: ignore[arg-type]
    assert again[0].trunk_sq_norm == first[0].trunk_sq_norm
    assert all(torch.equal(value, before[key]) for key, value in _gradients(host, "a").items())


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_dropout_drops_the_same_places_alone_and_together(tmp_path: Path, family: str) -> None:
    settings = SETTINGS.model_copy(update={"dropout": 0.4})
    outputs = []
    for groups in (["ab"], ["a", "b"]):
        trunk: Trunk = tiny_trunk(tmp_path, family, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
        host = tiny_host(tmp_path, trunk)
        assert host.can_share
        start = random_state(trunk, 3, settings)
        host.begin_round(ROUND, settings, {"a": start, "b": start})
        for name in "ab":
            host.open_run(name, opening(ROUND, settings, federation=FEDERATION))
        outputs.append(
            [r.tensor for group in groups for r in _good(host.run_together(_calls(group)))]
        )
    for together, alone in zip(*outputs, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def _train(client: Client) -> list[StepRecord]:
    return client.train().history


def test_clients_that_train_at_the_same_time_equal_each_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)[0]
    names, sizes = ["ann", "bob", "cyd", "dan"], [24, 17, 9, 30]

    def settings_of(name: str, folder: Path) -> object:
        own = private_folder(folder / name)
        changes = {"train__rows_per_step": 2 + sizes[names.index(name)] // 4}
        made = client_settings(model, own, **changes)
        write_rows(own / "rows.jsonl", sizes[names.index(name)])
        return made

    histories: list[dict[str, list[StepRecord]]] = []
    for folder, is_together in ((tmp_path / "one", False), (tmp_path / "all", True)):
        private_folder(folder)
        with running_server(server_settings(model, folder)) as server:
            clients = {
                name: client_of(server, settings_of(name, folder), name)  # type: ignore[arg-type]
                for name in names
            }
            with ThreadPoolExecutor(len(names) if is_together else 1) as pool:
                histories.append(dict(zip(names, pool.map(_train, clients.values()), strict=True)))
            num_calls, num_clients = _batches(server._metrics.render().decode())
            assert (num_clients > 1.2 * num_calls) == is_together
            for client in clients.values():
                client.close()
    for name in names:
        alone, together = (history[name] for history in histories)
        assert [r.loss for r in together] == pytest.approx([r.loss for r in alone], rel=1e-5)
        norms = [r.grad_norm for r in alone]
        assert [r.grad_norm for r in together] == pytest.approx(norms, rel=1e-4)


def _batches(metrics: str) -> tuple[float, float]:
    """How many calls the trunk made, and for how many clients in all."""
    values = dict(
        line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("cutlayer_batch_")
    )
    return float(values["cutlayer_batch_clients_count"]), float(
        values["cutlayer_batch_clients_sum"]
    )
