"""`cutlayer provision` as functions: the whole of it for one machine, and each step by name.

It does not talk to people or networks: whoever calls shows fingerprints and asks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cutlayer.errors import ConfigError, StorageError
from cutlayer.identity.authority import (
    Authority,
    approve,
    init_authority,
    open_authority,
    publish_list,
    revoke,
)
from cutlayer.identity.certificates import (
    WARN_DAYS,
    MemberKind,
    Role,
    days_left,
    identify,
    load_certificates,
)
from cutlayer.identity.check import Finding, check_kit
from cutlayer.identity.install import install, member_files
from cutlayer.identity.kit import AUTHORITY_FILE, CERTIFICATE_FILE, REVOKED_FILE, show_kit
from cutlayer.identity.request import Request, read_member, renew, request, show_request
from cutlayer.identity.revocation import install_revocations, read_list
from cutlayer.storage.files import private_folder

__all__ = [
    "LOCAL_HOSTS",
    "Finding",
    "LocalFolders",
    "approve",
    "check_kit",
    "identify",
    "init_authority",
    "install",
    "install_revocations",
    "local",
    "member_files",
    "open_authority",
    "publish_list",
    "renew",
    "request",
    "revoke",
    "show_kit",
    "show_request",
]

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_LOCAL_ROLES = {
    MemberKind.CLIENT: (Role.TRAIN, Role.GENERATE, Role.ADMINISTER),
    MemberKind.SERVER: (Role.SERVE,),
}
_LIST_MARGIN = timedelta(days=15)


@dataclass(frozen=True, kw_only=True)
class LocalFolders:
    """What `local` made."""

    authority: Path
    server: Path
    clients: dict[str, Path]
    """By name."""


def local(
    folder: Path,
    names: Sequence[str] = ("client",),
    hosts: Sequence[str] = LOCAL_HOSTS,
    server_address: str | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> LocalFolders:
    """An authority, a server and clients with all roles, on one machine in one go.

    Whoever can read this folder can be anybody in the federation: for one machine, for trials.
    Called again it keeps what is in order, and adds what is missing.

    Args:
        folder: gets `authority`, `server` and one folder per client.
        names: of the clients.
        hosts: where the server answers.
        server_address: host:port, written into the clients' kits.
        now: the clock, timezone-aware.

    Raises:
        ConfigError: malformed name or host, or a client named `authority` or `server`.
        StorageError: a folder is open to others, damaged or not writable.
    """
    taken = {"authority", "server"} & set(names)
    if taken:
        raise ConfigError(f"client name {taken.pop()!r} is taken by a folder here; choose another")
    private_folder(folder)
    authority = _local_authority(folder / "authority", now)
    server, clients = folder / "server", {name: folder / name for name in names}
    _member(authority, server, MemberKind.SERVER, hosts, server_address)
    for path in clients.values():
        _member(authority, path, MemberKind.CLIENT, (), server_address)
    return LocalFolders(authority=authority.folder, server=server, clients=clients)


def _local_authority(folder: Path, now: Callable[[], datetime]) -> Authority:
    if not (folder / AUTHORITY_FILE).exists():
        return init_authority(folder, "local-federation", now=now)
    authority = open_authority(folder, now=now)
    due = read_list(folder / REVOKED_FILE, folder / AUTHORITY_FILE).next_update
    if due is None or due < now() + _LIST_MARGIN:
        publish_list(authority)
    return authority


def _member(
    authority: Authority,
    folder: Path,
    kind: MemberKind,
    hosts: Sequence[str],
    server_address: str | None,
) -> None:
    if not (folder / CERTIFICATE_FILE).exists():
        asked = request(folder, folder.name, kind, hosts)
        _approve_and_install(authority, folder, asked, server_address)
    install_revocations(authority.folder / REVOKED_FILE, folder)
    certificate = load_certificates(folder / CERTIFICATE_FILE)[0]
    is_revoked = (
        certificate.serial_number
        in read_list(folder / REVOKED_FILE, folder / AUTHORITY_FILE).serials
    )
    is_due = days_left(certificate, authority.now()) < WARN_DAYS
    has_other_hosts = set(hosts) != set(read_member(folder).hosts)
    # A revoked member stays revoked.
    if not is_revoked and (is_due or has_other_hosts):
        _approve_and_install(authority, folder, renew(folder, hosts=hosts), server_address)
    errors = [f.text for f in check_kit(folder, authority.now()) if f.is_error]
    if errors:
        raise StorageError(f"{folder} is not in order: {'; '.join(errors)}")


def _approve_and_install(
    authority: Authority, folder: Path, asked: Request, server_address: str | None
) -> None:
    kit = approve(
        authority,
        asked.path,
        _LOCAL_ROLES[asked.kind],
        fingerprint=asked.fingerprint,
        server_address=server_address,
    )
    install(kit, folder, authority.fingerprint)
