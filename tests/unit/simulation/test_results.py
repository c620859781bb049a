"""What a simulation says at its end, as values."""

import json

import pytest

from cutlayer.errors import ProtocolError
from cutlayer.simulation.heldout import HeldOut
from cutlayer.simulation.results import OwnerResult, SimulationResult, Training, training_of

TRAINED = Training(
    loss_first=2.0,
    loss_last=1.0,
    num_tokens=100,
    seconds=3.5,
    bytes_up=10,
    bytes_down=20,
    guarantee="no noise: none",
)


def _score(accuracy: float) -> HeldOut:
    return HeldOut(accuracy=accuracy, loss=1.5, num_rows=40)


def _result(is_alone: bool) -> SimulationResult:
    owner = OwnerResult(
        name="movies",
        num_rows=48,
        before=_score(0.5),
        alone=_score(0.6) if is_alone else None,
        together=_score(0.7),
        trained_alone=TRAINED if is_alone else None,
        trained_together=TRAINED,
    )
    return SimulationResult(
        rounds=4,
        steps=20,
        strategy="fedavg",
        updates="masked",
        is_in_processes=False,
        seed=1,
        owners=[owner],
        seconds_by_phase={"preparation": 1.25, "training": 2.0},
    )


def test_values_are_json_with_accuracies_by_owner() -> None:
    values = json.loads(json.dumps(_result(is_alone=True).values()))
    assert (values["rounds"], values["clients"], values["seconds"]) == (4, 1, 3.25)
    assert values["accuracy_alone"] == {"movies": 0.6}
    assert values["accuracy_together"] == {"movies": 0.7}
    owner = values["owners"][0]
    assert (owner["rows"], owner["heldout_rows"], owner["loss_together"]) == (48, 40, 1.5)
    assert owner["together"]["bytes_down"] == 20
    assert owner["guarantee"] == "no noise: none"


def test_what_was_not_asked_for_is_left_empty() -> None:
    result = _result(is_alone=False)
    assert result.values()["accuracy_alone"] == {"movies": None}
    assert result.rows() == [("movies", "48", "0.500", "-", "0.700")]


def test_a_process_that_says_too_little_is_refused() -> None:
    said = {"num_tokens": 5, "seconds": 1.0, "bytes_up": 1, "bytes_down": 2, "loss_first": None}
    assert training_of(said).loss_last is None
    with pytest.raises(ProtocolError, match="bytes_up=None, a number is needed"):
        training_of({**said, "bytes_up": None})
