"""The unsplit model trained on a member's rows: what its update has to be, whatever happened.

Plain PEFT and torch.optim.AdamW; nothing of the product but the order of the rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
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
from cutlayer.federation.trunk_pool import TrunkUpdate
from cutlayer.model.adapters import initial_state
from cutlayer.model.folder import resolve_model
from cutlayer.wire.federation_messages import round_run_id

__all__ = ["TWIN_TOLERANCE", "Twin", "differences", "recompute"]

TWIN_TOLERANCE = 1e-4
"""Float32 sums in another order, through two AdamW steps; a missing row moves 100 times more."""
_CLIP_NORM = 1.0


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
        round_number: int,
        rules: FederationSettings,
    ) -> Sent:
        """What a member learns in a round.

        Args:
            settings: of the member.
            start: head, trunk and tail at the round's beginning.
            round_number: from 1.
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
        train = settings.train.model_copy(update={"steps": round_number * num_steps})
        plan, first = batch_plan(rows, train), (round_number - 1) * num_steps
        self._load(start)
        if is_gradient:
            weight = self._backward(rows, plan, first)
            return Sent(update=self._gradients(), weight=weight)
        adamw = torch.optim.AdamW(self._parameters.values(), lr=LR, eps=EPS, weight_decay=0.0)
        weight = 0
        for step in range(first, first + num_steps):
            adamw.zero_grad()
            weight += self._backward(rows, plan, step)
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


def recompute(twin: Twin, world: World, evidence: Evidence) -> None:
    """Write into the evidence what each counted member must have sent, and its trunk learnt."""
    rules, store = evidence.rules, evidence.store
    assert store is not None
    if store.layout is None:
        return
    layout = {**store.layout, **evidence.trunk_layout}
    reference = Reference(rules, initial_state(layout, rules.adapter.seed))
    for row in store.rounds:
        start, brought, given = reference.state(), {}, []
        for member in row.survivors:
            learnt = twin.update(client_settings(world, member), start, row.number, rules)
            ends = {key: learnt.update[key] for key in store.layout}
            trunk = {key: learnt.update[key] for key in evidence.trunk_layout}
            sent = Sent(update=ends, weight=learnt.weight)
            evidence.sent[member, row.number, row.attempts] = [sent]
            is_gradient = rules.strategy.kind == "every_step"
            scaled = {key: x * learnt.weight if is_gradient else x for key, x in trunk.items()}
            given.append(
                Contribution(
                    member=member, ends=sent, trunk=Sent(update=scaled, weight=learnt.weight)
                )
            )
            state = scaled if is_gradient else {key: start[key] + x for key, x in trunk.items()}
            brought[member] = TrunkUpdate(state=state, weight=learnt.weight)
        evidence.trunk[round_run_id(rules.name, row.number, row.attempts)] = [brought]
        reference.advance(reference.mean(given))


def differences(twin: Twin, world: World, evidence: Evidence) -> Iterator[str]:
    """Updates that members sent although the unsplit model learns something else."""
    plain = replace(evidence, sent={}, trunk={})
    recompute(twin, world, plain)
    for name, wanted in plain.sent.items():
        for sent in evidence.sent.get(name, []):
            apart = distance(sent.update, wanted[0].update)
            if apart > TWIN_TOLERANCE or sent.weight != wanted[0].weight:
                yield f"{name}: the update is {apart:.2g} from that of the unsplit model"
    for run_id, brought in plain.trunk.items():
        for member, wanted_trunk in brought[0].items():
            apart = min(
                (
                    distance(one[member].state, wanted_trunk.state)
                    for one in evidence.trunk.get(run_id, [])
                    if member in one
                ),
                default=0.0,
            )
            if apart > TWIN_TOLERANCE:
                yield f"{run_id}: the trunk of {member} is {apart:.2g} from the unsplit model's"
