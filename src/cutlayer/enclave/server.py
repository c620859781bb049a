"""An enclave's server: all later blocks and the LM head behind one listener.

It parses no frames (`connection`) and computes nothing (`desk`). Everything that it shares with a
trunk server is `server.server`'s: doors, runner, runs, sessions, rounds, audit log.
"""

import secrets
from importlib.metadata import version
from typing import cast

from cutlayer.enclave.connection import EnclaveConnection
from cutlayer.enclave.desk import EnclaveDesk
from cutlayer.enclave.few import PoolOfMany
from cutlayer.enclave.inner_part import InnerPart
from cutlayer.enclave.row_store import RowStore
from cutlayer.enclave.settings import EnclaveSettings
from cutlayer.federation.trunk_pool import TrunkPool
from cutlayer.model.agreement import known_manifest
from cutlayer.model.checkpoint import load_part
from cutlayer.model.partition import Cut, Part, Tail, Trunk
from cutlayer.server.handshake import ServedModel
from cutlayer.server.server import TrunkServer
from cutlayer.server.settings import ServerSettings
from cutlayer.storage.files import explain_os_errors, private_folder
from cutlayer.storage.vault import new_key_file
from cutlayer.tee.masked.hook import mask_parts
from cutlayer.tee.private_model.source import open_model
from cutlayer.trace import Tracer
from cutlayer.wire.channel import Connection, Peer
from cutlayer.wire.spec import Spec

__all__ = ["EnclaveServer", "prepare_state"]


class EnclaveServer(TrunkServer):
    """From settings to a listening enclave; also the `Service` that loopback channels use."""

    def __init__(self, settings: EnclaveSettings, tracer: Tracer | None = None) -> None:
        """Load the blocks and open the state folder; nothing listens yet.

        Args:
            settings: everything about this enclave.
            tracer: where the timeline of the blocks' calls goes.

        Raises:
            ConfigError: wrong settings, model or certificates.
            StorageError: the state folder is in use, open to others or sealed with another key.
        """
        prepare_state(settings)
        self._min_cohort = 1 if settings.rounds is None else settings.rounds.min_cohort
        super().__init__(settings.as_server(), tracer)
        part = cast(InnerPart, self._trunk)
        # A value takes at least a byte, whatever the codec.
        max_logits = settings.listen.max_frame_bytes
        rows, takes_labels = RowStore(settings.rows), settings.takes_labels
        self.desk = EnclaveDesk(part, self._host, rows, max_logits, takes_labels)

    def connect(self, peer: Peer) -> Connection:
        """Accept a peer; its calls are checked one by one."""
        return EnclaveConnection(peer, self._desk, self.desk)

    def _pool(self) -> TrunkPool:
        return PoolOfMany(super()._pool(), self._min_cohort)

    def _load(self, settings: ServerSettings) -> tuple[Trunk, ServedModel]:
        model = settings.model
        attester = None if settings.tee is None else settings.tee.attester
        private, is_masked = settings.private_model, settings.masked is not None
        folder = open_model(model.path, model.revision, private, attester, is_masked)
        num_blocks = int(folder.config.num_hidden_layers)
        # The tail of this cut is all that comes after the owners' blocks.
        tail = load_part(folder, Cut(0, model.lower), Part.TAIL, model.dtype, model.device)
        part = InnerPart(cast(Tail, tail))
        mask_parts(settings.masked, part)
        spec = Spec(
            model_type=folder.config.model_type,
            n_block=num_blocks,
            lower=model.lower,
            upper=num_blocks,
            hidden_size=part.hidden_size,
            dtype=model.dtype,
            codec_up="raw",
            codec_down="raw",
        )
        served = ServedModel(
            spec=spec,
            manifest=known_manifest(folder, part.leaves),
            digest=model.digest,
            boot_id=secrets.token_hex(16),
            software=f"cutlayer {version('cutlayer')} enclave",
            has_one_cut=True,
        )
        return part, served


def prepare_state(settings: EnclaveSettings) -> bool:
    """Make the state folder and, at the first start, the key that seals it; whether it was made.

    Raises:
        StorageError: the folder is open to others, or the key cannot be written.
    """
    private_folder(settings.state.folder)
    key_file = settings.state.key_file
    if key_file.exists():
        return False
    with explain_os_errors(f"create {key_file.parent}"):
        key_file.parent.mkdir(parents=True, exist_ok=True)
    new_key_file(key_file)
    return True
