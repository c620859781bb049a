"""`cutlayer demo`: fetch what the demo needs, run it, print its tables. The demo is in `demo`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output, format_bytes
from cutlayer.cli.simulate import print_federation
from cutlayer.cli.work import stop_on_sigterm, work_folder

if TYPE_CHECKING:
    from cutlayer.demo.run import DemoReport

__all__ = ["demo"]

OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Where the JSON report goes.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of rows, adapter and order.")]
KeepOption = Annotated[
    Path | None,
    typer.Option("--keep", metavar="FOLDER", help="Keep keys, run, adapter and logs here."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", metavar="FOLDER", help="Instead of $CUTLAYER_CACHE or ~/.cache."),
]


class Scene(StrEnum):
    """What is shown."""

    ONE = "1"
    TWO = "2"
    ALL = "all"


SceneOption = Annotated[
    Scene,
    typer.Option("--scene", help="1: one owner, two processes; 2: four owners together."),
]


AttestedOption = Annotated[
    bool,
    typer.Option("--attested", help="Instead: a trunk that attests itself, SIMULATED evidence."),
]


def demo(
    output: OutputOption = Path("build/demo.json"),
    seed: SeedOption = 0,
    scene: SceneOption = Scene.ALL,
    attested: AttestedOption = False,
    keep: KeepOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a small model for one owner, then for four owners together, in a few minutes."""
    from cutlayer.data.assets import cache_folder
    from cutlayer.storage.files import explain_os_errors, write_atomic

    out = Output(as_json)
    stop_on_sigterm()
    cache = cache_folder() if cache is None else cache
    values: dict[str, object] = {"seed": seed}
    with work_folder(keep, "demo") as folder:
        if attested:
            values["attested"] = _scene_attested(folder, cache, seed, out)
        elif scene is not Scene.TWO:
            values = {**_scene_one(folder, cache, seed, out), **values}
        if not attested and scene is not Scene.ONE:
            values["federation"] = _scene_two(folder, cache, seed, out)
    with explain_os_errors(f"create folder {output.parent}"):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, (json.dumps(values, indent=2) + "\n").encode(), mode=0o644)
    out.say(f"report: {output}")
    out.result(values)


def _scene_one(folder: Path, cache: Path, seed: int, out: Output) -> dict[str, object]:
    """One owner and a trunk server learn topics of news."""
    from cutlayer.data.assets import fetch
    from cutlayer.demo.run import DemoInputs, run_demo

    out.say("fetching SmolLM2-135M-Instruct and the BBC news articles, unless they are cached")
    model, articles = fetch("smollm2", cache), fetch("bbcnews", cache)
    inputs = DemoInputs(model=model, articles=articles, folder=folder, cache=cache, seed=seed)
    report = run_demo(inputs, out.say)
    out.table(("", ""), _rows(report), title="cutlayer demo")
    return _values(report)


def _scene_two(folder: Path, cache: Path, seed: int, out: Output) -> dict[str, object]:
    """Four owners learn sentiment together, and each by itself."""
    from cutlayer.demo.federation import federation_settings
    from cutlayer.simulation.run import run_simulation
    from cutlayer.storage.files import private_folder

    out.say("scene two: movies, Amazon, tweets and NYT train one model together")
    own = private_folder(folder / "federation")
    result = run_simulation(federation_settings(seed), own, out.say, cache=cache)
    print_federation(result, out)
    return result.values()


def _scene_attested(folder: Path, cache: Path, seed: int, out: Output) -> dict[str, object]:
    """A trunk server proves what it runs; three owners judge it by three policies."""
    from dataclasses import asdict

    from cutlayer.data.assets import fetch
    from cutlayer.demo.attested import ATTESTED_SIZE, run_attested
    from cutlayer.demo.run import DemoInputs

    inputs = DemoInputs(
        model=fetch("smollm2", cache),
        articles=fetch("bbcnews", cache),
        folder=folder,
        cache=cache,
        seed=seed,
        size=ATTESTED_SIZE,
    )
    report = run_attested(inputs, out.say)
    first, last = report.training["loss_first"], report.training["loss_last"]
    rows = [("this software", f"accepted ({report.assurance}); loss {first:.3f} to {last:.3f}")]
    rows += [
        (one.policy, f"refused: {one.refusal}; {one.bytes_sent} bytes sent")
        for one in report.refused
    ]
    out.table(("policy for", ""), rows, title=f"cutlayer demo --attested ({report.assurance})")
    return asdict(report)


def _values(report: "DemoReport") -> dict[str, object]:
    ledger = report.ledger
    return {
        "accuracy_before": report.before.accuracy,
        "accuracy_after": report.after.accuracy,
        "loss_before": report.before.loss,
        "loss_after": report.after.loss,
        "heldout_rows": report.after.num_rows,
        "seconds": round(report.seconds, 2),
        "tokens_per_s": report.number("tokens_per_s"),
        "bytes_up_per_token": report.number("bytes_up_per_token"),
        "bytes_down_per_token": report.number("bytes_down_per_token"),
        "export_max_abs_diff": report.export_max_abs_diff,
        "train_loss_first": report.number("loss_first"),
        "train_loss_last": report.number("loss_last"),
        "train_tokens": report.number("num_tokens"),
        "guarantee": report.guarantee,
        "vectors_released": ledger.num_vectors,
        "activation_noise": report.activation_rule,
        "gradient_noise": report.gradient_rule,
        "export_check_vectors": report.num_checked_vectors,
        "seconds_by_phase": {k: round(v, 2) for k, v in report.seconds_by_phase.items()},
        "model_digest": report.model_digest,
        "reply": report.reply,
    }


def _rows(report: "DemoReport") -> list[tuple[str, str]]:
    before, after = report.before, report.after
    up = format_bytes(report.number("bytes_up_per_token"))
    down = format_bytes(report.number("bytes_down_per_token"))
    rows = [
        ("held-out accuracy", f"{before.accuracy:.3f} before, {after.accuracy:.3f} after"),
        ("held-out loss of the answer", f"{before.loss:.3f} before, {after.loss:.3f} after"),
        (
            "training loss",
            f"{report.number('loss_first'):.3f} first step, "
            f"{report.number('loss_last'):.3f} last step",
        ),
        ("training speed", f"{report.number('tokens_per_s'):.0f} tokens/s, rows as they are"),
        ("bytes per trained token", f"{up} up, {down} down"),
        ("what left the client", _released(report)),
        ("what stayed", "text, tokens, labels, masks, loss, embedding, LM head"),
        ("noise on activations", f"{report.activation_rule}: {report.guarantee}"),
        ("noise on gradients", report.gradient_rule),
        ("export against unsplit model", f"largest logit difference {_small(report)}"),
        ("reply to a held-out article", f"{report.reply.strip()!r}"),
        ("seconds", f"{report.seconds:.0f} ({_phases(report)})"),
    ]
    return rows


def _small(report: "DemoReport") -> str:
    return (
        f"{report.export_max_abs_diff:.1e} "
        f"(checked with {report.num_checked_vectors} vectors without noise)"
    )


def _released(report: "DemoReport") -> str:
    counts = [f"{n} {name} vectors" for name, n in sorted(report.ledger.num_vectors.items())]
    return f"{', '.join(counts)}; row lengths, one norm and the learning rate per step"


def _phases(report: "DemoReport") -> str:
    return ", ".join(f"{name} {s:.0f}" for name, s in report.seconds_by_phase.items())
