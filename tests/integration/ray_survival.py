"""Replicas as real Ray actors: they serve, one is killed, another takes over.

A program of its own: Ray forks the process that starts it, and a fork of one that has run threads
for minutes, as the tests' process has, may wait for ever on a lock that nobody holds any more.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cutlayer import Client
from cutlayer.client.train import Report
from cutlayer.identity.provision import local, member_files
from cutlayer.server.front import TrunkFront
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.wire.endpoints import ConnectionSettings
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

TRAINING = {"train__steps": 8, "train__save_every": 2}


@contextmanager
def _fronting(model: Path, folder: Path, kit: Path) -> Iterator[TrunkFront]:
    table = {
        "model": {"path": str(model), "lower": 1, "upper": 3},
        "listen": {"address": "127.0.0.1:0", "tls": _tls(kit)},
        "state": {"folder": str(folder / "front")},
        "replicas": {
            "count": 2,
            "engine": "ray",
            "threads": 1,
            "ray_cpus": 0.1,
            "restart_delay_s": 0.1,
        },
    }
    front = TrunkFront(parse_settings(ServerSettings, table, "test front"))
    try:
        front.start()
        yield front
    finally:
        front.stop(grace_s=0)


def _tls(kit: Path) -> dict[str, str]:
    files = member_files(kit)
    return {name: str(getattr(files, name)) for name in ("certificate", "key", "authority")}


def main(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    kits = local(private_folder(tmp_path / "kits"), names=("clinic",))
    alone = private_folder(tmp_path / "alone")
    with (
        running_server(server_settings(model, alone)) as server,
        client_of(server, client_settings(model, alone, **TRAINING)) as client,
    ):
        expected = client.train().history
    with _fronting(model, tmp_path, kits.server) as front:
        connection = ConnectionSettings.model_validate(
            {
                "address": f"127.0.0.1:{front.port}",
                "tls": _tls(kits.clients["clinic"]),
                "codec": "raw",
                "connect_timeout_s": 2.0,
            }
        )
        own = client_settings(model, private_folder(tmp_path / "clinic"), **TRAINING)

        def kill(report: Report) -> None:
            serving = next(r for r in front.replicas() if r.clients)
            if report.record.step == 5 and serving.num_restarts == 0 and serving.index == 0:
                assert serving.pid is not None
                os.kill(serving.pid, signal.SIGKILL)

        with Client(own.model_copy(update={"connection": connection})) as client:
            assert client.train(kill).history == expected
        assert [r.clients for r in front.replicas()] == [(), ("clinic",)]
        give_up_s = time.monotonic() + 40
        while front.replicas()[0].pid is None:
            assert time.monotonic() < give_up_s
            time.sleep(0.1)
        assert front.replicas()[0].num_restarts == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
