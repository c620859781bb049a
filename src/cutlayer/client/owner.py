"""What every data owner's facade does alike: open and close, rows, training, replies.

It loads no part and opens no link: `client.client` does where the later blocks are a trunk and a
tail, `enclave.owner` where all of them are in an enclave.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cutlayer.client.attested import Attestation
from cutlayer.client.chat import TextPiece
from cutlayer.client.draft_parts import DraftParts
from cutlayer.client.event_files import reporting
from cutlayer.client.federated import fingerprint, make_member, open_calls
from cutlayer.client.generate import Generator
from cutlayer.client.link import Connect, OwnModel
from cutlayer.client.member import Learner
from cutlayer.client.own_model import run_call, run_identity
from cutlayer.client.parts import TrainedParts
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.run_state import MEMBERS_CUTS, Progress, RunState
from cutlayer.client.schedule import batch_plan
from cutlayer.client.settings import ClientSettings, SamplingSettings, TrainSettings
from cutlayer.client.step import SplitStep
from cutlayer.client.train import Report, Trainer, TrainingData
from cutlayer.data.load import Dataset, load_dataset
from cutlayer.data.template import RowLimits
from cutlayer.errors import ConfigError, DataError
from cutlayer.model.adapters import AdapterState
from cutlayer.model.export import export_adapter, merge_adapter
from cutlayer.model.folder import ModelFolder
from cutlayer.storage.audit_log import AuditEntry, AuditEvent
from cutlayer.wire.messages import OpenRun

__all__ = ["DataOwner"]


class DataOwner(ABC):
    """One data owner. Open it with `with`; the run folder is its own while it is open."""

    trunk: RemoteTrunk
    """The other side, where the bytes are counted."""
    attestation: Attestation | None
    """What the other side proved; None where no proof was asked for."""
    federation_bytes: tuple[int, int] = (0, 0)
    """Sent to and received from the coordinator of rounds, beside the trunk's."""
    _folder: ModelFolder
    _state: RunState
    _parts: TrainedParts
    _own: OwnModel
    _connect: Connect

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End the connection and release the run folder."""

    @property
    @abstractmethod
    def guarantee(self) -> str:
        """What protects what leaves, to be printed beside every result."""

    @abstractmethod
    def generator(self) -> Generator:
        """Whatever generates, on the run's best step; the base model where none was trained."""

    @property
    @abstractmethod
    def _as_client(self) -> ClientSettings:
        """The settings, as the machinery of a client reads them."""

    @property
    @abstractmethod
    def _leaves(self) -> Mapping[str, str]:
        """Manifest leaves of the parts that are here."""

    @abstractmethod
    def _split_step(self, settings: TrainSettings) -> SplitStep:
        """Whatever computes one step of training."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; whoever works with token ids needs none."""
        return self._folder.tokenizer()

    @property
    def run_id(self) -> str:
        """The run's name, as the other side knows it."""
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
        settings = self._as_client
        if settings.data is None:
            raise ConfigError("the settings have no [data] section; training needs one")
        vocab_size = self._folder.config.vocab_size
        limits = RowLimits(context_length=self.context_length, vocab_size=vocab_size)
        return load_dataset(settings.data, self.tokenizer, limits, settings.privacy.keep_share)

    def train(self, on_step: Callable[[Report], None] = lambda report: None) -> Progress:
        """Fine-tune to the end: alone from the newest step that both sides have, or in rounds
        together with others where the settings name them.

        Raises:
            TransportError: the other side stayed away; call again later, nothing saved is lost.
            CacheFull: an enclave has no room for the rows.
            QuorumNotMet: the rounds were given up for want of members.
        """
        settings = self._as_client.train
        if settings is None:
            raise ConfigError("the settings have no [train] section")
        rows = self.rows()
        if not rows.train:
            raise DataError("there is no training row left; check data.train and max_length")
        self._state.claim(run_identity(self._as_client, settings, rows.digest, self._leaves))
        with reporting(self._as_client.run.event_folder, self.trunk, on_step) as report:
            is_alone = self._as_client.federation is None
            train = self._train_alone if is_alone else self._train_together
            progress = train(rows, settings, report)
        self._note(AuditEvent.RUN_FINISHED, progress.step)
        return progress

    def trainer(self, data: TrainingData, settings: TrainSettings) -> Trainer:
        """A run over rows of token ids, for whoever has no data files."""
        step, opened = self._split_step(settings), self._open_run(settings)
        return Trainer(self._parts, self.trunk, step, data, settings, self._state, opened)

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
        sampling = sampling or self._as_client.sampling
        return self.generator().texts(prompts, sampling, self.tokenizer, on_piece)

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingSettings
    ) -> list[list[int]]:
        """Continue rows of token ids; never stops at an end-of-text token."""
        return self.generator().ids(prompts, sampling)

    def _train_alone(
        self, rows: Dataset, settings: TrainSettings, on_step: Callable[[Report], None]
    ) -> Progress:
        plan = batch_plan(rows, settings)
        data = TrainingData(train=rows.train, validation=rows.validation, plan=plan)
        return self._run(data, settings, on_step)

    def _run(
        self, data: TrainingData, settings: TrainSettings, on_step: Callable[[Report], None]
    ) -> Progress:
        return self.trainer(data, settings).run(on_step)

    def _train_together(
        self,
        rows: Dataset,
        settings: TrainSettings,
        on_step: Callable[[Report], None],
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> Progress:
        step, opened = self._split_step(settings), self._open_run(settings)
        learner = Learner(
            parts=self._parts, trunk=self.trunk, step=step, settings=settings, open_run=opened
        )
        about = fingerprint(self._as_client, self._own, self.tokenizer)
        calls = open_calls(self._connect, self._own)
        try:
            member = make_member(self._as_client, calls, self._state, about, rows, learner)
            self._state.claim({MEMBERS_CUTS: "mixed" if member.mixes_cuts else "equal"})
            return member.run(on_step, is_interrupted)
        finally:
            sent, received = self.federation_bytes
            self.federation_bytes = (sent + calls.bytes_sent, received + calls.bytes_received)
            calls.close()

    def _open_run(self, settings: TrainSettings) -> OpenRun:
        return run_call(self.run_id, self._as_client.adapter, settings, self._parts.head_trains)

    def _trained_step(self) -> int | None:
        """The run's best step; None where nothing was trained yet."""
        steps = self._state.saved_steps()
        return self._state.best_step() if steps and steps[-1] > 0 else None

    @cached_property
    def _drafting(self) -> DraftParts:
        speculation, config = self._as_client.generation.speculation, self._folder.config
        return DraftParts(speculation, self._state, config, lambda: self.tokenizer)

    def _write_adapter(
        self, states: Iterable[AdapterState], step: int, folder: Path, merged: Path | None
    ) -> None:
        settings = self._as_client
        name = settings.model.path
        export_adapter(folder, list(states), settings.adapter, name, base=self._folder)
        if merged is not None:
            merge_adapter(self._folder, folder, merged)
        self._note(AuditEvent.ADAPTER_EXPORTED, step)

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
