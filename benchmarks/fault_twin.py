"""The unsplit model trained on a member's rows: what its update has to be, whatever happened.

Plain PEFT and torch.optim.AdamW; nothing of the product but the order of the rows.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.fault_evidence import Evidence, Sent
from benchmarks.fault_reference import Contribution, Reference
from benchmarks.fault_rounds import distance
from benchmarks.fault_settings import ADAPTER, EPS, LR, World, client_settings
from cutlayer.client.schedule import batch_plan
from cutlayer.client.settings import ClientSettings
from cutlayer.data.batches import BatchPlan
from cutlayer.data.load import Dataset, load_dataset
from cutlayer.data.template import RowLimits
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.store_rows import RoundRow
from cutlayer.federation.trunk_pool import TrunkUpdate
from cutlayer.model.adapters import initial_state
from cutlayer.model.folder import resolve_model
from cutlayer.wire.federation_messages import round_run_id

__all__ = ["TWIN_TOLERANCE", "Twin", "differences", "recompute"]

TWIN_TOLERANCE = 1e-4
"""Float32 sums in another order, through two AdamW steps; a missing row moves 100 times more."""
_CLIP_NORM = 1.0
_MAX_GUESSES = 512
Learn = Callable[[str, int], Sent]
"""What a member learns, by its name and how many updates it handed in before."""


class Twin:
    """Computes updates of all parts, trunk included."""

    def __init__(self, model: Path) -> None:
        """Load the unsplit model with a fresh adapter."""
        self._folder = resolve_model(str(model))
        base = AutoModelForCausalLM.from_pretrained(model)
        config = LoraConfig(
            r=ADAPTER["rank"], lora_alpha=ADAPTER["alpha"], target_modules="all-linear"
        )
        self._model = get_peft_model(base, config)
        self._parameters: dict[str, nn.Parameter] = {
            name.replace(".default", ""): parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }

    def layout(self) -> dict[str, list[int]]:
        """Key and shape of every tensor of the adapter."""
        return {key: list(x.shape) for key, x in sorted(self._parameters.items())}

    def update(
        self,
        settings: ClientSettings,
        start: Mapping[str, Tensor],
        num_before: int,
        rules: FederationSettings,
    ) -> Sent:
        """What a member learns in a round.

        Args:
            settings: of the member.
            start: head, trunk and tail at the round's beginning.
            num_before: updates that the member handed in before.
            rules: local steps; or the mean gradient of one step's rows, for `every_step`.
        """
        assert settings.data is not None
        assert settings.train is not None
        config = self._folder.config
        limits = RowLimits(
            context_length=config.max_position_embeddings, vocab_size=config.vocab_size
        )
        rows = load_dataset(settings.data, self._folder.tokenizer(), limits)
        is_gradient = rules.strategy.kind == "every_step"
        num_steps = 1 if is_gradient else rules.local_steps
        most = rules.rounds * num_steps
        plan = batch_plan(rows, settings.train.model_copy(update={"steps": most}))
        first = num_before * num_steps
        self._load(start)
        if is_gradient:
            weight = self._backward(rows, plan, first % most)
            return Sent(update=self._gradients(), weight=weight)
        adamw = torch.optim.AdamW(self._parameters.values(), lr=LR, eps=EPS, weight_decay=0.0)
        weight = 0
        for step in range(first, first + num_steps):
            adamw.zero_grad()
            weight += self._backward(rows, plan, step % most)
            nn.utils.clip_grad_norm_(self._parameters.values(), _CLIP_NORM)
            adamw.step()
        changed = {k: p.detach() - start[k] for k, p in self._parameters.items()}
        return Sent(update=changed, weight=weight)

    @torch.no_grad()
    def _load(self, start: Mapping[str, Tensor]) -> None:
        for key, parameter in self._parameters.items():
            parameter.copy_(start[key])
            parameter.grad = None

    def _gradients(self) -> dict[str, Tensor]:
        found = {k: p.grad.clone() for k, p in self._parameters.items() if p.grad is not None}
        self._load({k: p.detach() for k, p in self._parameters.items()})
        return found

    def _backward(self, rows: Dataset, plan: BatchPlan, step: int) -> int:
        """Gradients of the mean loss; the tokens that it was taken of."""
        loss_sum, num_scored = torch.zeros(()), 0
        for row in (rows.train[index] for index in plan.rows_of(step)):
            labels = torch.tensor(row.labels)[1:]
            logits = self._model(input_ids=torch.tensor([row.tokens])).logits[0, :-1]
            loss_sum = loss_sum + nn.functional.cross_entropy(
                logits, labels, ignore_index=-100, reduction="sum"
            )
            num_scored += int((labels != -100).sum())
        (loss_sum / num_scored).backward()
        return num_scored


def recompute(twin: Twin, world: World, evidence: Evidence) -> Evidence:
    """The same evidence with what the unsplit model says that counted members sent.

    Which of its rows a member trained on depends on how many updates it had handed in before, of
    void attempts too. So of every number that is possible, the one is taken that fits best: to what
    the member sent where that was noted, else to what the store made of all.
    """
    rules, store = evidence.rules, evidence.store
    assert store is not None
    again = replace(evidence, sent={}, trunk={})
    if store.layout is None:
        return again
    layout = {**store.layout, **evidence.trunk_layout}
    reference = Reference(rules, initial_state(layout, rules.adapter.seed))
    for row in store.rounds:
        start = reference.state()
        update = partial(_update, twin, world, rules, start)
        if evidence.sent:
            learnt = {name: _as_noted(update, evidence, row, name) for name in row.survivors}
        else:
            learnt = _as_stored(update, evidence, row, reference)
        for name, one in learnt.items():
            again.sent[name, row.number, row.attempts] = [_ends(evidence, one)]
        brought = {name: _collected(evidence, one, start) for name, one in learnt.items()}
        again.trunk[round_run_id(rules.name, row.number, row.attempts)] = [brought]
        reference.advance(reference.mean(_contributions(evidence, learnt)))
    return again


def differences(twin: Twin, world: World, evidence: Evidence) -> Iterator[str]:
    """Updates that members sent although the unsplit model learns something else."""
    plain = recompute(twin, world, evidence)
    for name, wanted in plain.sent.items():
        for sent in evidence.sent.get(name, []):
            apart = distance(sent.update, wanted[0].update)
            if apart > TWIN_TOLERANCE or sent.weight != wanted[0].weight:
                yield f"{name}: the update is {apart:.2g} from that of the unsplit model"
    for run_id, (brought,) in plain.trunk.items():
        for member, wanted_trunk in brought.items():
            found = [one[member] for one in evidence.trunk.get(run_id, []) if member in one]
            apart = min((distance(x.state, wanted_trunk.state) for x in found), default=0.0)
            if apart > TWIN_TOLERANCE:
                yield f"{run_id}: the trunk of {member} is {apart:.2g} from the unsplit model's"


def _update(
    twin: Twin,
    world: World,
    rules: FederationSettings,
    start: Mapping[str, Tensor],
    name: str,
    num_before: int,
) -> Sent:
    return twin.update(client_settings(world, name), start, num_before, rules)


def _possible(evidence: Evidence, row: RoundRow) -> list[int]:
    """How many updates a member may have handed in before this one, the likeliest first."""
    assert evidence.store is not None
    num_begun = sum(one.round <= row.number for one in evidence.store.attempts)
    usual = row.number - 1
    return [usual, *(n for n in range(num_begun) if n != usual)]


def _as_noted(update: Learn, evidence: Evidence, row: RoundRow, name: str) -> Sent:
    noted = evidence.sent.get((name, row.number, row.attempts), [])
    best, least = None, float("inf")
    for num_before in _possible(evidence, row):
        one = update(name, num_before)
        ends = _ends(evidence, one).update
        apart = min((distance(ends, known.update) for known in noted), default=0.0)
        if best is None or apart < least:
            best, least = one, apart
        if least <= TWIN_TOLERANCE:
            break
    assert best is not None
    return best


def _as_stored(
    update: Learn, evidence: Evidence, row: RoundRow, reference: Reference
) -> dict[str, Sent]:
    assert evidence.store is not None
    known = evidence.store.checkpoints[row.number].state
    cached = cache(update)
    best: dict[str, Sent] = {}
    least = float("inf")
    possible = itertools.product(_possible(evidence, row), repeat=len(row.survivors))
    for numbers in itertools.islice(possible, _MAX_GUESSES):
        learnt = {n: cached(n, k) for n, k in zip(row.survivors, numbers, strict=True)}
        after = copy.deepcopy(reference)
        after.advance(reference.mean(_contributions(evidence, learnt)))
        wanted = after.state()
        apart = distance({key: wanted[key] for key in wanted.keys() & known.keys()}, known)
        if not best or apart < least:
            best, least = learnt, apart
        if least <= TWIN_TOLERANCE:
            break
    return best


def _contributions(evidence: Evidence, learnt: Mapping[str, Sent]) -> list[Contribution]:
    return [
        Contribution(member=name, ends=_ends(evidence, one), trunk=_trunk(evidence, one))
        for name, one in learnt.items()
    ]


def _ends(evidence: Evidence, learnt: Sent) -> Sent:
    keys = learnt.update.keys() - evidence.trunk_layout.keys()
    return Sent(update={key: learnt.update[key] for key in sorted(keys)}, weight=learnt.weight)


def _trunk(evidence: Evidence, learnt: Sent) -> Sent:
    """Changes; or gradients of the summed loss, as the trunk has them."""
    factor = learnt.weight if evidence.rules.strategy.kind == "every_step" else 1
    update = {key: learnt.update[key] * factor for key in evidence.trunk_layout}
    return Sent(update=update, weight=learnt.weight)


def _collected(evidence: Evidence, learnt: Sent, start: Mapping[str, Tensor]) -> TrunkUpdate:
    trunk = _trunk(evidence, learnt).update
    if evidence.rules.strategy.kind != "every_step":
        trunk = {key: start[key] + x for key, x in trunk.items()}
    return TrunkUpdate(state=trunk, weight=learnt.weight)
