"""Real ledgers and boundaries in a temporary folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cutlayer.privacy.boundary import Boundary, BoundaryName
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.run_privacy import RunPrivacy, open_run_privacy
from cutlayer.wire.codec import get_codec

MakeBoundary = Callable[..., Boundary]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunPrivacy]:
    with open_run_privacy(tmp_path / "run", "run-1") as run:
        yield run


@pytest.fixture
def make_boundary(run: RunPrivacy) -> MakeBoundary:
    def make(
        mechanism: str = "gaussian",
        scale: float | None = 0.05,
        codec: str = "raw",
        name: BoundaryName = BoundaryName.ACTIVATIONS,
    ) -> Boundary:
        rule = MECHANISMS.make(mechanism, None if mechanism == "none" else scale)
        return Boundary(name, rule, get_codec(codec), run.ledger, run.secret)

    return make
