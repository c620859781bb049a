"""The data owner's facade: blocking, from settings to trained adapters and text.

It wires the rooms together and decides nothing: one step is in `train`, one token in `generate`,
what leaves in `privacy.boundary`; what an enclave's owner does alike is in `owner`.
"""

import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cutlayer.client.accounts import keep_account, renew_account, report_of_run
from cutlayer.client.attested import attestation_of, note_in
from cutlayer.client.chain_attested import of_all_hops
from cutlayer.client.chain_setup import trunk_of
from cutlayer.client.chain_trunk import ChainTrunk
from cutlayer.client.chat import Chat
from cutlayer.client.engine import Engine
from cutlayer.client.federated import leave, open_calls
from cutlayer.client.gates import generation_gate, training_gates
from cutlayer.client.generate import Generator
from cutlayer.client.hops import chain_identity, hop_views, told_guarantee
from cutlayer.client.link import Link
from cutlayer.client.own_model import at_cut, at_run_s_cut, cut_of, opener, own_model
from cutlayer.client.owner import DataOwner
from cutlayer.client.parts import TrainedParts
from cutlayer.client.recut import RecutReport, Recutter
from cutlayer.client.recut_desk import Desk
from cutlayer.client.recut_policy import RecutPolicy
from cutlayer.client.recut_sensors import LinkMeter, Machine, metered
from cutlayer.client.recut_watch import RecutWatch, RecutWish
from cutlayer.client.run_file import saved_cut
from cutlayer.client.run_state import Progress, RunState
from cutlayer.client.session import GenerationSession, SplitModel
from cutlayer.client.settings import ClientSettings, TrainSettings
from cutlayer.client.step import SplitStep
from cutlayer.client.train import Report, Trainer, TrainingData
from cutlayer.client.witness import witness_of
from cutlayer.data.load import Dataset
from cutlayer.errors import ConfigError, StorageError
from cutlayer.model.adapters import AdapterState
from cutlayer.model.checkpoint import load_client_parts
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut
from cutlayer.model.threads import set_threads
from cutlayer.privacy.ledger import LedgerSummary
from cutlayer.privacy.report import PrivacyReport
from cutlayer.settings import load_settings
from cutlayer.tee.masked.hook import mask_parts, release_parts
from cutlayer.trace import NoTrace, Tracer
from cutlayer.wire.channel import Channel

__all__ = ["Client"]


