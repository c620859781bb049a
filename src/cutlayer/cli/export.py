"""`cutlayer export`: the trained adapters as files that other software reads."""

from cutlayer.cli.options import (
    AdapterOption,
    ConfigOption,
    JsonOption,
    MergeOption,
    SetOption,
    StepOption,
)
from cutlayer.cli.output import Output
from cutlayer.cli.results import print_exported

__all__ = ["export"]


def export(
    config: ConfigOption,
    output: AdapterOption,
    merge: MergeOption = None,
    step: StepOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Join head, trunk and tail adapters into one PEFT folder."""
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.client.client import Client
    from cutlayer.client.settings import ClientSettings
    from cutlayer.settings import load_settings

    out = Output(as_json)
    settings = load_settings(ClientSettings, config, set_ or ())
    warn_of_expiry(settings.connection, out)
    with Client(settings) as client:
        exported = client.export(output, step, merge)
    print_exported(exported, output, merge, out)
