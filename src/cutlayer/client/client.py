"""The data owner's facade: blocking, from settings to trained adapters and text.

It wires the rooms together and decides nothing: one step is in `train`, one token in `generate`,
what leaves in `privacy.boundary`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cutlayer.client.accounts import report_of_run
from cutlayer.client.attested import attestation_of, note_in
from cutlayer.client.chat import Chat, TextPiece
from cutlayer.client.checked_trunk import checked_trunk
from cutlayer.client.draft_parts import DraftParts
from cutlayer.client.engine import Engine
from cutlayer.client.event_files import reporting
from cutlayer.client.federated import fingerprint, leave, make_member, open_calls
from cutlayer.client.gates import generation_gate, training_gates
from cutlayer.client.generate import Generator
from cutlayer.client.link import Link
from cutlayer.client.member import Learner
from cutlayer.client.own_model import opener, own_model, run_call, run_identity
from cutlayer.client.parts import TrainedParts
from cutlayer.client.run_state import Progress, RunState
from cutlayer.client.schedule import batch_plan
from cutlayer.client.session import GenerationSession, SplitModel
from cutlayer.client.settings import ClientSettings, SamplingSettings, TrainSettings
from cutlayer.client.step import SplitStep
from cutlayer.client.train import Report, Trainer, TrainingData
from cutlayer.client.witness import witness_of
from cutlayer.data.load import Dataset, load_dataset
from cutlayer.data.template import RowLimits
from cutlayer.errors import ConfigError, DataError
from cutlayer.model.adapters import AdapterState
from cutlayer.model.checkpoint import load_client_parts
from cutlayer.model.export import export_adapter, merge_adapter
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut
from cutlayer.model.threads import set_threads
from cutlayer.privacy.ledger import LedgerSummary
from cutlayer.privacy.report import PrivacyReport
from cutlayer.settings import load_settings
from cutlayer.storage.audit_log import AuditEntry, AuditEvent
from cutlayer.tee.masked.hook import mask_parts, release_parts
from cutlayer.trace import NoTrace, Tracer
from cutlayer.wire.channel import Channel
from cutlayer.wire.messages import OpenRun

__all__ = ["Client"]


class Client:
    """One data owner. Open it with `with`; the run folder is its own while it is open."""

    def __init__(
        self,
        settings: ClientSettings,
        connect: Callable[[], Channel] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Load head, tail and tokenizer, open the run folder; the network is not touched yet.

        Args:
            settings: everything about this owner.
            connect: opens a channel; None connects by gRPC as `settings.connection` says.
            tracer: where the timeline of training goes.

        Raises:
            ConfigError: wrong settings or model.
            StorageError: the run folder is in use, open to others or damaged.
        """
        self.settings = settings
        self._tracer = tracer or NoTrace()
        self.attestation = attestation_of(settings)
        direct = opener(settings, self.attestation, connect)
        model = settings.model
        set_threads(model.threads)
        cut = Cut(model.lower, model.upper)
        self._folder = resolve_model(model.path, model.revision)
        self.head, self.tail = load_client_parts(self._folder, cut, model.dtype, model.device)
        mask_parts(settings.masked, self.head, self.tail)
        self.head.decode_threads = self.tail.decode_threads = model.decode_threads
        self._state = RunState(settings.run)
        note_in(self._state, self.attestation)
        train, denoises = settings.train or TrainSettings(steps=1), settings.privacy.denoiser
        self._parts = TrainedParts(
            self.head, self.tail, settings.adapter, train.optimizer, train.seed, denoises
        )
        leaves = {**self.head.leaves, **self.tail.leaves}
        own = own_model(settings, self._folder, leaves)
        self._witness = witness_of(settings, own, leaves)
        self._connect = self._witness.connect(direct)
        self._own, self.federation_bytes = own, (0, 0)
        self.trunk = checked_trunk(Link(self._connect, own), settings, self._folder, self._state)

    @classmethod
    def from_file(cls, path: Path, overrides: Iterable[str] = ()) -> "Client":
        """A client from a TOML file plus `section.key=value` overrides."""
        return cls(load_settings(ClientSettings, path, overrides))

    def __enter__(self) -> "Client":
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
        self.trunk.close()
        release_parts(self.head, self.tail)
        self._witness.close()
        self._drafting.save()
        self._state.close()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; whoever works with token ids needs none."""
        return self._folder.tokenizer()

    @property
    def run_id(self) -> str:
        """The run's name, as the server knows it."""
        return self._state.run_id

    @property
    def ledger(self) -> LedgerSummary:
        """Totals of what has left under this run, all processes and restarts together."""
        return self._state.privacy.ledger.summary()

    @property
    def guarantee(self) -> str:
        """What the noise promises, to be printed beside every result."""
        return self.settings.privacy.activation_rule().guarantee

    def privacy_report(self) -> PrivacyReport:
        """Epsilons of what has left under this run, with their units, and what budgets allow."""
        return report_of_run(self.settings, self._state.privacy, self.run_id)

    def rows(self) -> Dataset:
        """Training and validation rows as the settings say.

        Raises:
            DataError: a file, line or column is wrong; the message names it.
        """
        if self.settings.data is None:
            raise ConfigError("the settings have no [data] section; training needs one")
        vocab_size = self._folder.config.vocab_size
        limits = RowLimits(context_length=self.context_length, vocab_size=vocab_size)
        keep_share = self.settings.privacy.keep_share
        return load_dataset(self.settings.data, self.tokenizer, limits, keep_share)

    def train(self, on_step: Callable[[Report], None] = lambda report: None) -> Progress:
        """Fine-tune to the end: alone from the newest step that both sides have, or in the rounds
        of a federation where the settings name one.

        Raises:
            TransportError: the server stayed away; call again later, nothing saved is lost.
            QuorumNotMet: the federation gave up for want of members.
        """
        settings = self.settings.train
        if settings is None:
            raise ConfigError("the settings have no [train] section")
        rows = self.rows()
        if not rows.train:
            raise DataError("there is no training row left; check data.train and max_length")
        leaves = {**self.head.leaves, **self.tail.leaves}
        self._state.claim(run_identity(self.settings, settings, rows.digest, leaves))
        with reporting(self.settings.run.event_folder, self.trunk, on_step) as report:
            is_alone = self.settings.federation is None
            train = self._train_alone if is_alone else self._train_together
            progress = train(rows, settings, report)
        self._note(AuditEvent.RUN_FINISHED, progress.step)
        return progress

    def _train_alone(
        self, rows: Dataset, settings: TrainSettings, on_step: Callable[[Report], None]
    ) -> Progress:
        plan = batch_plan(rows, settings)
        data = TrainingData(train=rows.train, validation=rows.validation, plan=plan)
        return self.trainer(data, settings).run(on_step)

    def _train_together(
        self, rows: Dataset, settings: TrainSettings, on_step: Callable[[Report], None]
    ) -> Progress:
        self._witness.learn(rows.train, rows.validation)
        step, opened = self._split_step(settings), self._open_run(settings)
        learner = Learner(
            parts=self._parts, trunk=self.trunk, step=step, settings=settings, open_run=opened
        )
        about = fingerprint(self.settings, self._own, self.tokenizer)
        calls = open_calls(self._connect, self._own)
        try:
            member = make_member(self.settings, calls, self._state, about, rows, learner)
            return member.run(on_step)
        finally:
            self.federation_bytes = (calls.bytes_sent, calls.bytes_received)
            calls.close()

    def trainer(self, data: TrainingData, settings: TrainSettings) -> Trainer:
        """A run over rows of token ids, for whoever has no data files."""
        self._witness.learn(data.train, data.validation)
        step, opened = self._split_step(settings), self._open_run(settings)
        return Trainer(self._parts, self.trunk, step, data, settings, self._state, opened)

    def generator(self) -> Generator:
        """Whatever generates, on the run's best step; the base model where none was trained."""
        return Generator(self._split_model(), self.settings.generation, self.context_length)

    @property
    def context_length(self) -> int:
        """Tokens of a row at most, prompt and reply together."""
        taken = self.settings.adapter.num_positions
        return int(self._folder.config.max_position_embeddings) - taken

    @property
    def model_name(self) -> str:
        """What the settings call the model, without its folders."""
        return Path(self.settings.model.path).name

    def session(self, max_lengths: Sequence[int] = ()) -> GenerationSession:
        """Rows with KV caches on all parts, for whoever wants the logits themselves.

        Args:
            max_lengths: tokens of rows 0, 1, ... at most; further rows may be opened later.

        Raises:
            ConfigError: a row longer than the model's context.
        """
        if max(max_lengths, default=0) > self.context_length:
            raise ConfigError(
                f"rows of {list(max_lengths)} tokens in a context of {self.context_length}"
            )
        session = self.generator().session()
        for max_length in max_lengths:
            session.open_row(max_length)
        return session

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

    def chat(self, max_length: int | None = None) -> Chat:
        """A conversation that keeps its caches, so that each turn sends its new tokens alone."""
        limit = min(max_length or 4096, self.context_length)
        return self.generator().chat(self.tokenizer, self.settings.sampling, limit)

    def engine(self) -> Engine:
        """Streams for many callers at once, on a thread that uses this client alone; close it
        before the client."""
        return self.generator().engine(
            lambda: self.ledger, lambda: (self.trunk.bytes_sent, self.trunk.bytes_received)
        )

    def export(self, folder: Path, step: int | None = None, merged: Path | None = None) -> int:
        """Join head, trunk and tail adapters into one folder; the exported step.

        Args:
            folder: the adapter goes here: docs/adapters.md has the formats.
            step: a saved step; None is the best by validation, else the newest.
            merged: also write a plain model folder with the adapter merged in.

        Raises:
            ConfigError: nothing has been trained yet.
        """
        step = self._state.best_step() if step is None else step
        states: list[AdapterState] = self._state.adapters(step)
        if self._parts.trunk_trains:
            states.append(self.trunk.pull_adapter(self.run_id, step))
        adapter, name = self.settings.adapter, self.settings.model.path
        export_adapter(folder, [s for s in states if s], adapter, name, base=self._folder)
        if merged is not None:
            merge_adapter(self._folder, folder, merged)
        self._note(AuditEvent.ADAPTER_EXPORTED, step)
        return step

    def leave(self) -> None:
        """Leave the federation of the settings; its rounds go on, and one may join again."""
        leave(self.settings, open_calls(self._connect, self._own))

    def _split_model(self) -> SplitModel:
        """Parts at the run's best step; the base model where nothing was trained yet."""
        steps = self._state.saved_steps()
        is_trained = bool(steps) and steps[-1] > 0
        step = self._state.best_step() if is_trained else None
        if step is not None:
            self._parts.load(self._state.load(step).tensors)
        self._parts.set_training(False)
        self._parts.use_adapters(is_trained)
        return SplitModel(
            head=self.head,
            tail=self.tail,
            trunk=self.trunk,
            boundary=self._witness.gate(generation_gate(self.settings, self._state.privacy)),
            run_id=self.run_id if is_trained and self._parts.trunk_trains else None,
            step=step,
            max_session_vectors=self.settings.privacy.generation.max_session_vectors,
            drafting=self._drafting,
        )

    @cached_property
    def _drafting(self) -> DraftParts:
        speculation, config = self.settings.generation.speculation, self._folder.config
        return DraftParts(speculation, self._state, config, lambda: self.tokenizer)

    def _split_step(self, settings: TrainSettings) -> SplitStep:
        self._parts.use_adapters(True)
        gates = self._witness.gates(training_gates(self.settings, self._state.privacy))
        observe = self._drafting.observe
        return SplitStep(self._parts, self.trunk, gates, settings.in_flight, self._tracer, observe)

    def _open_run(self, settings: TrainSettings) -> OpenRun:
        return run_call(self.run_id, self.settings.adapter, settings, self._parts.head_trains)

    def _note(self, event: AuditEvent, step: int) -> None:
        self._state.audit.record(
            AuditEntry(
                event=event,
                who="local",
                run=self.run_id,
                step=step,
                bytes_up=self.trunk.bytes_sent,
                bytes_down=self.trunk.bytes_received,
            )
        )
