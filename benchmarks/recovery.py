"""Kill -9 the client and the server at random moments; the run must end as if nothing happened.

Real processes, mutual TLS, a tiny random model, gaussian noise. It does not measure speed.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cutlayer.client.run_state import Progress, StepRecord
from cutlayer.identity.provision import local, member_files
from cutlayer.privacy.boundary import BoundaryName
from cutlayer.privacy.run_privacy import SECRET_FILE
from cutlayer.storage.files import private_folder, read_private, write_atomic
from cutlayer.storage.log import read_log
from cutlayer.storage.steps import StepStore
from cutlayer.wire.messages import Backward, Forward
from cutlayer.wire.recording import open_recording

_EXIT_S = 240.0


@dataclass(frozen=True, kw_only=True)
class World:
    """One run: a server folder, a client folder, a recording of each client process."""

    folder: Path
    port: int
    num_steps: int

    @property
    def client_toml(self) -> Path:
        """Settings of the owner."""
        return self.folder / "client.toml"

    @property
    def server_toml(self) -> Path:
        """Settings of the trunk server."""
        return self.folder / "server.toml"

    @property
    def recordings(self) -> list[Path]:
        """In the order in which the processes started."""
        return sorted(self.folder.glob("*.recording"))


@dataclass
class Outcome:
    """What the killed run ended with, against the uninterrupted one."""

    kills: int
    lost_steps: int
    double_steps: int
    bit_equal: bool
    ledger_short: int
    replayed_frames: int
    seconds: float = field(default=0.0)


def make_world(folder: Path, model: Path, num_steps: int) -> World:
    """Certificates, rows and both settings files in a new folder."""
    folder.mkdir(mode=0o700)
    kits = local(folder / "kits", names=("clinic",))
    world = World(folder=folder, port=_free_port(), num_steps=num_steps)
    rows = [
        {"text": "ab" * (1 + index % 5), "topic": ("law", "art")[index % 2]} for index in range(64)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server, client = member_files(kits.server), member_files(kits.clients["clinic"])
    world.server_toml.write_text(
        f"""
[model]
path = "{model}"
lower = 1
upper = 3
threads = 1
[listen]
address = "127.0.0.1:{world.port}"
[listen.tls]
certificate = "{server.certificate}"
key = "{server.key}"
authority = "{server.authority}"
[state]
folder = "{folder / "server"}"
"""
    )
    world.client_toml.write_text(
        f"""
[model]
path = "{model}"
lower = 1
upper = 3
threads = 1
[connection]
address = "localhost:{world.port}"
codec = "raw"
[connection.tls]
certificate = "{client.certificate}"
key = "{client.key}"
authority = "{client.authority}"
[privacy]
mechanism = "gaussian"
scale = 0.02
[run]
folder = "{folder / "client"}"
[adapter]
rank = 4
alpha = 8
[data]
train = "{data}"
prompt_template = "{{text}}:"
completion_template = " {{topic}}"
chat_template = false
[train]
steps = {num_steps}
rows_per_step = 4
micro_batch_rows = 2
lr = 0.005
save_every = 4
"""
    )
    return world


def share_secret(first: World, second: World) -> None:
    """Give the second run the first one's noise, so that their losses can be compared."""
    folder = private_folder(second.folder / "client")
    secret = read_private(first.folder / "client" / SECRET_FILE)
    write_atomic(folder / SECRET_FILE, secret)


def make_model(folder: Path) -> Path:
    """A tiny random llama with a byte-level tokenizer."""
    from tests.tiny_models import save_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=264, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def start_client(world: World) -> subprocess.Popen[bytes]:
    """A client whose frames are recorded, each process's in its own file."""
    recording = world.folder / f"{len(world.recordings):03d}.recording"
    log = world.folder / "client.log"
    return start("train", world.client_toml, log, "--record", str(recording))


