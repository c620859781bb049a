"""`cutlayer leave`: leave a federation. What was learnt stays where it is."""

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption
from cutlayer.cli.output import Output

__all__ = ["leave"]


def leave(config: ConfigOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Leave the federation of the settings; its rounds go on, and one may join again."""
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.client.client import Client
    from cutlayer.client.settings import ClientSettings
    from cutlayer.settings import load_settings

    out = Output(as_json)
    settings = load_settings(ClientSettings, config, set_ or ())
    warn_of_expiry(settings.connection, out)
    with Client(settings) as client:
        client.leave()
    name = settings.federation and settings.federation.name
    out.say(f"left {name}; `cutlayer train` with the same settings joins it again")
    out.result({"left": name})
