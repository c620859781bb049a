"""False alarms of the client's checks in honest training, and what they cost.

`python -m benchmarks.honest_alarms --json`. Server and client are one process over a loopback that
encodes every frame; rows are random. It does not attack: that is tests/integration's.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from benchmarks.report import Arguments, emit, parse_arguments, print_table
from benchmarks.subjects import ragged_rows, write_text_llama
from cutlayer import Client, ClientSettings, ServerSettings, TrunkServer
from cutlayer.client.train import TrainingData
from cutlayer.data.batches import BatchPlan
from cutlayer.data.template import Example
from cutlayer.errors import PeerMisbehaved
from cutlayer.settings import parse_settings
from cutlayer.wire.channel import LoopbackChannel, Peer

__all__ = ["SCENES", "SceneResult", "main", "run_scene"]

_PEER = Peer(name="owner", roles=frozenset({"train"}), serial=None, address="loopback")
_LENGTHS = [5, 9, 14, 22, 31, 7, 12, 40, 18, 26, 3, 11]

Section = dict[str, object]

SCENES: dict[str, Mapping[str, Section]] = {
    "plain": {},
    "ten times the rate": {"train": {"lr": 0.02, "schedule": "constant"}},
    "noise": {"privacy": {"mechanism": "gaussian", "scale": 0.05}},
    "noise on gradients": {
        "privacy": {
            "mechanism": "gaussian",
            "scale": 0.02,
            "gradient_mechanism": "gaussian",
            "gradient_scale": 0.001,
        }
    },
    "bf16, one row a call": {"connection": {"codec": "bf16"}, "train": {"micro_batch_rows": 1}},
    "fp8, frozen head": {"connection": {"codec": "fp8"}, "adapter": {"parts": ["trunk", "tail"]}},
}
"""What moves the numbers, each over a fifth or so of all steps."""


class SceneResult(msgspec.Struct, frozen=True, kw_only=True):
    """One honest run."""

    steps: int
    alarms: int
    spot_checks: int
    checks_share: float
    """Time of the checks without recomputing, as a share of the run."""
    alarm: str | None


def main(arguments: list[str] | None = None) -> None:
    """Run all scenes and print."""
    chosen = parse_arguments(__doc__ or "", arguments)
    num_steps = 4 if chosen.is_smoke else 170
    results = dict(_results(num_steps))
    _show(chosen, results)


def run_scene(folder: Path, scene: Mapping[str, Section], num_steps: int) -> SceneResult:
    """Train honestly with all checks on.

    Args:
        folder: for the model and both sides' state.
        scene: sections that differ from the usual settings.
        num_steps: optimizer steps.
    """
    model = write_text_llama(folder / "model")
    settings = _client_settings(model, folder, scene, num_steps)
    server = TrunkServer(_server_settings(model, folder))
    alarm = None
    started_s = time.perf_counter()
    try:
        with Client(settings, connect=lambda: LoopbackChannel(server, _PEER)) as client:
            seconds = _timed(client)
            try:
                _train(client, num_steps)
            except PeerMisbehaved as error:
                alarm = str(error)
            num_spot_checks = client.trunk.checks.num_spot_checks
    finally:
        server.stop(grace_s=0)
    whole_s = time.perf_counter() - started_s
    return SceneResult(
        steps=num_steps,
        alarms=int(alarm is not None),
        spot_checks=num_spot_checks,
        checks_share=sum(seconds) / whole_s,
        alarm=alarm,
    )


def _results(num_steps: int) -> Iterator[tuple[str, SceneResult]]:
    for name, scene in SCENES.items():
        with tempfile.TemporaryDirectory() as folder:
            yield name, run_scene(Path(folder), scene, num_steps)


def _timed(client: Client) -> list[float]:
    """Seconds of each check of a reply from now on."""
    checks, seconds = client.trunk.checks, [0.0]
    forward, backward = checks.forward, checks.backward

    def timed_forward(*call: object) -> None:
        started_s = time.perf_counter()
        forward(*call)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - started_s)

    def timed_backward(*call: object) -> None:
        started_s = time.perf_counter()
        backward(*call)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - started_s)

    checks.forward, checks.backward = timed_forward, timed_backward  # type: ignore[method-assign]
    return seconds


def _train(client: Client, num_steps: int) -> None:
    assert client.settings.train is not None
    rows = ragged_rows(_LENGTHS * 2, vocab_size=256)
    examples = [
        Example(tokens=row, labels=[-100, *row[1:]], row_id=number)
        for number, row in enumerate(rows)
    ]
    plan = BatchPlan(
        num_rows=len(examples),
        rows_per_step=6,
        steps=num_steps,
        micro_batch_rows=client.settings.train.micro_batch_rows,
    )
    data = TrainingData(train=examples[4:] + examples[:4], validation=examples[:4], plan=plan)
    client.trainer(data, client.settings.train).run()


def _server_settings(model: Path, folder: Path) -> ServerSettings:
    table = {
        "model": {"path": str(model), "lower": 1, "upper": 5},
        "listen": {"address": "127.0.0.1:0", "plaintext": True},
        "state": {"folder": str(folder / "server")},
    }
    return parse_settings(ServerSettings, table, "benchmark server")


def _client_settings(
    model: Path, folder: Path, scene: Mapping[str, Section], num_steps: int
) -> ClientSettings:
    table: dict[str, Section] = {
        "model": {"path": str(model), "lower": 1, "upper": 5},
        "connection": {"address": "127.0.0.1:1", "plaintext": True, "codec": "raw"},
        "privacy": {"mechanism": "none"},
        "run": {"folder": str(folder / "run")},
        "adapter": {"rank": 4, "alpha": 8},
        "train": {
            "steps": num_steps,
            "rows_per_step": 6,
            "micro_batch_rows": 2,
            "lr": 2e-3,
            "eval_every": 25,
        },
        "checks": {"spot_check_every": 10},
    }
    for name, changes in scene.items():
        table[name] = {**table[name], **changes}
    return parse_settings(ClientSettings, table, "benchmark client")


def _show(chosen: Arguments, results: Mapping[str, SceneResult]) -> None:
    print_table(
        "Honest training with all checks on",
        ["scene", "steps", "alarms", "rows recomputed", "checks, %"],
        [
            [name, r.steps, r.alarms, r.spot_checks, round(100 * r.checks_share, 2)]
            for name, r in results.items()
        ],
    )
    emit(
        {
            "steps": sum(r.steps for r in results.values()),
            "alarms": sum(r.alarms for r in results.values()),
            "spot_checks": sum(r.spot_checks for r in results.values()),
            "messages": "; ".join(r.alarm for r in results.values() if r.alarm is not None),
        },
        chosen,
    )


if __name__ == "__main__":
    main()
