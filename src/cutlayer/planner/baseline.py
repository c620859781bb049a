"""A client process without a model: `python -m cutlayer.planner.baseline` prints what it holds.

It imports what a client imports and runs a step and a token of a model of a few bytes, so that what
libraries allocate at their first use is there too.
"""

import os
import subprocess
import sys
from pathlib import Path

import cutlayer.client.client  # noqa: F401  # for its memory
from cutlayer.errors import ConfigError

__all__ = ["main", "measure_baseline", "peak_resident_bytes"]

_TIMEOUT_S = 120.0


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far.

    Raises:
        ConfigError: the system does not tell.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("memory of a process is measured on Linux alone; see /proc") from error
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/self/status has no VmHWM, so memory cannot be measured here")


def measure_baseline(threads: int | None) -> int:
    """Bytes that such a process holds.

    Args:
        threads: compute threads; None leaves the choice to torch.

    Raises:
        ConfigError: it cannot be started or measured.
    """
    more = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "cutlayer.planner.baseline"]
    try:
        found = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, **more},
            check=True,
        )
        return int(found.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ConfigError(
            f"cannot measure an empty client process here ({error}); give --baseline-memory"
        ) from error


def main() -> None:
    """Be such a process."""
    import torch
    from transformers import LlamaConfig

    from cutlayer.planner.rehearsal import rehearse
    from cutlayer.planner.workload import Workload

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    rehearse(config, Workload(mean_length=16, rows_per_step=1, prompt_tokens=8), 1, 0.0)
    print(peak_resident_bytes())


if __name__ == "__main__":
    main()
