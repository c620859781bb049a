"""Collateral from a service in Intel's form: a local one that speaks for the test authority."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote as url_quote
from urllib.parse import urlsplit

import msgspec
import pytest

from cutlayer.errors import AttestationError, TransportError
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.intel_collateral import fetch_collateral
from cutlayer.tee.quote import COLLATERAL
from cutlayer.tee.synthetic_quoter import SyntheticQuoter
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from tests.unit.cli.cli_world import run_command

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
QUOTER = SyntheticQuoter.create()
MADE = QUOTER.evidence(bytes(48), bytes(32), AT)


class Service(ThreadingHTTPServer):
    """Intel's paths over the collateral of one evidence."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Paths)
        self.is_down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Paths(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        whole = json.loads(MADE.collateral[COLLATERAL])
        chain_name, chain, body = _answers(whole)[urlsplit(self.path).path.rsplit("/", 1)[-1]]
        assert isinstance(self.server, Service)
        self.send_response(503 if self.server.is_down else 200)
        self.send_header(chain_name, url_quote(chain))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _answers(whole: dict[str, str]) -> dict[str, tuple[str, str, bytes]]:
    signed = {
        "tcb": ("tcbInfo", "tcb_info", "TCB-Info-Issuer-Chain"),
        "identity": ("enclaveIdentity", "qe_identity", "SGX-Enclave-Identity-Issuer-Chain"),
    }
    crl_chain = whole["pck_crl_issuer_chain"]
    answers = {
        "pckcrl": ("SGX-PCK-CRL-Issuer-Chain", crl_chain, bytes.fromhex(whole["pck_crl"])),
        "rootcacrl": ("X-None", "", whole["root_ca_crl"].encode()),
    }
    for path, (wrapper, name, header) in signed.items():
        signature = json.dumps(whole[f"{name}_signature"])
        body = f'{{"{wrapper}":{whole[name]},"signature":{signature}}}'.encode()
        answers[path] = (header, whole[f"{name}_issuer_chain"], body)
    return answers


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_what_is_fetched_verifies_the_quote(service: Service) -> None:
    fetched = fetch_collateral(MADE.body, service.url)
    whole = msgspec.structs.replace(MADE, collateral={COLLATERAL: fetched})
    trust = Trust(at=AT, roots={Platform.SIMULATED: QUOTER.root_pem})
    assert claims_of(whole, trust) == claims_of(MADE, trust)


def test_a_service_that_fails_is_named(service: Service) -> None:
    service.is_down = True
    with pytest.raises(TransportError, match=rf"no collateral from {service.url}: .*503"):
        fetch_collateral(MADE.body, service.url)
    with pytest.raises(TransportError, match="no collateral from"):
        fetch_collateral(MADE.body, "http://127.0.0.1:1")


def test_nobody_is_asked_for_what_is_no_quote() -> None:
    with pytest.raises(AttestationError) as caught:
        fetch_collateral(b"no quote", "http://127.0.0.1:1")
    assert caught.value.refusal == "malformed"


def test_the_command_writes_what_a_settings_file_names(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, path = tmp_path / "quote.bin", tmp_path / "intel.json"
    raw.write_bytes(MADE.body)
    command = ("attest", "collateral", str(raw), str(path), "--platform", "tdx")
    ran = run_command(capsys, *command, "--url", service.url, "--json")
    assert (ran.code, json.loads(ran.out)["collateral"]) == (0, str(path))
    evidence = Evidence(
        platform=Platform.TDX, body=MADE.body, collateral={COLLATERAL: path.read_bytes()}
    )
    trust = Trust(at=AT, roots={Platform.TDX: QUOTER.root_pem})
    assert claims_of(evidence, trust).tcb_status == "UpToDate"
    raw.write_bytes(MADE.to_json())
    wrong = run_command(capsys, "attest", "collateral", str(raw), str(path), "--platform", "nitro")
    assert (wrong.code, "only Intel's quotes" in wrong.err) == (2, True)
