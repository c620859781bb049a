"""One process of a tensor-parallel trunk that a test breaks; see `test_tensor_parallel_faults`.

Rank 0 computes once, says "ready", waits for a line, computes again and says what happened.
"""

import json
import sys
import time
from pathlib import Path

import torch

from cutlayer.errors import TransportError
from cutlayer.model.partition import Cut, Trunk
from cutlayer.model.rows import Rows
from cutlayer.server.tensor_parallel import (
    follow,
    is_follower,
    parallel_trunk,
    stop_followers,
    when_lost,
)


def lead(trunk: Trunk) -> dict[str, object]:
    """What the leader's calls gave."""
    reasons: list[str] = []
    when_lost(trunk, reasons.append)
    h_ND, rows = torch.ones(5, trunk.hidden_size), Rows(lengths=(5,))
    with torch.no_grad():
        trunk(h_ND, rows)
        print("ready", flush=True)
        sys.stdin.readline()
        waits_s, errors = [], []
        for _ in range(2):
            began_s = time.monotonic()
            try:
                trunk(h_ND, rows)
            except TransportError as error:
                errors.append(str(error))
            waits_s.append(time.monotonic() - began_s)
    stop_followers(trunk)
    return {"waits_s": waits_s, "errors": errors, "reasons": reasons}


def main(folder: Path, timeout_s: float) -> None:
    """Lead or follow."""
    trunk = parallel_trunk(folder, Cut(1, 3), timeout_s=timeout_s)
    if is_follower():
        try:
            follow(trunk)
        except TransportError as error:
            print(json.dumps({"error": str(error)}), flush=True)
    else:
        print(json.dumps(lead(trunk)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), float(sys.argv[2]))
