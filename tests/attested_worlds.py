"""A trunk server with evidence of a simulated machine, reached by gRPC over mutual TLS.

Every frame that arrives is counted; what is answered, and which certificate is shown, can be
replaced, as a hostile place would.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cutlayer import Client, ClientSettings, ServerSettings, TrunkServer
from cutlayer.errors import AttestationError
from cutlayer.identity.admission import Admission
from cutlayer.identity.keys import new_key
from cutlayer.identity.provision import LocalFolders, local, member_files
from cutlayer.server.attestation import ServerAttestation
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.tee.binding import Binding
from cutlayer.tee.endorsement import Endorser
from cutlayer.tee.evidence import Evidence
from cutlayer.tee.exhibit import Exhibit, Side, session_digest
from cutlayer.tee.measure import measure_package
from cutlayer.tee.ra_tls import key_digest, key_pem, make_certificate
from cutlayer.tee.synthetic_quoter import ROOT_FILE, Pretence, SyntheticQuoter
from cutlayer.tee.verifier import utc_now
from cutlayer.wire.channel import Connection, Peer
from cutlayer.wire.frame import Frame
from cutlayer.wire.grpc_listener import GrpcListener
from cutlayer.wire.messages import Hello, Kind
from tests.federation_worlds import NAMES
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_settings

Table = dict[str, object]
Answer = Callable[[Frame, Frame], Frame]
"""A call and its honest answer, to what is answered."""


@dataclass
class Arrivals:
    """What a server was sent."""

    kinds: list[Kind] = field(default_factory=list)
    num_tensors: int = 0


@dataclass(frozen=True)
class Served:
    """A server that listens."""

    server: TrunkServer
    port: int
    arrived: Arrivals


class _Watched:
    """A connection whose calls are counted, and whose answers may be replaced."""

    def __init__(self, inner: Connection, arrived: Arrivals, answer: Answer) -> None:
        self._inner, self._arrived, self._answer = inner, arrived, answer

    def submit(self, frame: Frame) -> "Future[Frame]":
        self._arrived.kinds.append(frame.kind)
        self._arrived.num_tensors += len(frame.tensors)
        answered: Future[Frame] = Future()

        def pass_on(done: "Future[Frame]") -> None:
            error = done.exception()
            if error is not None:
                answered.set_exception(error)
            else:
                answered.set_result(self._answer(frame, done.result()))

        self._inner.submit(frame).add_done_callback(pass_on)
        return answered

    def close(self) -> None:
        self._inner.close()


@dataclass
class _Service:
    server: TrunkServer
    arrived: Arrivals
    answer: Answer

    def connect(self, peer: Peer) -> Connection:
        return _Watched(self.server.connect(peer), self.arrived, self.answer)


@dataclass(frozen=True)
class AttestedWorld:
    """Model, certificates, and two machines: the server's and the client's."""

    folder: Path
    model: Path
    kits: LocalFolders

    @classmethod
    def make(cls, folder: Path) -> "AttestedWorld":
        kits = local(private_folder(folder / "kits"), names=("clinic", "bank", *NAMES))
        private_folder(folder / "machines")
        return cls(folder, tiny_llama_folder(folder), kits)

    def machine(self, name: str = "server") -> SyntheticQuoter:
        """The quoter of a machine; the same one as its attester uses."""
        return SyntheticQuoter.open(self.folder / "machines" / name)

    def policy(self, machine: str = "server", **changes: object) -> Path:
        """A policy file for this installation on that machine; `changes` replace keys."""
        self.machine(machine)
        table: Table = {
            "name": machine,
            "platforms": ["simulated"],
            "least_assurance": "simulated",
            "measurements": {"mr_td": [measure_package().hex()]},
            "roots": {"simulated": str(self.folder / "machines" / machine / ROOT_FILE)},
            **changes,
        }
        path = self.folder / f"policy-{len(list(self.folder.glob('policy-*')))}.toml"
        path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in table.items()))
        return path

    def attester(self, machine: str = "server") -> Table:
        """Settings of an attester."""
        return {"source": "simulated", "folder": str(self.folder / "machines" / machine)}

    def server(self, name: str = "server", **tee: object) -> ServerSettings:
        """A trunk server that attests; `name` is of its state folder."""
        table: Table = {
            "model": {"path": str(self.model), "lower": 1, "upper": 3},
            "listen": {"address": "127.0.0.1:0", "tls": tls_of(self.kits.server)},
            "state": {"folder": str(self.folder / name)},
            "tee": {"attester": self.attester(), **tee},
        }
        return parse_settings(ServerSettings, table, "test server")

    def client(
        self, port: int, tee: Table | None = None, name: str = "clinic", **changes: object
    ) -> ClientSettings:
        """An owner who wants evidence; `tee` replaces keys of that section."""
        folder = private_folder(self.folder / f"owner-{name}")
        wish: Table = {"train__steps": 2, **changes}
        own = client_settings(self.model, folder, **wish)
        table = own.model_dump(mode="json", exclude_defaults=True)
        table["connection"] = {
            "address": f"127.0.0.1:{port}",
            "tls": tls_of(self.kits.clients[name]),
            "codec": "raw",
        }
        table["tee"] = {
            **({} if tee and "policy" in tee else {"policy": self.policy()}),
            **(tee or {}),
        }
        return parse_settings(ClientSettings, table, "test client")

    @contextmanager
    def serving(
        self,
        settings: ServerSettings | None = None,
        answer: Answer = lambda call, reply: reply,
        certificate: Callable[[], tuple[bytes, bytes]] | None = None,
    ) -> Iterator[Served]:
        """A running server.

        Args:
            settings: None takes the world's own.
            answer: what is answered in place of what the server would.
            certificate: key and certificate to show in place of the server's own.
        """
        server = TrunkServer(settings or self.server())
        attestation = server._desk.attestation
        own = None if attestation is None else attestation.own_certificate
        service = _Service(server, Arrivals(), answer)
        listener = GrpcListener(
            service,
            server._settings.listen,
            identify=Admission(None).identify,
            own_certificate=certificate or own,
        )
        listener.start()
        try:
            yield Served(server, listener.port, service.arrived)
        finally:
            listener.stop()
            server.stop(grace_s=0)

    def endorser(self) -> Endorser:
        """The provisioned server's."""
        files = member_files(self.kits.server)
        return Endorser(files.certificate, files.key)

    def evidence(
        self,
        binding: Binding,
        machine: str = "server",
        mr_td: bytes | None = None,
        pretence: Pretence | None = None,
    ) -> Evidence:
        """Evidence of whatever a machine pretends to be."""
        measured = measure_package() if mr_td is None else mr_td
        quoter = self.machine(machine)
        return quoter.evidence(measured, binding.report_data(), utc_now(), pretence)

    def certificate(
        self,
        key: ec.EllipticCurvePrivateKey | None = None,
        at: datetime | None = None,
        evidence: Evidence | None = None,
        **pretended: object,
    ) -> Callable[[], tuple[bytes, bytes]]:
        """Key and certificate that a hostile server shows."""
        key = key or new_key()
        digest = key_digest(key.public_key())
        binding = Binding(tls_key_sha256=digest, nonce=b"", spec_digest=b"")
        shown = evidence or self.evidence(binding, **pretended)  # type: ignore[arg-type]
        extensions = (self.endorser().extension(digest),)
        pem = make_certificate(key, shown, at or utc_now(), extensions)
        return lambda: (key_pem(key), pem)


