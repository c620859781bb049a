"""Attesters against emulated kernels, enclaves and sockets: the protocol is real, the quote too."""

import json
import os
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import pytest

from cutlayer.errors import ConfigError
from cutlayer.tee.attest import attest
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.attesters.configfs_tsm import ConfigfsTsmAttester
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.quote import COLLATERAL
from cutlayer.tee.synthetic_quote import TdFields
from cutlayer.tee.synthetic_quoter import SyntheticQuoter
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
REPORT_DATA = bytes(range(32))
MR_TD = b"\x05" * 48
QUOTER = SyntheticQuoter.create()


def quote(report_data: bytes) -> bytes:
    return QUOTER.quote(TdFields(mr_td=MR_TD, report_data=report_data))


def passes(evidence: Evidence) -> bool:
    """With the collateral beside it, the quote is one that binds what was asked."""
    made = QUOTER.evidence(MR_TD, REPORT_DATA, AT)
    whole = Evidence(platform=Platform.TDX, body=evidence.body, collateral=made.collateral)
    claims = claims_of(whole, Trust(at=AT, roots={Platform.TDX: QUOTER.root_pem}))
    return claims.report_data == REPORT_DATA.ljust(64, b"\0")


class FakeKernel:
    """The attributes of configfs-tsm: named pipes for what the kernel answers when it is asked."""

    def __init__(self, root: Path, provider: str = "tdx_guest", intruders: int = 0) -> None:
        self.reports = root / "sys/kernel/config/tsm/report"
        self.reports.mkdir(parents=True)
        self.provider, self.intruders = provider, intruders
        self.auxblob = b""
        self.taken = 0

    def make(self, folder: Path) -> None:
        if self.taken:
            self.taken -= 1
            raise FileExistsError(17, "File exists", str(folder))
        folder.mkdir()
        for name in ("inblob", "outblob"):
            os.mkfifo(folder / name)
        (folder / "provider").write_text(f"{self.provider}\n")
        (folder / "generation").write_text("7\n")
        if self.auxblob:
            (folder / "auxblob").write_bytes(self.auxblob)
        threading.Thread(target=self._serve, args=(folder,), daemon=True).start()

    def _serve(self, folder: Path) -> None:
        inblob = (folder / "inblob").read_bytes()
        writes = 1 if self.intruders == 0 else 2
        self.intruders = max(0, self.intruders - 1)
        (folder / "generation").write_text(f"{7 + writes}\n")
        (folder / "outblob").write_bytes(quote(inblob))

    def attester(self) -> ConfigfsTsmAttester:
        return ConfigfsTsmAttester(make=self.make, remove=shutil.rmtree)


def tsm_settings(root: Path) -> AttesterSettings:
    return AttesterSettings(source="configfs-tsm", root=root)


