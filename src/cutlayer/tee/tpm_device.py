"""This machine's TPM 2.0, through the commands of tpm2-tools (no shell, no secret in arguments).

The attestation key is a primary key: the TPM derives the same one from its seed each time, so that
nothing is kept on disk. It verifies nothing. On a bus that is not encrypted (a discrete TPM), who
solders wires sees what is unsealed; session encryption is not used.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.tee.attester import AttesterSettings

__all__ = ["MEASURED_PCRS", "TpmDevice", "TpmFiles", "TpmQuoteFiles", "find_tpm"]

MEASURED_PCRS = tuple(range(16))
"""Firmware, boot loader, kernel and what the operating system extends; 16 to 23 can be reset."""

_TIMEOUT_S = 120.0
_CHANGED = "PCR composite"
_TCTI = "TPM2TOOLS_TCTI"
_AK_ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
_SEALED_ATTRIBUTES = "fixedtpm|fixedparent"


@dataclass(frozen=True, kw_only=True)
class TpmQuoteFiles:
    """What `tpm2_quote` makes."""

    message: bytes
    signature: bytes
    pcrs: bytes


@dataclass(frozen=True, kw_only=True)
class TpmFiles:
    """A sealed object's two halves; neither tells the secret to anybody but this TPM."""

    public: bytes
    private: bytes