def start(command: str, settings: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """A real `cutlayer` process whose output goes to a log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("ab") as out:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cutlayer.cli.main",
                command,
                "--config",
                str(settings),
                *options,
            ],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env=environment,
        )


def run_whole(world: World) -> float:
    """The uninterrupted run; how many seconds the client took."""
    server = start("serve", world.server_toml, world.folder / "server.log")
    begin_s = time.monotonic()
    try:
        client = start_client(world)
        _expect_success(client, world)
    finally:
        server.terminate()
        server.wait(_EXIT_S)
    return time.monotonic() - begin_s


def run_killed(world: World, num_kills: int, longest_s: float, seed: int) -> int:
    """Kill until `num_kills` have met a living process or the run is done; how many did."""
    moments = random.Random(seed)
    sides = [index % 2 == 0 for index in range(num_kills)]
    moments.shuffle(sides)
    server = start("serve", world.server_toml, world.folder / "server.log")
    client = start_client(world)
    kills = 0
    try:
        for is_client in sides:
            if _wait_for_end(client, moments.uniform(0.0, longest_s)):
                break
            victim = client if is_client else server
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            kills += 1
            if is_client:
                client = start_client(world)
            else:
                server = start("serve", world.server_toml, world.folder / "server.log")
        _expect_success(client, world)
    finally:
        for process in (client, server):
            process.kill()
            process.wait()
    return kills


def compare(killed: World, whole: World, kills: int) -> Outcome:
    """Histories, adapters on both sides, and what was sent against what the ledger says."""
    history = _history(killed)
    steps = [record.step for record in history]
    wanted = set(range(1, killed.num_steps + 1))
    sent, replayed = _sent_vectors(killed.recordings)
    accounted = _accounted_vectors(killed.folder / "client" / "ledger.jsonl")
    short = sum(max(0, sent[name] - accounted.get(name, 0)) for name in sent)
    return Outcome(
        kills=kills,
        lost_steps=len(wanted - set(steps)),
        double_steps=len(steps) - len(set(steps)),
        bit_equal=history == _history(whole) and _weights(killed) == _weights(whole),
        ledger_short=short,
        replayed_frames=replayed,
    )


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", choices=("smoke", "standard"), default="standard")
    arguments = parser.parse_args()
    kills = min(arguments.kills, 4) if arguments.profile == "smoke" else arguments.kills
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        whole = make_world(folder / "whole", model, 80 * kills)
        whole_s = run_whole(whole)
        killed = make_world(folder / "killed", model, 80 * kills)
        share_secret(whole, killed)
        longest_s = min(1.5 * whole_s, 10.0)
        done = run_killed(killed, kills, longest_s, arguments.seed)
        outcome = compare(killed, whole, done)
    outcome.seconds = round(time.monotonic() - begin_s, 1)
    for key, value in vars(outcome).items():
        print(f"{key:>16}  {value}")
    print(json.dumps(vars(outcome)))


def _history(world: World) -> list[StepRecord]:
    store = StepStore(world.folder / "client" / "steps")
    files = store.load(world.num_steps)
    return msgspec.json.decode(files["progress.json"], type=Progress).history


def _weights(world: World) -> list[bytes]:
    """Every saved tensor of the last step, on both sides."""
    server_runs = world.folder / "server" / "runs" / "clinic"
    stores = [StepStore(world.folder / "client" / "steps")]
    stores += [StepStore(run) for run in sorted(server_runs.iterdir())]
    files = [store.load(world.num_steps) for store in stores]
    return [file[name] for file in files for name in sorted(file) if name.endswith(".safetensors")]


def _sent_vectors(recordings: Sequence[Path]) -> tuple[dict[str, int], int]:
    """Vectors of different content that were recorded before they were sent, by gate."""
    seen: set[bytes] = set()
    vectors = {str(BoundaryName.ACTIVATIONS): 0, str(BoundaryName.GRADIENTS): 0}
    replayed = 0
    gates = {Forward: ("h", BoundaryName.ACTIVATIONS), Backward: ("grad", BoundaryName.GRADIENTS)}
    for path in recordings:
        # A process that is killed leaves its recording without an end.
        for recorded in open_recording(path, accepts_truncated=True).frames():
            if not recorded.is_sent or type(recorded.frame.header) not in gates:
                continue
            name, gate = gates[type(recorded.frame.header)]
            packed = recorded.frame.tensors[name]
            content = b"".join(bytes(buffer) for buffer in packed.buffers)
            if content in seen:
                replayed += 1
            else:
                seen.add(content)
                vectors[str(gate)] += packed.shape[0]
    return vectors, replayed


def _accounted_vectors(ledger: Path) -> dict[str, int]:
    totals: dict[str, int] = {}
    for record in read_log(ledger):
        boundary = str(record["boundary"])
        totals[boundary] = totals.get(boundary, 0) + int(str(record["vectors"]))
    return totals


def _wait_for_end(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return process.returncode == 0


def _expect_success(client: subprocess.Popen[bytes], world: World) -> None:
    if client.wait(_EXIT_S) != 0:
        log = (world.folder / "client.log").read_text(errors="replace")
        raise SystemExit(f"the client failed:\n{log[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
