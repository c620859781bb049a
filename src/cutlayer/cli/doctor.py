"""`cutlayer doctor`: look at a configuration before work, and say what would go wrong.

The checks are in `checks`; nothing is repaired, and no training data leaves.
"""

import tomllib
from pathlib import Path

import typer

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption
from cutlayer.cli.output import Output
from cutlayer.errors import ConfigError

__all__ = ["doctor"]


def doctor(config: ConfigOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Check files, certificates, modes, link, spec, memory, CPU and disk of a client or server."""
    from cutlayer.cli.checks import check_client, check_server
    from cutlayer.client.settings import ClientSettings
    from cutlayer.server.settings import ServerSettings
    from cutlayer.settings import load_settings

    out = Output(as_json)
    is_server = _is_server(config)
    if is_server:
        found = check_server(load_settings(ServerSettings, config, set_ or ()))
    else:
        found = check_client(load_settings(ClientSettings, config, set_ or ()))
    out.table(("check", "", "finding"), [(f.name, f.status, f.text) for f in found])
    is_ok = all(finding.status != "fail" for finding in found)
    checks = [{"name": f.name, "status": str(f.status), "text": f.text} for f in found]
    role = "server" if is_server else "client"
    out.result({"role": role, "config": str(config), "ok": is_ok, "checks": checks})
    if not is_ok:
        raise typer.Exit(2)


def _is_server(config: Path) -> bool:
    """By its sections; a malformed file is explained when it is loaded as a client's."""
    try:
        table = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False
    if not {"listen", "connection"} & table.keys():
        raise ConfigError(
            f"{config} has neither [listen] nor [connection], so it is neither a server's nor a "
            "client's settings; start from a file in examples/"
        )
    return "listen" in table
