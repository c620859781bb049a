"""The data owner's facade where all later blocks are in an enclave; blocking.

It wires the rooms together and decides nothing: the loop is `client.train`, one step is `step`, one
token `generation`, what leaves `privacy.boundary`. Here are the embedding and the frozen front; no
weight of the other blocks is loaded.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cutlayer.client.attested import attestation_of, note_in
from cutlayer.client.chat import TextPiece
from cutlayer.client.draft_parts import DraftParts
from cutlayer.client.event_files import reporting
from cutlayer.client.federated import fingerprint, make_member, open_calls
from cutlayer.client.gates import generation_gate, training_gates
from cutlayer.client.link import Link
from cutlayer.client.member import Learner
from cutlayer.client.own_model import opener, own_model, run_call, run_identity
from cutlayer.client.parts import TrainedParts
from cutlayer.client.run_state import Progress, RunState
from cutlayer.client.schedule import batch_plan
from cutlayer.client.session import SplitModel
from cutlayer.client.settings import SamplingSettings, TrainSettings
from cutlayer.client.train import Report, Trainer, TrainingData
from cutlayer.data.load import Dataset, load_dataset
from cutlayer.data.template import RowLimits
from cutlayer.enclave.feeding import RowFeeder, RowsName
from cutlayer.enclave.generation import EnclaveGenerator
from cutlayer.enclave.owner_settings import EnclaveClientSettings, LabelPlace
from cutlayer.enclave.remote import RemoteEnclave
from cutlayer.enclave.step import EnclaveStep
from cutlayer.errors import ConfigError, DataError
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.agreement import hash_leaves
from cutlayer.model.checkpoint import load_part
from cutlayer.model.export import export_adapter, merge_adapter
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut, Head, Part, Tail, build_part
from cutlayer.model.threads import set_threads
from cutlayer.settings import load_settings
from cutlayer.storage.audit_log import AuditEntry, AuditEvent
from cutlayer.wire.channel import Channel

__all__ = ["EnclaveClient"]

_NOTHING = AdapterSettings(parts=[])
"""What trains here."""


class EnclaveClient:
    """One data owner. Open it with `with`; the run folder is its own while it is open."""

    def __init__(
        self, settings: EnclaveClientSettings, connect: Callable[[], Channel] | None = None
    ) -> None:
        """Load the front and the tokenizer, open the run folder; the network is not touched yet.

        Args:
            settings: everything about this owner.
            connect: opens a channel; None connects by gRPC as `settings.connection` says.

        Raises:
            ConfigError: wrong settings or model.
            StorageError: the run folder is in use, open to others or damaged.
        """
        self.settings = settings
        model = settings.model
        set_threads(model.threads)
        self._folder = resolve_model(model.path, model.revision)
        num_blocks = int(self._folder.config.num_hidden_layers)
        self._as_client = settings.as_client(num_blocks)
        cut = Cut(model.lower, num_blocks)
        front = load_part(self._folder, cut, Part.HEAD, model.dtype, model.device)
        self.front = cast(Head, front)
        self.front.decode_threads = model.decode_threads
        self._parts = self._frozen_parts(cut)
        own = own_model(self._as_client, self._folder, self.front.leaves)
        self.attestation = attestation_of(self._as_client)
        self._connect = opener(self._as_client, self.attestation, connect)
        self._state = RunState(settings.run)
        note_in(self._state, self.attestation)
        self._own = own
        vocab_size = int(self._folder.config.vocab_size)
        self.enclave = RemoteEnclave(Link(self._connect, own), vocab_size)
        self.feeder: RowFeeder | None = None
        """Sends rows, and counts them; there once training has begun."""

    @classmethod
    def from_file(cls, path: Path, overrides: Iterable[str] = ()) -> "EnclaveClient":
        """An owner from a TOML file plus `section.key=value` overrides."""
        return cls(load_settings(EnclaveClientSettings, path, overrides))

    def __enter__(self) -> "EnclaveClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and release the run folder."""
        self.enclave.close()
        self._state.close()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._folder.tokenizer()

    @property
    def trunk(self) -> RemoteEnclave:
        """The enclave, under the name by which a client's bytes are counted."""
        return self.enclave

    @property
    def guarantee(self) -> str:
        """What protects what leaves, to be printed beside every result: no noise, but proof."""
        if self.attestation is not None:
            return self.attestation.line
        return "attestation: NONE"

    @property
    def run_id(self) -> str:
        """The run's name, as the enclave knows it."""
        return self._state.run_id

    @property
    def context_length(self) -> int:
        """Tokens of a row at most, prompt and reply together."""
        # Prefixes take positions of the model's context.
        taken = self._as_client.adapter.num_positions
        return int(self._folder.config.max_position_embeddings) - taken

    def rows(self) -> Dataset:
        """Training and validation rows as the settings say.

        Raises:
            DataError: a file, line or column is wrong; the message names it.
        """
        if self.settings.data is None:
            raise ConfigError("the settings have no [data] section; training needs one")
        vocab_size = self._folder.config.vocab_size
        limits = RowLimits(context_length=self.context_length, vocab_size=vocab_size)
        return load_dataset(self.settings.data, self.tokenizer, limits)

    def train(self, on_step: Callable[[Report], None] = lambda report: None) -> Progress:
        """Fine-tune to the end: alone from the newest step that both sides have, or in the
        enclave's rounds where the settings name them.

        Raises:
            TransportError: the enclave stayed away; call again later, nothing saved is lost.
            CacheFull: the enclave has no room for the rows.
            QuorumNotMet: too few owners took part.
        """
        settings = self.settings.train
        if settings is None:
            raise ConfigError("the settings have no [train] section")
        rows = self.rows()
        if not rows.train:
            raise DataError("there is no training row left; check data.train and max_length")
        leaves = self.front.leaves
        self._state.claim(run_identity(self._as_client, settings, rows.digest, leaves))
        with reporting(self.settings.run.event_folder, self.enclave, on_step) as report:
            is_alone = self.settings.rounds is None
            train = self._train_alone if is_alone else self._train_together
            progress = train(rows, settings, report)
        self._note(AuditEvent.RUN_FINISHED, progress.step)
        return progress

    def generator(self) -> EnclaveGenerator:
        """Whatever generates, on the run's best step; the base model where none was trained."""
        return EnclaveGenerator(
            self._split_model(), self.enclave, self.settings.generation, self.context_length
        )

    def score(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] after the last token of each prompt, all rows in one call."""
        return self.generator().score(prompts)

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingSettings | None = None,
        on_piece: Callable[[TextPiece], None] = lambda piece: None,
    ) -> list[str]:
        """Continue texts, all together; pieces of text are handed over as they come."""
        sampling = sampling or self.settings.sampling
        return self.generator().texts(prompts, sampling, self.tokenizer, on_piece)

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingSettings
    ) -> list[list[int]]:
        """Continue rows of token ids; never stops at an end-of-text token."""
        return self.generator().ids(prompts, sampling)

    def export(self, folder: Path, step: int | None = None, merged: Path | None = None) -> int:
        """Write the adapter that was trained inside as a PEFT folder; the exported step.

        Args:
            folder: the PEFT adapter goes here.
            step: a saved step; None is the best by validation, else the newest.
            merged: also write a plain model folder with the adapter merged in.

        Raises:
            ConfigError: nothing has been trained yet, or it is a prefix.
        """
        if "prefix" in self.settings.adapter.kinds:
            raise ConfigError(
                "a prefix cannot be exported from here: PEFT's format has vectors for every block, "
                "and the owner's blocks have none; generate over the enclave, or train lora or "
                "sparse, which can be exported"
            )
        step = self._state.best_step() if step is None else step
        state = self.enclave.pull_adapter(self.run_id, step)
        model, adapter = self.settings.model, self._as_client.adapter
        export_adapter(folder, [state], adapter, model.path, base=self._folder)
        if merged is not None:
            merge_adapter(self._folder, folder, merged)
        self._note(AuditEvent.ADAPTER_EXPORTED, step)
        return step

    def _train_alone(
        self, rows: Dataset, settings: TrainSettings, on_step: Callable[[Report], None]
    ) -> Progress:
        plan = batch_plan(rows, settings)
        data = TrainingData(train=rows.train, validation=rows.validation, plan=plan)
        step = self._step(settings)
        opened = run_call(self.run_id, self._as_client.adapter, settings, wants_input_grad=False)
        trainer = Trainer(self._parts, self.enclave, step, data, settings, self._state, opened)
        return trainer.run(on_step)

    def _train_together(
        self, rows: Dataset, settings: TrainSettings, on_step: Callable[[Report], None]
    ) -> Progress:
        opened = run_call(self.run_id, self._as_client.adapter, settings, wants_input_grad=False)
        learner = Learner(
            parts=self._parts,
            trunk=self.enclave,
            step=self._step(settings),
            settings=settings,
            open_run=opened,
        )
        about = fingerprint(self._as_client, self._own, self.tokenizer)
        calls = open_calls(self._connect, self._own)
        try:
            member = make_member(self._as_client, calls, self._state, about, rows, learner)
            return member.run(on_step)
        finally:
            calls.close()

    def _step(self, settings: TrainSettings) -> EnclaveStep:
        gates = training_gates(self._as_client, self._state.privacy)
        self.feeder = RowFeeder(
            self.front,
            self.enclave,
            gates.activations,
            RowsName(row_set=self._row_set(), front=hash_leaves(self.front.leaves)),
            sends_labels=self.settings.labels is LabelPlace.ENCLAVE,
        )
        return EnclaveStep(self._parts, self.enclave, gates, self.feeder, settings.in_flight)

    def _row_set(self) -> str:
        # A run may go on with labels elsewhere or with a smaller codec; rows that were sent before
        # lack the labels then, and are as large as ever.
        return f"{self.run_id}.{self.settings.connection.codec}.{self.settings.labels}"

    def _split_model(self) -> SplitModel:
        steps = self._state.saved_steps()
        is_trained = bool(steps) and steps[-1] > 0
        return SplitModel(
            head=self.front,
            tail=self._parts.tail,
            trunk=self.enclave,
            boundary=generation_gate(self._as_client, self._state.privacy),
            run_id=self.run_id if is_trained else None,
            step=self._state.best_step() if is_trained else None,
            drafting=self._drafting,
        )

    @cached_property
    def _drafting(self) -> DraftParts:
        speculation, config = self.settings.generation.speculation, self._folder.config
        return DraftParts(speculation, self._state, config, lambda: self.tokenizer)

    def _frozen_parts(self, cut: Cut) -> TrainedParts:
        """The front, and a tail without memory in the place of the one that is inside."""
        tail = cast(Tail, build_part(self._folder.config, cut, Part.TAIL))
        train = self.settings.train or TrainSettings(steps=1)
        return TrainedParts(self.front, tail, _NOTHING, train.optimizer, train.seed)

    def _note(self, event: AuditEvent, step: int) -> None:
        self._state.audit.record(
            AuditEntry(event=event, who="local", run=self._state.run_id, step=step)
        )
