"""What server and owners of a simulated federation would write by hand: keys and settings files.

It starts nothing. Every owner has two runs: together, as a member of the federation, and alone,
for the same number of its own steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cutlayer.client.member import steps_per_round
from cutlayer.client.settings import ClientSettings
from cutlayer.data.assets import ASSETS, fetch
from cutlayer.errors import ConfigError
from cutlayer.federation.secure.hidden import GroupKey
from cutlayer.federation.settings import FederationSettings
from cutlayer.identity.provision import LocalFolders, local, member_files
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.simulation.owners import OwnerRows
from cutlayer.simulation.settings import SimulationSettings

__all__ = ["Owner", "Parties", "num_steps", "open_model", "owner_at", "parties"]

_LOOPBACK = "127.0.0.1:0"
_NOWHERE = "127.0.0.1:1"
_ASSET = "asset:"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One data owner and its runs."""

    name: str
    together: ClientSettings
    """Training as a member."""
    alone: ClientSettings
    """Training by itself."""
    rows: OwnerRows


@dataclass(frozen=True, kw_only=True)
class Parties:
    """Everybody."""

    server: ServerSettings
    owners: list[Owner]
    federation: FederationSettings
    """As the coordinator runs it."""


def open_model(settings: SimulationSettings, cache: Path | None = None) -> ModelFolder:
    """The model of both sides; `asset:NAME` is fetched first."""
    name = settings.model.path
    if not name.startswith(_ASSET):
        return resolve_model(name, settings.model.revision, cache)
    asset = name.removeprefix(_ASSET)
    if asset not in ASSETS:
        raise ConfigError(f"model.path={name!r}: no such asset; there are {', '.join(ASSETS)}")
    return resolve_model(fetch(asset, cache), cache_folder=cache)


def parties(
    settings: SimulationSettings, model: Path, rows: Sequence[OwnerRows], folder: Path
) -> Parties:
    """Settings of the server and of every owner, and keys where they are processes.

    Args:
        settings: of the simulation.
        model: model folder, the same at both sides.
        rows: of the owners.
        folder: a private folder; everybody's state goes below it.

    Raises:
        ConfigError: the federation cannot have these owners.
    """
    names = [owner.name for owner in rows]
    federation = _federation(settings, names)
    keys = local(folder / "keys", names) if settings.simulation.processes else None
    table = {
        "model": _model(settings, model),
        "listen": {"address": _LOOPBACK, **_security(None if keys is None else keys.server)},
        "state": {"folder": str(folder / "server")},
        "federation": federation.model_dump(),
        "drain_s": 5.0,
    }
    if keys is not None:
        table["revoked"] = str(member_files(keys.server).revoked)
    return Parties(
        server=parse_settings(ServerSettings, table, "the simulation's server"),
        owners=[_owner(settings, model, federation, own, keys, folder) for own in rows],
        federation=federation,
    )


def owner_at(settings: ClientSettings, address: str) -> ClientSettings:
    """The same owner, now that the server's address is known."""
    connection = settings.connection.model_copy(update={"address": address})
    return settings.model_copy(update={"connection": connection})


def num_steps(federation: FederationSettings) -> int:
    """Optimizer steps of every owner over all rounds."""
    return federation.rounds * steps_per_round(federation)


def _federation(settings: SimulationSettings, names: Sequence[str]) -> FederationSettings:
    """All owners are members; where the file does not say otherwise, all are in every round."""
    stated = settings.federation
    if stated.min_members > len(names) and "min_members" in stated.model_fields_set:
        raise ConfigError(
            f"federation.min_members={stated.min_members} exceeds the {len(names)} owners; "
            "no round would ever begin"
        )
    table = stated.model_dump(exclude_unset=True)
    everybody = {"min_members": len(names), "gather_s": 0.0, "seed": settings.simulation.seed}
    everybody["quorum"] = min(len(names), stated.cohort or len(names))
    return parse_settings(
        FederationSettings, {**everybody, "members": list(names), **table}, "federation"
    )


def _owner(
    settings: SimulationSettings,
    model: Path,
    federation: FederationSettings,
    rows: OwnerRows,
    keys: LocalFolders | None,
    folder: Path,
) -> Owner:
    table: dict[str, object] = {
        "model": _model(settings, model),
        "connection": {
            "address": _NOWHERE,
            "codec": settings.connection.codec,
            **_security(None if keys is None else keys.clients[rows.name]),
        },
        "privacy": settings.privacy.model_dump(),
        "adapter": federation.adapter.model_dump(),
        # Held-out rows are scored before and after, not while training.
        "data": rows.data.model_copy(update={"validation": None}).model_dump(),
    }
    train = {"seed": settings.simulation.seed, **settings.train.model_dump(exclude_unset=True)}
    kinds: dict[str, dict[str, object]] = {
        "alone": {"train": {**train, "steps": num_steps(federation)}},
        "together": {"train": train, "federation": _membership(federation, folder)},
    }
    made = {}
    for kind, extra in kinds.items():
        run = {"folder": str(folder / "runs" / rows.name / kind)}
        every = {**table, **extra, "run": run}
        made[kind] = parse_settings(ClientSettings, every, f"owner {rows.name}")
    return Owner(name=rows.name, rows=rows, **made)


def _membership(federation: FederationSettings, folder: Path) -> dict[str, object]:
    """One hand wrote both sides' settings: owners agree to what the federation asks of them."""
    table: dict[str, object] = {
        "name": federation.name,
        "share_plain_updates": not federation.secure.enabled,
    }
    if federation.secure.hides_aggregate:
        path = folder / "group.key"
        if not path.exists():
            GroupKey.create(path)
        table["group_key_file"] = str(path)
    return table


def _model(settings: SimulationSettings, model: Path) -> dict[str, object]:
    # The revision was resolved: the folder holds that commit's files.
    return {**settings.model.model_dump(exclude={"revision"}), "path": str(model)}


def _security(member: Path | None) -> dict[str, object]:
    """Mutual TLS between processes; within one process nothing is encrypted."""
    if member is None:
        return {"plaintext": True}
    return {"tls": member_files(member).tls}
