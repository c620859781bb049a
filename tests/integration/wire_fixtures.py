"""Certificates made on the spot and a service whose answers a test controls."""

import datetime as dt
import ipaddress
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import grpc
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import CacheFull
from cutlayer.wire import codec, frame
from cutlayer.wire.channel import Peer
from cutlayer.wire.endpoints import ConnectionSettings, ListenSettings, TlsFiles
from cutlayer.wire.frame import Frame
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.grpc_listener import GrpcListener
from cutlayer.wire.messages import Decode, Decoded, Kind

PATH = "/cutlayer.Wire/Frames"
DAY = dt.timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class Authority:
    """A certificate authority that writes its participants' files into a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(name), self._key.public_key(), days=10)
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        certificate = builder.add_extension(constraints, True).sign(self._key, hashes.SHA256())
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, days: int = 5, host: str | None = None) -> TlsFiles:
        """Files of one participant: a server if it has a host name, else a client."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(name), key.public_key(), days)
        if host is None:
            usage = ExtendedKeyUsageOID.CLIENT_AUTH
        else:
            usage = ExtendedKeyUsageOID.SERVER_AUTH
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            names = x509.SubjectAlternativeName([x509.DNSName(host), address])
            builder = builder.add_extension(names, False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
        certificate = builder.sign(self._key, hashes.SHA256())
        files = TlsFiles(
            certificate=self._folder / f"{name}.crt",
            key=self._folder / f"{name}.key",
            authority=self.path,
        )
        files.key.write_bytes(_pem(key))
        files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return files

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int
    ) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder(_name(self._name), subject, key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - 20 * DAY).not_valid_after(now + days * DAY)


def identify(pem: bytes) -> Peer:
    """The holder by common name, as the identity room does by other fields."""
    certificate = x509.load_pem_x509_certificate(pem)
    (common,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = str(common.value)
    return Peer(name=name, roles=frozenset(), serial=certificate.serial_number, address="")


@dataclass
class EchoService:
    """Answers by session id: echo, hold (until released), full (CacheFull), bug, crash."""

    peers: list[Peer] = field(default_factory=list)
    held: list[tuple[Frame, Future[Frame]]] = field(default_factory=list)
    num_calls: int = 0
    num_closed: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))

    def connect(self, peer: Peer) -> "EchoService":
        self.peers.append(peer)
        return self

    def submit(self, frame: Frame) -> Future[Frame]:
        assert isinstance(frame.header, Decode)
        with self.changed:
            self.num_calls += 1
            self.changed.notify_all()
        if frame.header.session_id == "crash":
            raise ZeroDivisionError("a bug in submit")
        if frame.header.session_id == "hold":
            future: Future[Frame] = Future()
            with self.changed:
                self.held.append((frame, future))
                self.changed.notify_all()
            return future
        return self.pool.submit(self._answer, frame)

    def close(self) -> None:
        with self.changed:
            self.num_closed += 1
            self.changed.notify_all()

    def wait(self, **wanted: int) -> None:
        """Until counters have the wanted values; held counts held calls."""

        def is_there() -> bool:
            values = {"held": len(self.held), "calls": self.num_calls, "closed": self.num_closed}
            return all(values[name] >= value for name, value in wanted.items())

        with self.changed:
            assert self.changed.wait_for(is_there, timeout=20), (wanted, self)

    def release(self, index: int = 0) -> None:
        """Answer a held call."""
        frame, future = self.held.pop(index)
        future.set_result(self._answer(frame))

    def _answer(self, frame: Frame) -> Frame:
        assert isinstance(frame.header, Decode)
        if frame.header.session_id == "full":
            raise CacheFull("no KV bytes left; ask again later")
        if frame.header.session_id == "bug":
            raise ZeroDivisionError("a bug in the runner")
        return Frame(Kind.DECODED, Decoded(), {"y": frame.tensors["h"]})


def step(command: str = "echo", *, num_bytes: int = 64, position: int = 0) -> Frame:
    """A DECODE frame; its tensor is filled with `position`."""
    h = codec.encode(torch.full((1, num_bytes // 4), float(position)))
    header = Decode(session_id=command, rows=[0], lengths=[1], positions=[position])
    return Frame(Kind.DECODE, header, {"h": h})


@dataclass
class World:
    """An authority, a server's files and a client's files in one folder."""

    folder: Path
    authority: Authority
    server: TlsFiles
    client: TlsFiles

    @classmethod
    def make(cls, folder: Path) -> "World":
        authority = Authority(folder)
        server = authority.issue("server", host="localhost")
        return cls(folder, authority, server, authority.issue("hospital"))

    @contextmanager
    def listening(
        self,
        service: EchoService,
        tls: TlsFiles | None = None,
        is_allowed: list[bool] | None = None,
        **changes: float | int,
    ) -> Iterator[GrpcListener]:
        """A running server; it stops at once at the end."""
        allowed = [True] if is_allowed is None else is_allowed
        settings = ListenSettings.model_validate(
            {"address": "127.0.0.1:0", "tls": tls or self.server, "recheck_s": 0.1, **changes}
        )
        listener = GrpcListener(
            service, settings, identify=identify, is_allowed=lambda peer: allowed[0]
        )
        listener.start()
        try:
            yield listener
        finally:
            listener.stop(0.0)
            service.pool.shutdown()

    def connection(
        self, port: int, tls: TlsFiles | None = None, **changes: float | int | str
    ) -> ConnectionSettings:
        """Client settings for a server of this world."""
        return ConnectionSettings.model_validate(
            {
                "address": f"localhost:{port}",
                "tls": tls or self.client,
                "connect_timeout_s": 5.0,
                "deadline_s": 20.0,
                **changes,
            }
        )


class RawPeer:
    """A gRPC client of our own making: it sends any bytes, and reads only when told to."""

    def __init__(self, world: World, port: int) -> None:
        files = world.client
        credentials = grpc.ssl_channel_credentials(
            files.authority.read_bytes(), files.key.read_bytes(), files.certificate.read_bytes()
        )
        self._channel = grpc.secure_channel(f"localhost:{port}", credentials)
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self.stream = self._channel.stream_stream(PATH)(iter(self._outgoing.get, None))
        self.send = self._outgoing.put

    def end(self) -> tuple[grpc.StatusCode, str]:
        """How the server ended the stream."""
        return self.stream.code(), self.stream.details()

    def close(self) -> None:
        self.send(None)
        self.stream.cancel()
        self._channel.close()


def joined(message: Frame) -> bytes:
    return b"".join(frame.encode(message))


def wait_for_no_stream(listener: GrpcListener) -> None:
    give_up_s = time.monotonic() + 10
    while listener.num_streams and time.monotonic() < give_up_s:
        time.sleep(0.02)
    assert listener.num_streams == 0


def assert_serves(world: World, listener: GrpcListener) -> None:
    with closing(GrpcChannel(world.connection(listener.port))) as channel:
        assert channel.call(step()).result(10).tensors["y"].num_bytes == 64
