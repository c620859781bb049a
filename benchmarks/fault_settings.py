"""Settings of server and members in the fault campaign: short deadlines, a tiny model, few rows.

It starts nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_plan import Mode, Plan
from cutlayer.client.settings import ClientSettings
from cutlayer.federation.settings import FederationSettings
from cutlayer.identity.provision import LocalFolders, member_files
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings

__all__ = ["Table", "World", "client_settings", "federation_name", "rules_of", "server_settings"]

Table = dict[str, object]
ADAPTER: Table = {"rank": 2, "alpha": 4}
EPS = 1e-3
"""Of AdamW: gradients near zero must not blow up the last bit."""
LR = 0.02
_TOPICS = ("trade", "music", "law", "sport")


@dataclass(frozen=True, kw_only=True)
class World:
    """Where a scenario's parties have their files."""

    plan: Plan
    folder: Path
    model: Path
    address: str = "127.0.0.1:1"
    """Of the server, for processes."""
    keys: LocalFolders | None = None
    """Certificates, for processes."""

    @property
    def group_key(self) -> Path:
        """The members' common key."""
        return self.folder / "group.key"


def federation_name(plan: Plan) -> str:
    """Unique in a campaign."""
    return f"{'p' if plan.is_real else 't'}{plan.seed}"


def rules_of(plan: Plan) -> FederationSettings:
    """The federation, as its coordinator runs it."""
    gradient = {"kind": "every_step", "lr": LR, "eps": EPS}
    table: Table = {
        "name": federation_name(plan),
        "rounds": plan.rounds,
        "local_steps": plan.local_steps,
        "adapter": ADAPTER,
        "strategy": gradient if plan.mode is Mode.EVERY_STEP else {"kind": "fedavg"},
        "secure": {
            "enabled": plan.mode is not Mode.PLAIN,
            "hides_aggregate": plan.mode is Mode.HIDDEN,
            "threshold": 0.6,
        },
        "gather_s": 2.0 if plan.is_real else 0.3,
        "phase_deadline_s": 3.0 if plan.is_real else 1.0,
        "round_deadline_s": 10.0 if plan.is_real else 3.0,
        "max_attempts": 8,
    }
    return parse_settings(FederationSettings, table, "rules")


def server_settings(world: World, state: Path, num_replicas: int = 0) -> ServerSettings:
    """The server, with its state in that folder."""
    table: Table = {
        "model": {"path": str(world.model), "lower": 1, "upper": 3, "threads": 1},
        "listen": {"address": world.address, **_security(world, None)},
        "state": {"folder": str(state)},
        "federation": rules_of(world.plan).model_dump(exclude_unset=True),
        "drain_s": 1.0,
    }
    if world.keys is None:
        table["listen"] = {"address": "127.0.0.1:0", "plaintext": True}
    if num_replicas:
        table["replicas"] = {"count": num_replicas}
    return parse_settings(ServerSettings, table, "server")


def client_settings(world: World, name: str) -> ClientSettings:
    """One member; called again, it is the same."""
    folder = world.folder / name
    folder.mkdir(mode=0o700, exist_ok=True)
    membership: Table = {
        "name": federation_name(world.plan),
        "share_plain_updates": world.plan.mode is Mode.PLAIN,
    }
    if world.plan.mode is Mode.HIDDEN:
        membership["group_key_file"] = str(world.group_key)
    table: Table = {
        "model": {"path": str(world.model), "lower": 1, "upper": 3, "threads": 1},
        "connection": {"address": world.address, "codec": "raw", **_security(world, name)},
        "privacy": {"mechanism": "none"},
        "run": {"folder": str(folder / "run")},
        "adapter": ADAPTER,
        "data": {
            "train": str(_rows(folder / "rows.jsonl", 4 + 2 * world.plan.members.index(name))),
            "prompt_template": "{text}:",
            "completion_template": " {topic}",
            "chat_template": False,
        },
        "train": {
            "rows_per_step": 4,
            "micro_batch_rows": 2,
            "lr": LR,
            "optimizer": {"eps": EPS},
        },
        "federation": membership,
    }
    return parse_settings(ClientSettings, table, name)


def _rows(path: Path, num_rows: int) -> Path:
    rows = [
        {"text": "ab" * (1 + index % 5) + _TOPICS[index % 4][0], "topic": _TOPICS[index % 4]}
        for index in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _security(world: World, name: str | None) -> Table:
    if world.keys is None:
        return {"plaintext": True}
    files = member_files(world.keys.server if name is None else world.keys.clients[name])
    return {"tls": files.tls}
