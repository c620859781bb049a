"""`cutlayer placement`: who runs which blocks, who sees what, checked before anything leaves."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption
from cutlayer.cli.output import Output

if TYPE_CHECKING:
    from cutlayer.client.placement_view import HopView
    from cutlayer.model.chain import Placement

__all__ = ["placement"]


def placement(config: ConfigOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Print and check a placement: blocks, certificates, evidence, noise, and who sees what."""
    found, hops = _told(config, set_ or ())
    out = Output(as_json)
    out.say(f"{found.shape}: each of {found.num_blocks} blocks has one place")
    for number, hop in enumerate(hops):
        _print_hop(out, number, hop)
    if len([hop for hop in hops if hop.address is not None]) > 1:
        out.say(
            "the owner relays between the hosts and tells none of them of the others; together "
            "they hold all that each of them sees"
        )
    if found.shares_labels:
        out.warn(
            f"labels and the distribution of the text are visible at {hops[-1].address}, which "
            "proves nothing"
        )
    out.result(
        {
            "shape": found.shape,
            "num_blocks": found.num_blocks,
            "shares_labels": found.shares_labels,
            "hops": [hop.as_json() for hop in hops],
        }
    )


def _told(config: Path, overrides: Sequence[str]) -> "tuple[Placement, tuple[HopView, ...]]":
    from cutlayer.client.placement_view import told_placement
    from cutlayer.client.settings import ClientSettings
    from cutlayer.enclave.owner_settings import EnclaveClientSettings
    from cutlayer.enclave.placement_view import told_enclave_placement
    from cutlayer.model.folder import resolve_model
    from cutlayer.settings import load_settings

    if _is_of_an_enclave(config):
        owner = load_settings(EnclaveClientSettings, config, overrides)
        folder = resolve_model(owner.model.path, owner.model.revision)
        return told_enclave_placement(owner, int(folder.config.num_hidden_layers))
    client = load_settings(ClientSettings, config, overrides)
    folder = resolve_model(client.model.path, client.model.revision)
    return told_placement(client, int(folder.config.num_hidden_layers))


def _is_of_an_enclave(config: Path) -> bool:
    """By its keys; a malformed file is explained when it is loaded as a client's."""
    try:
        table = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False
    model = table.get("model", {})
    return "privacy" not in table and isinstance(model, dict) and "upper" not in model


def _print_hop(out: Output, number: int, hop: "HopView") -> None:
    where = "here" if hop.address is None else hop.address
    out.say(f"{number}. {hop.hop}, {where}")
    if hop.address is not None:
        out.say(f"   certificate: {hop.certificate}")
        out.say(f"   evidence: {hop.evidence}")
        out.say(f"   hidden states in: {hop.activations}")
        out.say(f"   gradients in: {hop.gradients}")
    for seen in hop.sees:
        out.say(f"   sees {seen}")