class Client(DataOwner):
    """One data owner. Open it with `with`; the run folder is its own while it is open."""

    def __init__(
        self,
        settings: ClientSettings,
        connect: Callable[[], Channel] | None = None,
        tracer: Tracer | None = None,
        connect_hops: Sequence[Callable[[], Channel]] | None = None,
    ) -> None:
        """Load head, tail and tokenizer, open the run folder; the network is not touched yet.

        Args:
            settings: everything about this owner.
            connect: opens a channel; None connects by gRPC as `settings.connection` says.
            tracer: where the timeline of training goes.
            connect_hops: open channels to the later hops of a chain, as `connect` to the first.

        Raises:
            ConfigError: wrong settings or model.
            StorageError: the run folder is in use, open to others or damaged.
        """
        settings = self.settings = at_run_s_cut(settings)
        self._tracer = tracer or NoTrace()
        self.attestation = attestation_of(settings)
        direct = opener(settings, self.attestation, connect)
        set_threads(settings.model.threads)
        self._folder = resolve_model(settings.model.path, settings.model.revision)
        self._load_parts()
        self._state = RunState(settings.run)
        if saved_cut(settings.run) not in (None, cut_of(settings)):
            self._state.close()
            raise StorageError(
                f"the run in {settings.run.folder} was re-cut while this command began; start again"
            )
        note_in(self._state, self.attestation)
        self._own = own_model(hop_views(settings)[0], self._folder, self._leaves)
        self._witness = witness_of(settings, self._own, self._leaves)
        self._meter = LinkMeter()
        witnessed = self._witness.connect(direct)
        has_policy = settings.recut.has_policy
        self._connect = metered(witnessed, self._meter) if has_policy else witnessed
        self._link = link = Link(self._connect, self._own)
        self.trunk = trunk_of(link, settings, self._folder, self._state, self._leaves, connect_hops)
        if isinstance(self.trunk, ChainTrunk):
            self.attestation = of_all_hops([self.attestation, *self.trunk.proofs])

    @classmethod
    def from_file(cls, path: Path, overrides: Iterable[str] = ()) -> "Client":
        """A client from a TOML file plus `section.key=value` overrides."""
        return cls(load_settings(ClientSettings, path, overrides))

    def close(self) -> None:
        """End the connection and release the run folder."""
        self.trunk.close()
        # None are here where those of a new cut could not be loaded.
        release_parts(*(vars(self)[name] for name in ("head", "tail") if name in vars(self)))
        self._witness.close()
        self._drafting.save()
        self._state.close()

    @property
    def ledger(self) -> LedgerSummary:
        """Totals of what has left under this run, all processes and restarts together."""
        return self._state.privacy.ledger.summary()

    @property
    def guarantee(self) -> str:
        """What the noise promises, to be printed beside every result."""
        return told_guarantee(self.settings)

    def privacy_report(self) -> PrivacyReport:
        """Epsilons of what has left under this run, with their units, and what budgets allow."""
        return report_of_run(self.settings, self._state.privacy, self.run_id)

    def trainer(self, data: TrainingData, settings: TrainSettings) -> Trainer:
        """A run over rows of token ids, for whoever has no data files."""
        self._witness.learn(data.train, data.validation)
        return super().trainer(data, settings)

    def generator(self) -> Generator:
        """Whatever generates, on the run's best step; the base model where none was trained."""
        return Generator(self._split_model(), self.settings.generation, self.context_length)

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
        self._write_adapter([state for state in states if state], step, folder, merged)
        return step

    def recut(
        self, lower: int | None = None, upper: int | None = None, share_adapter: bool = False
    ) -> RecutReport:
        """Move the cut of this run, which goes on from its newest saved step.

        Args:
            lower: first block of the trunk; None leaves it where it is.
            upper: first block of the tail; None leaves it where it is.
            share_adapter: accept that the server sees the adapters of blocks that move to it, as
                `recut.share_adapter` does.

        Raises:
            ConfigError: it cannot be, and why; the run is what it was.
            SpecMismatch: the server does not hold these blocks.
        """
        report = self._move_cut(RecutWish(lower=lower, upper=upper, shares=share_adapter))
        self._arrive(report)
        return report

    def leave(self) -> None:
        """Leave the federation of the settings; its rounds go on, and one may join again."""
        leave(self.settings, open_calls(self._connect, self._own))

    def _run(
        self, data: TrainingData, settings: TrainSettings, on_step: Callable[[Report], None]
    ) -> Progress:
        return self._with_recuts(lambda wanted: self.trainer(data, settings).run(on_step, wanted))

    def _with_recuts(self, train: Callable[[Callable[[], bool]], Progress]) -> Progress:
        """Train to the end; where somebody wants it, the cut moves between steps, or rounds."""
        policy = RecutPolicy(self.settings.recut, cut_of(self.settings), Machine(self._meter))
        with RecutWatch(Desk(self._state.folder), policy) as watch:
            while True:
                progress = train(watch.is_wanted)
                if not watch.has_wish:
                    return progress
                report = watch.serve(self._move_cut)
                if report is not None:
                    self._arrive(report)
                self._require_run_s_cut()

    def _require_run_s_cut(self) -> None:
        """A disk may fail in the moment after it has decided that a re-cut is done."""
        cut = self._state.cut
        if cut not in (None, cut_of(self.settings)):
            raise StorageError(
                f"the run in {self._state.folder} was re-cut, and then its disk failed; start "
                "again when it is mended: the run goes on at its new cut"
            )

    def _move_cut(self, wish: RecutWish) -> RecutReport:
        """Make the run another cut's; the parts here are still those of the old one."""
        self.trunk.checks.require_trust()
        keep_account(self.settings, self._state.privacy)
        model, recut = self.settings.model, self.settings.recut
        recutter = Recutter(
            settings=self.settings,
            folder=self._folder,
            state=self._state,
            link=self._link,
            connect=self._connect,
            own=self._own,
            leaves=self._leaves,
        )
        lower = model.lower if wish.lower is None else wish.lower
        upper = model.upper if wish.upper is None else wish.upper
        return recutter.move(Cut(lower, upper), wish.shares or recut.share_adapter)

    def _arrive(self, report: RecutReport) -> None:
        """Load the parts that a re-cut left here, and speak of its cut to the server."""
        if not report.is_moved:
            return
        self.settings = at_cut(self.settings, Cut(*report.new))
        renew_account(self.settings, self._state.privacy)
        release_parts(self.head, self.tail)
        # Gone before the new ones come: both together may not fit into memory.
        del self.head, self.tail, self._parts
        gc.collect()
        self._load_parts()
        self._own = own_model(self.settings, self._folder, self._leaves)
        self._link.claim(self._own)
        trunk = trunk_of(self._link, self.settings, self._folder, self._state, self._leaves)
        # What is usual at one cut says nothing of another.
        self.trunk.checks = trunk.checks

    def _load_parts(self) -> None:
        settings, model = self.settings, self.settings.model
        cut = cut_of(settings)
        self.head, self.tail = load_client_parts(self._folder, cut, model.dtype, model.device)
        mask_parts(settings.masked, self.head, self.tail)
        self.head.decode_threads = self.tail.decode_threads = model.decode_threads
        train, denoises = settings.train or TrainSettings(steps=1), settings.privacy.denoiser
        self._parts = TrainedParts(
            self.head, self.tail, settings.adapter, train.optimizer, train.seed, denoises
        )

    def _split_model(self) -> SplitModel:
        """Parts at the run's best step; the base model where nothing was trained yet."""
        step = self._trained_step()
        is_trained = step is not None
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
            guarantee=self.guarantee,
        )

    def _split_step(self, settings: TrainSettings) -> SplitStep:
        self._parts.use_adapters(True)
        gates = self._witness.gates(training_gates(self.settings, self._state.privacy))
        self._state.claim(chain_identity(self.settings))
        observe = self._drafting.observe
        return SplitStep(self._parts, self.trunk, gates, settings.in_flight, self._tracer, observe)

    def _train_together(
        self,
        rows: Dataset,
        settings: TrainSettings,
        on_step: Callable[[Report], None],
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> Progress:
        self._witness.learn(rows.train, rows.validation)
        together = super()._train_together
        return self._with_recuts(
            lambda wanted: together(rows, settings, on_step, lambda: wanted() or is_interrupted())
        )

    @property
    def _as_client(self) -> ClientSettings:
        return self.settings

    @property
    def _leaves(self) -> dict[str, str]:
        return {**self.head.leaves, **self.tail.leaves}
