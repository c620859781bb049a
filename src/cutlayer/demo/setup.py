"""What the demo's owner and operator would write by hand: rows, keys and two settings files.

It starts nothing and measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cutlayer.client.settings import ClientSettings
from cutlayer.data.settings import DataSettings
from cutlayer.data.topics import topic_settings, topics, write_topics
from cutlayer.demo.settings_text import settings_text
from cutlayer.identity.provision import local, member_files
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import Settings, parse_settings
from cutlayer.storage.files import write_atomic

__all__ = ["DemoFiles", "DemoSize", "client_settings", "prepare", "write_settings"]

_LOOPBACK = "127.0.0.1:0"
_WHERE = "the demo's settings"


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How large the demo is; smaller ones are for tests."""

    num_train: int = 360
    num_heldout: int = 300
    rows_per_step: int = 8
    micro_batch_rows: int = 4
    lower: int = 2
    blocks_in_tail: int = 2
    threads: int = 2
    """Compute threads of each side."""


@dataclass(frozen=True, kw_only=True)
class DemoFiles:
    """Where everything is."""

    folder: Path
    server_config: Path
    client_config: Path
    data: DataSettings
    """Training and held-out rows."""
    num_blocks: int


def prepare(
    folder: Path,
    model: Path,
    num_blocks: int,
    articles: Path,
    seed: int,
    size: DemoSize,
    tee: Mapping[str, object] | None = None,
) -> DemoFiles:
    """Write rows, keys and the server's settings; the client's need the server's address.

    Args:
        folder: a private folder of the demo's own.
        model: model folder, the same at both sides.
        num_blocks: of the model.
        articles: the asset bbcnews.
        seed: of the training rows.
        size: how much of it.
        tee: the server's section [tee]; None proves nothing.
    """
    data = topics(articles, seed, size.num_train, size.num_heldout)
    train, heldout = write_topics(data, folder / "data")
    keys = local(folder / "keys", ("client",))
    files = DemoFiles(
        folder=folder,
        server_config=folder / "server.toml",
        client_config=folder / "client.toml",
        data=topic_settings(train, heldout),
        num_blocks=num_blocks,
    )
    write_settings(_server_settings(files, model, keys.server, size, tee), files.server_config)
    return files


def client_settings(
    files: DemoFiles, model: Path, address: str, seed: int, size: DemoSize
) -> ClientSettings:
    """The owner's settings: the published noise, LoRA on every linear layer."""
    table = {
        "model": _model(files, model, size),
        "connection": {
            "address": address,
            "tls": member_files(files.folder / "keys" / "client").tls,
            "codec": "bf16",
        },
        "privacy": {"mechanism": "gaussian", "scale": 0.02},
        "run": {"folder": str(files.folder / "run")},
        "adapter": {"rank": 8, "alpha": 16, "seed": seed},
        # Held-out rows are scored before and after, not while training.
        "data": files.data.model_copy(update={"validation": None}).model_dump(),
        "train": {
            "epochs": 1,
            "rows_per_step": size.rows_per_step,
            "micro_batch_rows": size.micro_batch_rows,
            "in_flight": 2,
            "lr": 5e-4,
            "schedule": "cosine",
            "warmup_steps": 5,
            "seed": seed,
        },
        "sampling": {"max_new_tokens": 12, "stop": ["\n"]},
    }
    return parse_settings(ClientSettings, table, _WHERE)


def write_settings(settings: Settings, path: Path) -> None:
    """Save settings so that `--config` reads them."""
    write_atomic(path, settings_text(settings).encode())


def _server_settings(
    files: DemoFiles, model: Path, keys: Path, size: DemoSize, tee: Mapping[str, object] | None
) -> ServerSettings:
    table = {
        "model": _model(files, model, size),
        "listen": {"address": _LOOPBACK, "tls": member_files(keys).tls},
        "state": {"folder": str(files.folder / "server")},
        "revoked": str(member_files(keys).revoked),
        "health_port": 0,
        "drain_s": 5.0,
        **({} if tee is None else {"tee": tee}),
    }
    return parse_settings(ServerSettings, table, _WHERE)


def _model(files: DemoFiles, model: Path, size: DemoSize) -> dict[str, object]:
    return {
        "path": str(model),
        "lower": size.lower,
        "upper": files.num_blocks - size.blocks_in_tail,
        "threads": size.threads,
    }