def test_the_kernel_of_a_tdx_guest_gives_a_quote(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    evidence = kernel.attester().attest(tsm_settings(tmp_path), REPORT_DATA)
    assert evidence.platform is Platform.TDX
    assert passes(evidence)
    assert list(kernel.reports.iterdir()) == []


def test_a_taken_name_leads_to_another(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.taken = 2
    assert passes(kernel.attester().attest(tsm_settings(tmp_path), REPORT_DATA))
    kernel.taken = 99
    with pytest.raises(ConfigError, match="no folder in"):
        kernel.attester().attest(tsm_settings(tmp_path), REPORT_DATA)


def test_a_report_that_another_process_disturbed_is_asked_again(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path, intruders=1)
    assert passes(kernel.attester().attest(tsm_settings(tmp_path), REPORT_DATA))
    kernel.intruders = 99
    with pytest.raises(ConfigError, match="another process writes"):
        kernel.attester().attest(tsm_settings(tmp_path), REPORT_DATA)


def test_an_snp_guest_brings_the_table_of_its_host(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path, provider="sev_guest")
    kernel.auxblob = b"certificates"
    evidence = kernel.attester().attest(tsm_settings(tmp_path), REPORT_DATA)
    assert evidence.platform is Platform.SEV_SNP
    assert evidence.collateral == {"auxblob": b"certificates"}


def test_an_unknown_provider_is_named(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path, provider="arm_cca_guest")
    with pytest.raises(ConfigError, match="'arm_cca_guest'"):
        kernel.attester().attest(tsm_settings(tmp_path), REPORT_DATA)


def test_a_machine_without_the_kernel_interface_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no TDX or SEV-SNP guest with Linux 6\.7"):
        attest(tsm_settings(tmp_path), REPORT_DATA)


def test_a_folder_that_the_kernel_does_not_fill_is_an_error(tmp_path: Path) -> None:
    # A plain folder under that name: mkdir works, but there are no attributes.
    (tmp_path / "sys/kernel/config/tsm/report").mkdir(parents=True)
    with pytest.raises(ConfigError, match="No such file"):
        attest(tsm_settings(tmp_path), REPORT_DATA)


def gramine_folder(root: Path, kind: str = "dcap") -> Path:
    folder = root / "dev/attestation"
    folder.mkdir(parents=True)
    (folder / "attestation_type").write_text(kind)
    os.mkfifo(folder / "user_report_data")
    os.mkfifo(folder / "quote")
    return folder


def serve_gramine(folder: Path) -> None:
    asked = (folder / "user_report_data").read_bytes()
    (folder / "quote").write_bytes(quote(asked))


def test_gramine_gives_the_quote_of_what_was_written(tmp_path: Path) -> None:
    folder = gramine_folder(tmp_path)
    threading.Thread(target=serve_gramine, args=(folder,), daemon=True).start()
    evidence = attest(AttesterSettings(source="gramine", root=tmp_path), REPORT_DATA)
    assert evidence.platform is Platform.SGX
    assert passes(evidence)


def test_an_enclave_without_dcap_is_refused_with_what_to_do(tmp_path: Path) -> None:
    gramine_folder(tmp_path, kind="none")
    with pytest.raises(ConfigError, match=r"type is 'none'; build it with"):
        attest(AttesterSettings(source="gramine", root=tmp_path), REPORT_DATA)
    with pytest.raises(ConfigError, match="No such file"):
        attest(AttesterSettings(source="gramine", root=tmp_path / "plain"), REPORT_DATA)


class _Answers(BaseHTTPRequestHandler):
    answer: ClassVar[Callable[[dict[str, str]], tuple[int, bytes]]]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/GetQuote"
        status, body = type(self).answer(asked)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def dstack(answer: Callable[[dict[str, str]], tuple[int, bytes]]) -> Iterator[AttesterSettings]:
    """A socket that answers; its path must be short, so it is not under pytest's folder."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "var/run/dstack.sock"
        path.parent.mkdir(parents=True)
        handler = type("Handler", (_Answers,), {"answer": staticmethod(answer)})
        with socketserver.UnixStreamServer(str(path), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            yield AttesterSettings(source="dstack", root=Path(name))
            server.shutdown()
            thread.join()


def test_dstack_answers_with_a_quote_of_what_was_asked() -> None:
    def answer(asked: dict[str, str]) -> tuple[int, bytes]:
        body = {"quote": quote(bytes.fromhex(asked["report_data"])).hex(), "event_log": "[]"}
        return 200, json.dumps(body).encode()

    with dstack(answer) as settings:
        evidence = attest(settings, REPORT_DATA)
    assert evidence.platform is Platform.TDX
    assert passes(evidence)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b"", "HTTP 500"),
        (200, b"[]", "no quote"),
        (200, b'{"quote": "xyz"}', "no quote"),
        (200, b"\xff", "no quote"),
        (200, b" " * (5 << 20), "more than"),
    ],
)
def test_what_dstack_answers_instead_is_an_error(status: int, body: bytes, message: str) -> None:
    with dstack(lambda _: (status, body)) as settings, pytest.raises(ConfigError, match=message):
        attest(settings, REPORT_DATA)


def test_a_container_without_the_socket_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is this a dstack container"):
        attest(AttesterSettings(source="dstack", root=tmp_path), REPORT_DATA)


def test_named_files_travel_with_the_evidence(tmp_path: Path) -> None:
    fresh = tmp_path / "collateral.json"
    fresh.write_bytes(b"newer")
    settings = AttesterSettings(
        source="simulated", folder=tmp_path / "machine", collateral={COLLATERAL: fresh}
    )
    assert attest(settings, REPORT_DATA).collateral == {COLLATERAL: b"newer"}
    fresh.unlink()
    with pytest.raises(ConfigError, match=r"cannot read collateral .*collateral\.json"):
        attest(settings, REPORT_DATA)


def test_an_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"known: .*configfs-tsm, dstack, gramine"):
        attest(AttesterSettings(source="crystal-ball"), REPORT_DATA)


def test_every_source_refuses_a_machine_that_it_is_not(tmp_path: Path) -> None:
    # The simulated one works everywhere; its folder is what it lacks here.
    for source in ATTESTERS:
        with pytest.raises(ConfigError):
            attest(AttesterSettings(source=source, root=tmp_path), REPORT_DATA)
