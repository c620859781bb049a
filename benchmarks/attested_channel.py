"""Training over the attested channel against plain mutual TLS: tokens per second, and one proof.

Both servers run; client processes take turns with them, and medians of pairs are compared. A short
run never reaches the default interval of re-attestation (300 s), so a third client asks for proof
before every call: what that adds to a step gives the cost of one proof, and `throughput_ratio`
counts one per interval. Evidence is simulated: a TDX quote by software, 13 ms and 11 KB. A hardware
quote costs the server more (tens of milliseconds), as often.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from benchmarks.link import LINK_PROFILES, DelayingProxy
from benchmarks.report import Arguments, Value, emit, median, parse_arguments, print_table, spread
from benchmarks.split import Setting, SplitRequest, SplitServer, make_kits, run_client
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
    repeats: int
    upper: int

    @property
    def num_tokens(self) -> int:
        """Of one step."""
        return sum(map(len, self.rows))


class Side:
    """A server with or without evidence, and clients that train with it one after the other."""

    def __init__(self, plan: Plan, proxy: DelayingProxy, threads: int) -> None:
        self._plan, self._proxy, self._threads = plan, proxy, threads

    def seconds(self, tee: dict[str, Setting] | None) -> float:
        """Median seconds of a step of one client process."""
        plan = self._plan
        request = SplitRequest(
            address=self._proxy.address,
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
        result, _ = run_client(request, self._proxy, self._threads)
        return median(result.seconds, skip=plan.warmup)


@contextmanager
def serving(plan: Plan, threads: int, tee: dict[str, Setting] | None) -> Iterator[Side]:
    """A trunk server process and a proxy before it."""
    extra = {} if tee is None else {"tee": tee}
    with (
        SplitServer(plan.model, 2, plan.upper, plan.kits, threads, extra) as server,
        DelayingProxy(server.port, LINK_PROFILES["loopback"]) as proxy,
    ):
        yield Side(plan, proxy, threads)


def measure(plan: Plan, threads: int) -> dict[str, Value]:
    """Pairs of client processes, and what one proof costs."""
    own: dict[str, Setting] = {"attester": {"source": "simulated", "folder": str(plan.machine)}}
    wish: dict[str, Setting] = {"policy": str(plan.policy)}
    with ExitStack() as stack:
        plain = stack.enter_context(serving(plan, threads, None))
        attested = stack.enter_context(serving(plan, threads, own))
        plain_s, attested_s, often_s = [], [], []
        for _ in range(plan.repeats):
            plain_s.append(plain.seconds(None))
            attested_s.append(attested.seconds(wish))
            often_s.append(attested.seconds({**wish, "reattest_s": _OFTEN_S}))
    _show(plain_s, attested_s, often_s)
    return _result(plan, plain_s, attested_s, often_s)


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
        steps=4 if arguments.is_smoke else 8,
        warmup=1 if arguments.is_smoke else 2,
        repeats=1 if arguments.is_smoke else 5,
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
