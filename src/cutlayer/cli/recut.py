"""`cutlayer recut`: move the cut of a run, by itself or through the process that trains it.

What moves, and in which order, is in `client.recut`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import JsonOption, SetOption
from cutlayer.cli.output import Output, format_bytes
from cutlayer.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from cutlayer.client.recut import RecutReport
    from cutlayer.client.settings import ClientSettings

__all__ = ["recut"]

FileArgument = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="The same as --config.")
]
FileOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Settings in TOML form.")
]
LowerOption = Annotated[
    int | None, typer.Option("--lower", help="First block of the trunk; without it as it is.")
]
UpperOption = Annotated[
    int | None, typer.Option("--upper", help="First block of the tail; without it as it is.")
]
ShareOption = Annotated[
    bool,
    typer.Option(
        "--share-adapter", help="Accept that the server sees adapters of blocks that move to it."
    ),
]
WaitOption = Annotated[
    float, typer.Option("--wait", help="Seconds that a training may take to answer.")
]


def recut(
    file: FileArgument = None,
    config: FileOption = None,
    set_: SetOption = None,
    lower: LowerOption = None,
    upper: UpperOption = None,
    share_adapter: ShareOption = False,
    wait_s: WaitOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Move the cut of a run: blocks, what they learnt and its optimizer change sides.

    A training that is under way does it between two steps and goes on.
    """
    from cutlayer.client.recut_desk import ask, is_attended
    from cutlayer.client.settings import ClientSettings
    from cutlayer.settings import load_settings

    out = Output(as_json)
    settings = load_settings(ClientSettings, _settings_file(file, config), set_ or ())
    if lower is None and upper is None:
        raise ConfigError("say where to cut: --lower, --upper or both")
    folder = settings.run.folder
    if is_attended(folder):
        report = ask(folder, lower, upper, share_adapter, wait_s)
    else:
        report = _move(settings, lower, upper, share_adapter)
    _show(report, out)


def _settings_file(file: Path | None, config: Path | None) -> Path:
    found = file if config is None else config
    if found is None or (file is not None and config is not None):
        raise ConfigError("name one settings file, as an argument or with --config")
    return found


def _move(
    settings: "ClientSettings", lower: int | None, upper: int | None, share_adapter: bool
) -> "RecutReport":
    """By this process, which has the run to itself."""
    from cutlayer.client.client import Client
    from cutlayer.privacy.run_privacy import LEDGER_FILE
    from cutlayer.storage.log import locked_log

    try:
        client = Client(settings)
    except StorageError as error:
        ledger = settings.run.folder / LEDGER_FILE
        try:
            with locked_log(ledger):
                raise error
        except StorageError as second:
            if second is error:
                raise
            raise StorageError(
                f"the run in {settings.run.folder} is in use by a command that takes no re-cuts "
                "(generate, chat, api, eval): end it and ask again"
            ) from error
    with client:
        return client.recut(lower, upper, share_adapter)


def _show(report: "RecutReport", out: Output) -> None:
    old, new = ":".join(map(str, report.old)), ":".join(map(str, report.new))
    if report.is_moved:
        out.say(f"cut {old} -> {new}, from step {report.step} on, in {report.seconds:.1f} s")
        out.say(f"to the server  {_blocks(report.to_server)}, {format_bytes(report.bytes_up)}")
        out.say(f"to the client  {_blocks(report.to_client)}, {format_bytes(report.bytes_down)}")
        out.say("the run keeps this cut, whatever model.lower and model.upper say from now on")
    else:
        out.say(f"the cut is {new} already; nothing moved")
    out.result(
        {
            "run_id": report.run_id,
            "moved": report.is_moved,
            "old": {"lower": report.old[0], "upper": report.old[1]},
            "new": {"lower": report.new[0], "upper": report.new[1]},
            "step": report.step,
            "to_server": report.to_server,
            "to_client": report.to_client,
            "bytes_up": report.bytes_up,
            "bytes_down": report.bytes_down,
            "seconds": report.seconds,
        }
    )


def _blocks(blocks: list[int]) -> str:
    return f"blocks {', '.join(map(str, blocks))}" if blocks else "no block"
