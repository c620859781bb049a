"""Training over the attested channel against plain mutual TLS: tokens per second, and one proof.

Clients of one process take turns after every step, and medians over the steps' ratios are compared,
so that other work on the machine meets all alike. A short run never reaches the default interval of
re-attestation (300 s), so a third client asks for proof before every call: what that adds to a step
gives the cost of one proof, and `throughput_ratio` counts one per interval. Evidence is simulated:
a TDX quote by software, 1 ms and 11 KB. A hardware quote costs the server tens of milliseconds.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from benchmarks.attested_client import Answer, Request
from benchmarks.isolate import run_isolated
from benchmarks.report import Arguments, Value, emit, median, parse_arguments, print_table, spread
from benchmarks.split import Setting, SplitRequest, SplitServer, make_kits
from benchmarks.subjects import equal_rows, subject_folder
from cutlayer.client.tee_settings import ClientTeeSettings
from cutlayer.identity.provision import LocalFolders
from cutlayer.storage.files import private_folder
from cutlayer.tee.synthetic_quoter import ROOT_FILE, SyntheticQuoter

__all__ = ["main"]

_OFTEN_S = 1e-6
"""Before every call."""
_CALLS_PER_MICRO_BATCH = 2
# Any software passes: a checkout that is edited meanwhile must not end the measurement.
_POLICY = """name = "benchmark"
platforms = ["simulated"]
least_assurance = "simulated"
roots = {{ simulated = "{root}" }}
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    model: Path
    kits: LocalFolders
    policy: Path
    machine: Path
    rows: list[list[int]]
    micro_batch_rows: int
    steps: int
    warmup: int
    upper: int

    @property
    def num_tokens(self) -> int:
        """Of one step."""
        return sum(map(len, self.rows))


@contextmanager
def serving(plan: Plan, threads: int, tee: dict[str, Setting] | None) -> Iterator[str]:
    """A trunk server process; its address."""
    extra = {} if tee is None else {"tee": tee}
    with SplitServer(plan.model, 2, plan.upper, plan.kits, threads, extra) as server:
        yield f"127.0.0.1:{server.port}"


def measure(plan: Plan, threads: int) -> dict[str, Value]:
    """Three clients in turn: plain, attested, and one that asks for proof before every call."""
    own: dict[str, Setting] = {"attester": {"source": "simulated", "folder": str(plan.machine)}}
    wish: dict[str, Setting] = {"policy": str(plan.policy)}
    often: dict[str, Setting] = {**wish, "reattest_s": _OFTEN_S}
    with serving(plan, threads, None) as plain, serving(plan, threads, own) as attested:
        clients = [
            _client(plan, plain, None),
            _client(plan, attested, wish),
            _client(plan, attested, often),
        ]
        request = Request(clients=clients)
        found = run_isolated(
            "benchmarks.attested_client", request, Answer, num_threads=threads, timeout_s=3600.0
        )
    plain_s, attested_s, often_s = (seconds[plan.warmup :] for seconds in found.seconds)
    _show(plain_s, attested_s, often_s)
    return _result(plan, plain_s, attested_s, often_s)


def _client(plan: Plan, address: str, tee: dict[str, Setting] | None) -> SplitRequest:
    return SplitRequest(
        address=address,
        model_folder=str(plan.model),
        lower=2,
        upper=plan.upper,
        kit=str(plan.kits.clients["owner"]),
        codec="bf16",
        rows=plan.rows,
        steps=plan.steps,
        micro_batch_rows=plan.micro_batch_rows,
        tee=tee,
    )


def _result(
    plan: Plan, plain_s: list[float], attested_s: list[float], often_s: list[float]
) -> dict[str, Value]:
    interval_s = ClientTeeSettings(policy=plan.policy).reattest_s
    num_proofs = _CALLS_PER_MICRO_BATCH * len(plan.rows) // plan.micro_batch_rows
    pairs = zip(often_s, attested_s, strict=True)
    proof_s = max(0.0, median([often - once for often, once in pairs])) / num_proofs
    channel = median([a / b for a, b in zip(plain_s, attested_s, strict=True)])
    return {
        "throughput_ratio": channel / (1 + proof_s / interval_s),
        "channel_ratio": channel,
        "every_call_ratio": median([a / b for a, b in zip(plain_s, often_s, strict=True)]),
        "proof_ms": 1000 * proof_s,
        "reattest_s": interval_s,
        "tokens_per_s_plain": plan.num_tokens / median(plain_s),
        "tokens_per_s_attested": plan.num_tokens / median(attested_s),
        "assurance": "SIMULATED",
    }


def _show(plain_s: list[float], attested_s: list[float], often_s: list[float]) -> None:
    named = [
        ("plain mutual TLS", plain_s),
        ("attested", attested_s),
        ("attested, a proof before every call", often_s),
    ]
    rows = [(name, spread(values)) for name, values in named]
    print_table("seconds of a training step", ("channel", "median (least to most)"), rows)


def _plan(arguments: Arguments, work: Path) -> Plan:
    model = subject_folder(arguments.model, is_smoke=arguments.is_smoke, work_folder=work)
    config = AutoConfig.from_pretrained(model)
    num_rows, length = (2, 16) if arguments.is_smoke else (4, 128)
    machine = private_folder(work / "machine")
    SyntheticQuoter.open(machine)
    policy = work / "policy.toml"
    policy.write_text(_POLICY.format(root=machine / ROOT_FILE), encoding="utf-8")
    return Plan(
        model=model,
        kits=make_kits(work / "kits"),
        policy=policy,
        machine=machine,
        rows=equal_rows(num_rows, length, config.vocab_size),
        micro_batch_rows=max(1, num_rows // 2),
        steps=8 if arguments.is_smoke else 40,
        warmup=2 if arguments.is_smoke else 4,
        upper=config.num_hidden_layers - 2,
    )


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        work.chmod(0o700)
        found = measure(_plan(arguments, work), arguments.threads[-1])
        emit({**found, "profile": arguments.profile}, arguments)


if __name__ == "__main__":
    main()
