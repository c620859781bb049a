"""What the benchmark of the attested channel counts."""

from pathlib import Path

import pytest

from benchmarks.attested_channel import Plan, _result
from cutlayer.identity.provision import LocalFolders


def _plan() -> Plan:
    nowhere = Path("nowhere")
    return Plan(
        model=nowhere,
        kits=LocalFolders(authority=nowhere, server=nowhere, clients={}),
        policy=nowhere,
        machine=nowhere,
        rows=[[1] * 10] * 4,
        micro_batch_rows=2,
        steps=1,
        warmup=0,
        upper=2,
    )


def test_one_proof_per_interval_is_counted_against_the_channel() -> None:
    # Four calls of a step: 12 s more for four proofs are 3 s each, 1 % of 300 s.
    found = _result(_plan(), plain_s=[2.0, 2.0, 9.0], attested_s=[2.0] * 3, often_s=[14.0] * 3)
    assert found["proof_ms"] == pytest.approx(3000.0)
    assert found["channel_ratio"] == pytest.approx(1.0)
    assert found["throughput_ratio"] == pytest.approx(1 / 1.01)
    assert found["tokens_per_s_attested"] == pytest.approx(20.0)
    assert found["assurance"] == "SIMULATED"


def test_a_noisy_machine_makes_no_proof_cost_less_than_nothing() -> None:
    found = _result(_plan(), plain_s=[2.0], attested_s=[2.0], often_s=[1.0])
    assert found["proof_ms"] == 0.0
