"""What a machine without a TPM, or without its tools, is told."""

from pathlib import Path

import pytest

from cutlayer.errors import ConfigError
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.attesters import tpm  # noqa: F401  (registers it)
from cutlayer.tee.tpm_device import TpmDevice, find_tpm
from cutlayer.tee.tpm_sealing import read_sealed, seal


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, with a `tpm2_quote` that does nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder, "tpm2_quote", "exit 0")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("TPM2TOOLS_TCTI", raising=False)
    return folder


def script(folder: Path, name: str, line: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{line}\n")
    (folder / name).chmod(0o755)


def test_machine_without_a_tpm_is_told_where_it_was_looked_for(tools: Path, tmp_path: Path) -> None:
    settings = AttesterSettings(source="tpm", root=tmp_path)
    with pytest.raises(ConfigError, match=r"dev/tpmrm0 does not exist: .*TPM2TOOLS_TCTI"):
        ATTESTERS.get("tpm").attest(settings, bytes(32))


def test_machine_without_the_tools_is_told_their_name(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tools / "tpm2_quote").unlink()
    monkeypatch.setenv("TPM2TOOLS_TCTI", "swtpm:path=nowhere")
    with pytest.raises(ConfigError, match="apt install tpm2-tools"):
        find_tpm(AttesterSettings(source="tpm", root=tmp_path))


def test_kernels_tpm_is_taken_where_none_is_named(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/tpmrm0").touch()
    found = find_tpm(AttesterSettings(source="tpm", root=tmp_path))
    assert found.tcti == f"device:{tmp_path}/dev/tpmrm0"


def test_tool_that_is_missing_or_fails_is_named(tools: Path) -> None:
    device = TpmDevice("swtpm:path=nowhere")
    with pytest.raises(ConfigError, match="tpm2_createprimary did not answer"):
        device.attestation_key()
    script(tools, "tpm2_createprimary", "echo ERROR: no transport >&2; exit 1")
    with pytest.raises(ConfigError, match="tpm2_createprimary: ERROR: no transport"):
        device.attestation_key()
    script(tools, "tpm2_createprimary", "exit 3")
    with pytest.raises(ConfigError, match="the TPM refused"):
        device.attestation_key()


def test_quote_is_asked_again_where_a_pcr_changed_meanwhile(tools: Path) -> None:
    for name in ("tpm2_createprimary", "tpm2_flushcontext"):
        script(tools, name, "exit 0")
    fails = 'if [ -e once ]; then exec 3>message 4>signature 5>pcrs; else : >once; echo "ERROR: '
    fails += 'Error validating calculated PCR composite with quote" >&2; exit 1; fi'
    script(tools, "tpm2_quote", fails)
    assert TpmDevice("swtpm:path=nowhere").quote(bytes(32)).message == b""
    script(tools, "tpm2_quote", "echo ERROR: other >&2; : >>count; exit 1")
    with pytest.raises(ConfigError, match="other"):
        TpmDevice("swtpm:path=nowhere").quote(bytes(32))


@pytest.mark.parametrize(
    ("secret", "pcrs", "words"),
    [
        (b"", [4], "1 to 128 bytes"),
        (bytes(129), [4], "1 to 128 bytes"),
        (b"key", [], "0 to 23"),
        (b"key", [24], "0 to 23"),
        (b"key", [-1], "0 to 23"),
    ],
)
def test_what_cannot_be_sealed_is_said_before_the_tpm_is_asked(
    tools: Path, secret: bytes, pcrs: list[int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        seal(TpmDevice("swtpm:path=nowhere"), secret, pcrs)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"pcrs": [1], "public": 7}'])
def test_file_that_holds_no_sealed_secret_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "sealed"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"{path} holds no sealed secret"):
        read_sealed(path)
