"""Federations whose members are cut in different places, over one trunk of all blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from cutlayer import Client, ServerSettings, TrunkServer
from cutlayer.model.cut import Cut
from tests.federation_worlds import federation, lone_settings, owner_settings
from tests.tiny_models import tiny_model
from tests.worlds import Table, client_of, running_server, server_settings

__all__ = ["cut_owners", "eight_blocks", "lone_adapters", "mixed", "wide_server"]

NUM_BLOCKS = 8
SERVED = Cut(1, 7)


def eight_blocks(folder: Path) -> Path:
    """A tiny random llama with room for many cuts."""
    return tiny_model("llama", folder, num_hidden_layers=NUM_BLOCKS)[0]


def mixed(**changes: object) -> Table:
    """Rules of a federation whose members choose their cuts."""
    return federation(mixed_cuts=True, **changes)


def wide_server(model: Path, folder: Path, rules: Table | None, **batch: object) -> ServerSettings:
    """Settings of a server that holds blocks 1 to 7."""
    settings = server_settings(model, folder, federation=rules, batch=batch or None)
    part = settings.model.model_copy(update={"lower": SERVED.lower, "upper": SERVED.upper})
    return settings.model_copy(update={"model": part})


def cut_owners(
    server: TrunkServer,
    model: Path,
    folder: Path,
    cuts: Mapping[str, Sequence[int]],
    **changes: object,
) -> list[Client]:
    """Owners of these names and cuts, with 8, 12, 16 ... rows."""
    return [
        client_of(
            server,
            owner_settings(model, folder, name, 8 + 4 * number, **_cut(cut), **changes),
            name,
        )
        for number, (name, cut) in enumerate(cuts.items())
    ]


def lone_adapters(
    folder: Path, cuts: Mapping[str, Sequence[int]], num_steps: int = 2
) -> list[tuple[int, dict[str, Tensor]]]:
    """Scored tokens and whole adapter of each of the same owners, after training by itself."""
    folder.chmod(0o700)
    model, found = eight_blocks(folder), []
    with running_server(wide_server(model, folder, None)) as server:
        for number, (name, cut) in enumerate(cuts.items()):
            changes = {"train__steps": num_steps, "train__schedule": "constant", **_cut(cut)}
            settings = lone_settings(model, folder, name, 8 + 4 * number, **changes)
            with client_of(server, settings, name) as client:
                weight = sum(record.num_scored for record in client.train().history)
                client.export(folder / name / "adapter")
            file = folder / name / "adapter" / "adapter_model.safetensors"
            found.append((weight, load_file(file)))
    return found


def _cut(cut: Sequence[int]) -> dict[str, int]:
    return {"model__lower": cut[0], "model__upper": cut[1]}