def refusal_of(world: AttestedWorld, served: Served, **tee: object) -> AttestationError:
    """Of a training that must not begin."""
    with (
        Client(world.client(served.port, tee or None)) as client,
        pytest.raises(AttestationError) as caught,
    ):
        client.train()
    assert served.arrived.num_tensors == 0
    assert Kind.OPEN_RUN not in served.arrived.kinds
    return caught.value


def proof_of(
    world: AttestedWorld,
    server: TrunkServer,
    call: Frame,
    nonce: bytes | None = None,
    **pretended: object,
) -> bytes:
    """What another machine, or another software, would answer to HELLO on this connection."""
    assert isinstance(call.header, Hello)
    attestation = attestation_in(server)
    public = attestation.prover.sealing_key.public
    binding = Binding(
        tls_key_sha256=attestation.door.key_sha256,
        nonce=bytes.fromhex(call.header.nonce) if nonce is None else nonce,
        spec_digest=session_digest(call.header.spec, Side.SERVER, public),
    )
    evidence = world.evidence(binding, **pretended)  # type: ignore[arg-type]
    return Exhibit(evidence=evidence, sealing_key=public).pack()


def attestation_in(server: TrunkServer) -> ServerAttestation:
    """Of a server with a section [tee]."""
    found = server._desk.attestation
    assert found is not None
    return found


def later(hours: float) -> Callable[[], datetime]:
    """A clock that is wrong by so much."""
    return lambda: utc_now() + timedelta(hours=hours)


def tls_of(kit: Path) -> Table:
    """Settings of mutual TLS."""
    return {**member_files(kit).tls}


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(x)}" for key, x in value.items()) + " }"
    return json.dumps(value)
