"""The issued certificates in real mutual TLS handshakes, over memory buffers and over gRPC."""

import ssl
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from cutlayer.identity.authority import Authority, approve, revoke
from cutlayer.identity.certificates import identify, load_certificates
from cutlayer.identity.install import member_files
from cutlayer.identity.keys import load_key
from cutlayer.identity.provision import local
from cutlayer.identity.request import request
from cutlayer.storage.files import private_folder, write_atomic
from tests.unit.identity.conftest import Federation


def _context(folder: Path, *, is_server: bool) -> ssl.SSLContext:
    files = member_files(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(files.authority)
    context.load_cert_chain(files.certificate, files.key)
    return context


def _handshake(client: Path, server: Path, host: str = "localhost") -> tuple[bytes, bytes]:
    """What each side learnt of the other, DER: (server's certificate, client's certificate)."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = _context(client, is_server=False).wrap_bio(down, up, server_hostname=host)
    far = _context(server, is_server=True).wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    seen, shown = near.getpeercert(True), far.getpeercert(True)
    assert seen is not None
    assert shown is not None
    return seen, shown


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_members_of_one_federation_meet_and_know_each_other(
    federation: Federation, host: str
) -> None:
    server, client = federation.join("trunk", "server"), federation.join("mercy")
    shown_to_client, shown_to_server = _handshake(client, server, host)
    holder = identify(ssl.DER_cert_to_PEM_cert(shown_to_server).encode())
    assert (holder.name, holder.roles) == ("mercy", {"train", "generate"})
    assert identify(ssl.DER_cert_to_PEM_cert(shown_to_client).encode()).roles == {"serve"}


def test_server_under_another_name_is_refused(federation: Federation) -> None:
    server, client = federation.join("trunk", "server"), federation.join("mercy")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        _handshake(client, server, "trunk.example.org")


def test_member_of_another_federation_is_refused(
    federation: Federation, make_federation: Callable[[str], Federation]
) -> None:
    server = federation.join("trunk", "server")
    stranger = make_federation("neurology").join("mercy")
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(stranger, server)


def test_client_certificate_cannot_serve_nor_a_servers_connect(federation: Federation) -> None:
    server, client = federation.join("trunk", "server"), federation.join("mercy")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        _handshake(client, client)
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        _handshake(server, server)


def test_member_cannot_vouch_for_others(federation: Federation, tmp_path: Path) -> None:
    server, insider = federation.join("trunk", "server"), federation.join("mercy")
    signer = load_certificates(insider / "certificate.pem")[0]
    assert not signer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    fake = Authority(
        folder=private_folder(tmp_path / "fake"),
        certificate=signer,
        key=load_key(insider / "key.pem"),  # type: ignore[arg-type]
        now=federation.clock,
    )
    write_atomic(fake.folder / "revoked.pem", (insider / "revoked.pem").read_bytes())
    asked = request(tmp_path / "boss", "boss")
    kit = approve(fake, asked.path, ["administer"], 30, fingerprint=asked.fingerprint)
    with zipfile.ZipFile(kit) as archive:
        leaf = archive.read("certificate.pem")
    chain = leaf + (insider / "certificate.pem").read_bytes()
    for name, data in {"certificate.pem": chain, "authority.pem": None}.items():
        content = data or (insider / name).read_bytes()
        write_atomic(tmp_path / "boss" / name, content)
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(tmp_path / "boss", server)


def test_expired_certificate_is_refused(federation: Federation) -> None:
    server = federation.join("trunk", "server")
    federation.clock.offset = -timedelta(days=10)
    expired = federation.join("mercy", days=5)
    federation.clock.offset = timedelta(days=10)
    future = federation.join("other")
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        _handshake(expired, server)
    with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
        _handshake(future, server)


def test_revoked_certificate_is_refused_by_any_tls_library_with_the_list(
    federation: Federation,
) -> None:
    server, client = federation.join("trunk", "server"), federation.join("mercy")
    revoke(federation.authority, "mercy", publish=[server / "revoked.pem"])
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = _context(server, is_server=True)
    context.load_verify_locations(server / "revoked.pem")
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    near = _context(client, is_server=False).wrap_bio(down, up, server_hostname="localhost")
    far = context.wrap_bio(up, down, server_side=True)

    def meet() -> None:
        for _ in range(4):
            for side in (near, far):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue

    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        meet()


def test_grpc_accepts_the_issued_certificates_and_shows_who_calls(tmp_path: Path) -> None:
    folders = local(tmp_path / "keys", ["alice"])
    read = {
        path: [p.read_bytes() for p in (f.authority, f.key, f.certificate)]
        for path in (folders.server, folders.clients["alice"])
        if (f := member_files(path))
    }

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        (pem,) = context.auth_context()["x509_pem_cert"]
        return identify(pem, context.peer()).name.encode()

    authority, key, certificate = read[folders.server]
    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Who": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)], authority, True)
    )
    server.start()
    try:
        credentials = grpc.ssl_channel_credentials(*read[folders.clients["alice"]])
        for host in ("127.0.0.1", "localhost"):
            with grpc.secure_channel(f"{host}:{port}", credentials) as channel:
                assert channel.unary_unary("/t.T/Who")(b"", timeout=20) == b"alice"
    finally:
        server.stop(None).wait()
