"""The demo's attested scene: a trunk that proves what it runs, and owners who refuse others.

All evidence is SIMULATED: a quote by software under a root of the demo's own. It shows the order of
things, and proves nothing about this machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cutlayer.client.client import Client
from cutlayer.client.settings import ClientSettings
from cutlayer.demo.processes import serving, train_in_process
from cutlayer.demo.run import DemoInputs
from cutlayer.demo.setup import DemoSize, client_settings, prepare, write_settings
from cutlayer.errors import AttestationError, ProtocolError
from cutlayer.model.folder import resolve_model
from cutlayer.settings import parse_settings
from cutlayer.simulation.phases import PhaseClock
from cutlayer.storage.files import private_folder, write_atomic
from cutlayer.tee.evidence import Platform
from cutlayer.tee.policy_file import reference_claims, render_policy
from cutlayer.tee.synthetic_quoter import ROOT_FILE, SyntheticQuoter

__all__ = ["ATTESTED_SIZE", "AttestedReport", "Refused", "run_attested"]

ATTESTED_SIZE = DemoSize(num_train=40, num_heldout=10)
"""Five steps: the scene is about the door, not about the task."""

_MACHINE = "machine"
_OTHER_SOFTWARE = {"mr_td": "00" * 48}


@dataclass(frozen=True, kw_only=True)
class Refused:
    """One owner whose policy this server does not satisfy."""

    policy: str
    refusal: str
    """Name of the reason."""
    bytes_sent: int
    """Of frames, to the server."""


@dataclass(frozen=True, kw_only=True)
class AttestedReport:
    """What happened."""

    assurance: str
    training: Mapping[str, object]
    """Result of `cutlayer train --json` under the policy that fits."""
    refused: tuple[Refused, ...]
    seconds_by_phase: Mapping[str, float]


def run_attested(inputs: DemoInputs, say: Callable[[str], None]) -> AttestedReport:
    """Run the scene; the server is gone when this returns or raises.

    Raises:
        ProtocolError: a server that does not satisfy a policy was used all the same.
        CutlayerError: whatever else went wrong on either side.
    """
    clock = PhaseClock(say)
    clock.begin("preparation", "making keys, a simulated machine and three policies (SIMULATED)")
    model = resolve_model(inputs.model, cache_folder=inputs.cache)
    files = prepare(
        inputs.folder,
        model.path,
        model.config.num_hidden_layers,
        inputs.articles,
        inputs.seed,
        inputs.size,
        {"attester": {"source": "simulated", "folder": str(inputs.folder / _MACHINE)}},
    )
    accepted, others = _policies(files.folder)
    clock.begin("server start", "starting a trunk server that attests itself")
    with serving(files.server_config, files.folder) as server:
        open_settings = client_settings(files, model.path, server.address, inputs.seed, inputs.size)
        clock.begin("training", "training under the policy that names this software")
        good = _under(open_settings, accepted)
        write_settings(good, files.client_config)
        training = train_in_process(files.client_config)
        clock.begin("refusals", "trying it with policies that it does not satisfy")
        refused = tuple(
            _refused(name, _under(open_settings, path, path.with_suffix(".run")))
            for name, path in others.items()
        )
    clock.stop()
    return AttestedReport(
        assurance=str(training.get("assurance")),
        training=training,
        refused=refused,
        seconds_by_phase=clock.seconds_by_phase,
    )


def _policies(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The one that fits, and the others by what they accept; written as the command does."""
    machine, other = (private_folder(folder / name) for name in (_MACHINE, "other-machine"))
    SyntheticQuoter.open(machine)
    SyntheticQuoter.open(other)
    return _policy(folder / "policy.toml", machine, {}), {
        "other software": _policy(folder / "other-software.toml", machine, _OTHER_SOFTWARE),
        "another vendor's root": _policy(folder / "other-root.toml", other, {}),
    }


def _policy(path: Path, machine: Path, values: Mapping[str, str]) -> Path:
    claims = reference_claims(None, values, is_named_root=True)
    roots = {Platform.SIMULATED: machine / ROOT_FILE}
    text = render_policy(path.stem, claims, values, roots, path.parent)
    write_atomic(path, text.encode())
    return path


def _under(settings: ClientSettings, policy: Path, run: Path | None = None) -> ClientSettings:
    """The same owner with a policy, and with another run folder if one is given."""
    table = settings.model_dump(mode="json")
    table["tee"] = {"policy": str(policy)}
    if run is not None:
        table["run"]["folder"] = str(run)
    return parse_settings(ClientSettings, table, "the demo's settings")


def _refused(name: str, settings: ClientSettings) -> Refused:
    with Client(settings) as client:
        try:
            client.train()
        except AttestationError as error:
            sent = client.trunk.bytes_sent
            return Refused(policy=name, refusal=error.refusal, bytes_sent=sent)
    raise ProtocolError(f"the policy for {name} was not satisfied and training went on")
