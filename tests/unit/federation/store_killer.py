"""Kill writers of a store again and again, and look at what they leave: run by `test_store`.

A process of its own, because it forks: `python -m tests.unit.federation.store_killer FOLDER KILLS`.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from cutlayer.federation.store import FederationStore
from tests.unit.federation.store_rounds import commit, is_whole


def main(folder: Path, num_kills: int) -> None:
    """Print the last acknowledged round after every kill; exit 1 if a store is not whole."""
    rng, acknowledged = random.Random(20261121), 0
    for _ in range(num_kills):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _write_until_killed(folder, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            seen = [pipe.readline() for _ in range(rng.randint(0, 2))]
            time.sleep(rng.uniform(0.0, 0.03))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            acknowledged = max([acknowledged, *map(int, [*seen, *pipe.read().split()])])
        with FederationStore(folder, "oncology") as store:
            if not is_whole(store, acknowledged):
                sys.exit(f"after round {acknowledged} the store is not whole")
    print(acknowledged)


def _write_until_killed(folder: Path, pipe: int) -> None:
    store = FederationStore(folder, "oncology")
    while True:
        number = store.round + 1
        attempt = store.last_attempt(number) + 1
        store.publish("a", number, {"loss": 1.0 / number})
        commit(store, number, attempt)
        os.write(pipe, f"{number}\n".encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
