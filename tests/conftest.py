"""Test-wide ground: one torch thread, passive OpenMP waiting, and `--require-system`.

It does not hold fixtures of any one room.
"""

import os
import sys
from collections.abc import Generator
from pathlib import Path

# Before torch is imported: spinning OpenMP barriers slow every other process of a small machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What `make setup` keeps apart from other processes, as its import takes a second.
sys.path.append(str(Path(sys.prefix) / "beside"))

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register `--require-system`."""
    parser.addoption(
        "--require-system",
        action="store_true",
        help="a skip of a test marked `system` is a failure",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of a `system` test into a failure where the run requires them."""
    report = yield
    required = item.config.getoption("--require-system") and item.get_closest_marker("system")
    if required and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped under --require-system: {report.longrepr}"
    return report
