"""The data owner's facade where all later blocks are in an enclave; blocking.

It wires the rooms together and decides nothing: the loop is `client.train`, one step is `step`, one
token `generation`, what leaves `privacy.boundary`; what a trunk's client does alike is in
`client.owner`. Here are the embedding and the frozen front; no
weight of the other blocks is loaded.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

from cutlayer.client.attested import attestation_of, note_in
from cutlayer.client.chain_attested import of_all_hops
from cutlayer.client.chain_setup import hops_of
from cutlayer.client.gates import (
    generation_gate,
    hop_generation_gate,
    hop_training_gates,
    training_gates,
)
from cutlayer.client.hops import NO_HOPS, identity_of
from cutlayer.client.link import Link
from cutlayer.client.own_model import opener, own_model
from cutlayer.client.owner import DataOwner
from cutlayer.client.parts import TrainedParts
from cutlayer.client.run_state import RunState
from cutlayer.client.session import SplitModel
from cutlayer.client.settings import ClientSettings, TrainSettings
from cutlayer.client.step import Boundaries
from cutlayer.enclave.feeding import RowFeeder, RowsName
from cutlayer.enclave.front import EnclaveChain, FrontHops
from cutlayer.enclave.generation import EnclaveGenerator
from cutlayer.enclave.owner_settings import EnclaveClientSettings, LabelPlace
from cutlayer.enclave.remote import RemoteEnclave
from cutlayer.enclave.step import EnclaveStep
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.agreement import hash_leaves
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut, Head, Part, Tail, build_part
from cutlayer.model.threads import set_threads
from cutlayer.privacy.boundary import Boundary
from cutlayer.settings import load_settings
from cutlayer.wire.channel import Channel

__all__ = ["SHARED_LABELS", "EnclaveClient"]

SHARED_LABELS = (
    "attestation: NONE, labels SHARED: labels, losses and the distribution of the text are visible "
    "at the server"
)
"""What stands beside every result where the owner accepted it."""
_NOTHING = AdapterSettings(parts=[])
"""What trains here."""


class EnclaveClient(DataOwner):
    """One data owner. Open it with `with`; the run folder is its own while it is open."""

    def __init__(
        self,
        settings: EnclaveClientSettings,
        connect: Callable[[], Channel] | None = None,
        connect_hops: Sequence[Callable[[], Channel]] | None = None,
    ) -> None:
        """Load the front and the tokenizer, open the run folder; the network is not touched yet.

        Args:
            settings: everything about this owner.
            connect: opens a channel; None connects by gRPC as `settings.connection` says.
            connect_hops: open channels to the servers in the middle, as `connect` to the enclave.

        Raises:
            ConfigError: wrong settings or model.
            StorageError: the run folder is in use, open to others or damaged.
        """
        self.settings = settings
        model = settings.model
        set_threads(model.threads)
        self._folder = resolve_model(model.path, model.revision)
        num_blocks = int(self._folder.config.num_hidden_layers)
        settings.placement(num_blocks)
        self._client_settings = settings.as_client(num_blocks)
        cut = Cut(model.lower, num_blocks)
        front = load_part(self._folder, cut, Part.HEAD, model.dtype, model.device)
        self.front = cast(Head, front)
        self.front.decode_threads = model.decode_threads
        self._parts = self._frozen_parts(cut)
        self._own = own_model(self._as_client, self._folder, self._leaves)
        self.attestation = attestation_of(self._as_client)
        self._connect = opener(self._as_client, self.attestation, connect)
        self._state = RunState(settings.run)
        note_in(self._state, self.attestation)
        self._views = settings.hop_views(num_blocks)
        hops = hops_of(
            self._views, self._folder, self._state, self._leaves, connect_hops, first_number=1
        )
        self._front = FrontHops(hops)
        self._proofs = of_all_hops([*(hop.proof for hop in hops), self.attestation])
        self.enclave = self._remote(Link(self._connect, self._own))
        self.trunk = self.enclave
        self.feeder: RowFeeder | None = None
        """Sends rows, and counts them; there once training has begun."""

    @classmethod
    def from_file(cls, path: Path, overrides: Iterable[str] = ()) -> "EnclaveClient":
        """An owner from a TOML file plus `section.key=value` overrides."""
        return cls(load_settings(EnclaveClientSettings, path, overrides))

    def close(self) -> None:
        """End the connection and release the run folder."""
        self.enclave.close()
        self._state.close()

    @property
    def guarantee(self) -> str:
        """What protects what leaves, to be printed beside every result: no noise, but proof."""
        promises = [view.privacy.activation_rule().guarantee for view in self._views]
        noise = [f"hop {n} noise: {text}" for n, text in enumerate(promises, start=1)]
        return "; ".join([self._proved, *noise])

    @property
    def _proved(self) -> str:
        if self.settings.labels is LabelPlace.SERVER:
            return SHARED_LABELS
        return "attestation: NONE" if self._proofs is None else self._proofs.line

    def generator(self) -> EnclaveGenerator:
        """Whatever generates, on the run's best step; the base model where none was trained."""
        return EnclaveGenerator(self._split_model(), self.settings.generation, self.context_length)

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
        self._write_adapter([state], step, folder, merged)
        return step

    def _split_step(self, settings: TrainSettings) -> EnclaveStep:
        gates = self._training_gates()
        self._state.claim(identity_of(self.settings.hops, self._views) or NO_HOPS)
        self.feeder = RowFeeder(
            self.front,
            self.enclave,
            gates.activations,
            RowsName(row_set=self._row_set(), front=self._front_digest()),
            sends_labels=self.settings.labels is not LabelPlace.CLIENT,
            passage=self._front if self._views else None,
        )
        return EnclaveStep(self._parts, self.enclave, gates, self.feeder, settings.in_flight)

    def _training_gates(self) -> Boundaries:
        """In front of the enclave, which is the last hop."""
        plain = training_gates(self._as_client, self._state.privacy)
        if not self._views:
            return plain
        return hop_training_gates(self._as_client, self._state.privacy, self._last_hop)

    @property
    def _last_hop(self) -> int:
        return len(self._views) + 1

    def _front_digest(self) -> str:
        # Another chain of servers makes other rows.
        places = identity_of(self.settings.hops, self._views)
        return hash_leaves({**self.front.leaves, **places})

    def _remote(self, link: Link) -> RemoteEnclave:
        vocab_size = int(self._folder.config.vocab_size)
        if not self._views:
            return RemoteEnclave(link, vocab_size)
        gate = hop_generation_gate(self._as_client, self._state.privacy, self._last_hop)
        return EnclaveChain(link, vocab_size, self._front, gate)

    def _generation_gate(self) -> Boundary:
        plain = generation_gate(self._as_client, self._state.privacy)
        return self._front.hops[0].generation if self._views else plain

    def _row_set(self) -> str:
        # A run may go on with labels elsewhere or with a smaller codec; rows that were sent before
        # lack the labels then, and are as large as ever.
        return f"{self.run_id}.{self.settings.connection.codec}.{self.settings.labels}"

    def _split_model(self) -> SplitModel:
        step = self._trained_step()
        return SplitModel(
            head=self.front,
            tail=self._parts.tail,
            trunk=self.enclave,
            boundary=self._generation_gate(),
            run_id=None if step is None else self.run_id,
            step=step,
            drafting=self._drafting,
        )

    def _frozen_parts(self, cut: Cut) -> TrainedParts:
        """The front, and a tail without memory in the place of the one that is inside."""
        tail = cast(Tail, build_part(self._folder.config, cut, Part.TAIL))
        train = self.settings.train or TrainSettings(steps=1)
        return TrainedParts(self.front, tail, _NOTHING, train.optimizer, train.seed)

    @property
    def _as_client(self) -> ClientSettings:
        return self._client_settings

    @property
    def _leaves(self) -> dict[str, str]:
        return self.front.leaves
