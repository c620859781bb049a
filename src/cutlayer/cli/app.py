"""The tree of commands. It does no work: each command imports what it needs when it is called."""

from importlib.metadata import version
from typing import Annotated

import typer

from cutlayer.cli import (
    api,
    assets,
    attest,
    audit,
    demo,
    doctor,
    enclave,
    eval,
    export,
    generate,
    leave,
    masked,
    model,
    placement,
    plan,
    privacy,
    provision,
    purge,
    recut,
    runs,
    serve,
    simulate,
    status,
    train,
)

__all__ = ["app"]

app = typer.Typer(
    name="cutlayer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune and run large language models across the border of an organisation.",
)
app.command("demo")(demo.demo)
app.add_typer(provision.app, name="provision")
app.command("serve")(serve.serve)
app.command("status")(status.status)
app.add_typer(runs.app, name="runs")
app.command("train")(train.train)
app.command("recut")(recut.recut)
app.command("simulate")(simulate.simulate)
app.command("leave")(leave.leave)
app.command("generate")(generate.generate)
app.command("chat")(generate.chat)
app.command("api")(api.api)
app.add_typer(eval.app, name="eval")
app.add_typer(audit.app, name="audit")
app.add_typer(attest.app, name="attest")
app.add_typer(enclave.app, name="enclave")
app.command("export")(export.export)
app.command("doctor")(doctor.doctor)
app.command("placement")(placement.placement)
app.command("plan")(plan.plan)
app.add_typer(assets.app, name="assets")
app.add_typer(privacy.app, name="privacy")
app.add_typer(masked.app, name="masked")
app.add_typer(model.app, name="model")
app.command("purge")(purge.purge)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"cutlayer {version('cutlayer')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Fine-tune and run large language models across the border of an organisation."""
