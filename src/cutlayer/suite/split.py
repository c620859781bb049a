"""One owner and a trunk server train on all rows: the product itself, and what it costs.

Both are threads of this process over frames that are really encoded or, to measure the owner's
memory, processes over mutual TLS. Scores are taken by a fresh client on the trained run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cutlayer.client.client import Client
from cutlayer.client.settings import ClientSettings
from cutlayer.evaluation.published.task_files import TaskFolder
from cutlayer.identity.provision import local, member_files
from cutlayer.settings import parse_settings
from cutlayer.simulation.processes import serving
from cutlayer.simulation.settings_text import settings_text
from cutlayer.storage.files import private_folder, write_atomic
from cutlayer.suite.compute import Compute
from cutlayer.suite.owner_process import Trained, train_in_own_process
from cutlayer.suite.recipe import open_model
from cutlayer.suite.result import Figures
from cutlayer.suite.sides import (
    Answers,
    Place,
    answers,
    check_test,
    history_of,
    loopback_world,
    owner_settings,
    server_settings,
)
from cutlayer.suite.spec import RunSpec

__all__ = ["run_split"]

_OWNER = "client"


def run_split(
    spec: RunSpec, task: TaskFolder, folder: Path, compute: Compute, cache: Path | None
) -> Figures:
    """Train and score.

    Args:
        spec: the run.
        task: rows to learn and to score.
        folder: state of both sides goes below it.
        compute: threads and device of each side.
        cache: of assets and converted models; None is the usual one.

    Raises:
        CutlayerError: whatever went wrong at either side.
    """
    check_test(task)
    place = Place(folder=private_folder(folder), model=open_model(spec, cache), compute=compute)
    owner = owner_settings(spec, task, place)
    run = _by_processes if spec.in_processes else _by_threads
    trained, scored = run(spec, task, place, owner)
    return Figures(
        predictions=scored.predictions,
        losses=tuple(record.loss for record in history_of(owner.run)),
        train_seconds=trained.seconds,
        score_seconds=scored.seconds,
        num_train_tokens=trained.num_tokens,
        bytes_up=trained.bytes_up,
        bytes_down=trained.bytes_down,
        peak_client_bytes=trained.peak_bytes,
        guarantee=trained.guarantee,
    )


def _by_threads(
    spec: RunSpec, task: TaskFolder, place: Place, owner: ClientSettings
) -> tuple[Trained, Answers]:
    owners = {_OWNER: owner}
    with loopback_world(server_settings(spec, place)) as world:
        training = world.train(owners, "alone")[_OWNER]
        bytes_up, bytes_down = world.num_bytes
        with world.clients(owners) as clients:
            scored = answers(clients[_OWNER], task)
    trained = Trained(
        num_tokens=training.num_tokens,
        seconds=training.seconds,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        guarantee=training.guarantee,
    )
    return trained, scored


def _by_processes(
    spec: RunSpec, task: TaskFolder, place: Place, owner: ClientSettings
) -> tuple[Trained, Answers]:
    with _served(spec, place, owner) as reaching:
        trained = train_in_own_process(reaching, place.folder)
        with Client(reaching) as client:
            return trained, answers(client, task)


@contextmanager
def _served(spec: RunSpec, place: Place, owner: ClientSettings) -> Iterator[ClientSettings]:
    """A server as a process; the owner's settings, now that its address is known."""
    keys = local(place.folder / "keys", [_OWNER])
    server = member_files(keys.server)
    settings = server_settings(spec, place, {"tls": server.tls})
    settings = settings.model_copy(update={"revoked": server.revoked})
    config = place.folder / "server.toml"
    write_atomic(config, settings_text(settings).encode())
    with serving(config, place.folder) as process:
        connection = {
            "address": process.address,
            "codec": spec.codec,
            "tls": member_files(keys.clients[_OWNER]).tls,
        }
        table = {**owner.model_dump(), "connection": connection}
        yield parse_settings(ClientSettings, table, "the owner's process")