class TpmDevice:
    """One TPM; each method leaves no object in it."""

    def __init__(self, tcti: str) -> None:
        """Look for the tools.

        Args:
            tcti: how tpm2-tools reach the TPM: `device:/dev/tpmrm0`, `swtpm:path=SOCKET`.

        Raises:
            ConfigError: tpm2-tools are not installed.
        """
        if shutil.which("tpm2_quote") is None:
            raise ConfigError("tpm2-tools are not installed: `apt install tpm2-tools`")
        self.tcti = tcti
        path = os.environ.get("PATH", os.defpath)
        self._environment = {_TCTI: tcti, "PATH": path, "LANG": "C"}

    def attestation_key(self) -> bytes:
        """TPM2B_PUBLIC of the attestation key (ECDSA, P-256)."""
        with self._work() as work:
            self._load_ak(work)
            return self._read_public(work, "ak.ctx")

    def endorsement_key(self) -> bytes:
        """TPM2B_PUBLIC of the endorsement key (RSA 2048, TCG's default template)."""
        with self._work() as work:
            self._load_ek(work)
            return self._read_public(work, "ek.ctx")

    def quote(self, nonce: bytes, pcrs: Sequence[int] = MEASURED_PCRS) -> TpmQuoteFiles:
        """A quote by the attestation key over PCRs of the SHA-256 bank.

        Args:
            nonce: what it binds, at most 64 bytes.
            pcrs: indices.

        Raises:
            ConfigError: the TPM refused.
        """
        with self._work() as work:
            self._load_ak(work)
            command = ["tpm2_quote", "-Q", "-c", "ak.ctx", "-g", "sha256", "-q", nonce.hex()]
            outputs = ["-m", "message", "-s", "signature", "-o", "pcrs", "-F", "values"]
            self._run_twice(work, *command, "-l", _selection(pcrs), *outputs)
            return TpmQuoteFiles(
                message=(work / "message").read_bytes(),
                signature=(work / "signature").read_bytes(),
                pcrs=(work / "pcrs").read_bytes(),
            )

    def activate(self, credential: bytes) -> bytes:
        """The secret in a credential made for this endorsement key and this attestation key.

        Args:
            credential: of `tpm_activation.make_credential`.

        Raises:
            ConfigError: it is for another TPM or another key.
        """
        with self._work() as work:
            (work / "credential").write_bytes(credential)
            self._load_ak(work)
            self._load_ek(work)
            self._run(work, "tpm2_startauthsession", "-Q", "--policy-session", "-S", "session")
            self._run(work, "tpm2_policysecret", "-Q", "-S", "session", "-c", "e")
            keys = ["-c", "ak.ctx", "-C", "ek.ctx", "-P", "session:session"]
            files = ["-i", "credential", "-o", "secret"]
            try:
                self._run(work, "tpm2_activatecredential", "-Q", *keys, *files)
                return (work / "secret").read_bytes()
            finally:
                self._forget(work, "session")

    def seal(self, secret: bytes, pcrs: Sequence[int]) -> TpmFiles:
        """Keep a secret that comes out again only while the PCRs are as they are now.

        Args:
            secret: at most 128 bytes.
            pcrs: indices in the SHA-256 bank.

        Raises:
            ConfigError: the TPM refused.
        """
        with self._work() as work:
            self._load_storage_key(work)
            policy = ["--policy-pcr", "-l", _selection(pcrs), "-L", "policy"]
            self._run(work, "tpm2_createpolicy", "-Q", *policy)
            files = ["-L", "policy", "-i", "-", "-u", "public", "-r", "private"]
            kind = ["-C", "storage.ctx", "-a", _SEALED_ATTRIBUTES]
            self._run(work, "tpm2_create", "-Q", *kind, *files, stdin=secret)
            return TpmFiles(
                public=(work / "public").read_bytes(), private=(work / "private").read_bytes()
            )

    def unseal(self, sealed: TpmFiles, pcrs: Sequence[int]) -> bytes:
        """The secret.

        Args:
            sealed: of `seal`.
            pcrs: the same indices.

        Raises:
            ConfigError: a PCR differs, or another TPM sealed it.
        """
        with self._work() as work:
            (work / "public").write_bytes(sealed.public)
            (work / "private").write_bytes(sealed.private)
            self._load_storage_key(work)
            files = ["-u", "public", "-r", "private", "-c", "sealed.ctx"]
            self._run(work, "tpm2_load", "-Q", "-C", "storage.ctx", *files)
            self._run(work, "tpm2_flushcontext", "-t")
            self._run(work, "tpm2_startauthsession", "-Q", "--policy-session", "-S", "session")
            try:
                policy = ["-S", "session", "-l", _selection(pcrs)]
                self._run(work, "tpm2_policypcr", "-Q", *policy)
                return self._run(work, "tpm2_unseal", "-c", "sealed.ctx", "-p", "session:session")
            finally:
                self._forget(work, "session")

    def _load_ak(self, work: Path) -> None:
        kind = ["-g", "sha256", "-G", "ecc256:ecdsa-sha256:null", "-a", _AK_ATTRIBUTES]
        self._run(work, "tpm2_createprimary", "-Q", "-C", "e", *kind, "-c", "ak.ctx")
        # Without a resource manager a TPM holds three objects; contexts are loaded when used.
        self._run(work, "tpm2_flushcontext", "-t")

    def _load_ek(self, work: Path) -> None:
        self._run(work, "tpm2_createek", "-Q", "-G", "rsa", "-c", "ek.ctx")
        self._run(work, "tpm2_flushcontext", "-t")

    def _load_storage_key(self, work: Path) -> None:
        kind = ["-C", "o", "-g", "sha256", "-G", "ecc256"]
        self._run(work, "tpm2_createprimary", "-Q", *kind, "-c", "storage.ctx")
        self._run(work, "tpm2_flushcontext", "-t")

    def _read_public(self, work: Path, context: str) -> bytes:
        self._run(work, "tpm2_readpublic", "-Q", "-c", context, "-f", "tss", "-o", "public")
        return (work / "public").read_bytes()

    @contextmanager
    def _work(self) -> Iterator[Path]:
        """A folder of mode 0700, in memory where there is such a place, that is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="cutlayer-tpm-", dir=_memory_folder()) as folder:
            try:
                yield Path(folder)
            finally:
                self._forget(Path(folder), "-t")

    def _forget(self, work: Path, what: str) -> None:
        # After a failure the TPM may not know it any more, and the failure is what matters.
        with suppress(ConfigError):
            self._run(work, "tpm2_flushcontext", what)

    def _run_twice(self, work: Path, *command: str) -> None:
        try:
            self._run(work, *command)
        except ConfigError as error:
            # The kernel extended a PCR between the quote and the reading of the values.
            if _CHANGED not in str(error):
                raise
            self._run(work, *command)

    def _run(self, work: Path, *command: str, stdin: bytes = b"") -> bytes:
        try:
            done = subprocess.run(
                command,
                input=stdin,
                cwd=work,
                env=self._environment,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"{command[0]} did not answer: {error}") from error
        if done.returncode:
            raise ConfigError(f"{command[0]}: {_first_error(done.stderr)}")
        return done.stdout


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _selection(pcrs: Sequence[int]) -> str:
    return "sha256:" + ",".join(str(index) for index in sorted(pcrs))


def _first_error(stderr: bytes) -> str:
    lines = [line for line in stderr.decode(errors="replace").splitlines() if "ERROR" in line]
    return lines[0] if lines else "the TPM refused"


def find_tpm(settings: AttesterSettings) -> TpmDevice:
    """The TPM that tpm2-tools are told to use, or the kernel's.

    Args:
        settings: `root` is the folder under which `dev/tpmrm0` is looked up.

    Raises:
        ConfigError: there is none, or tpm2-tools are not installed.
    """
    named = os.environ.get(_TCTI)
    if named:
        return TpmDevice(named)
    path = settings.root / "dev/tpmrm0"
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist: this machine has no TPM 2.0, or the kernel does not see it; "
            f"{_TCTI} names another one"
        )
    return TpmDevice(f"device:{path}")
