"""`cutlayer privacy`: what noise an epsilon needs, and what a run has told. It releases nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption
from cutlayer.cli.output import Output

if TYPE_CHECKING:
    from cutlayer.privacy.plan import NoisePlan
    from cutlayer.privacy.recorded_runs import RecordedRun
    from cutlayer.privacy.report import PrivacyReport

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Plan noise for an epsilon; show what was spent.")


@app.command("plan")
def plan(
    epsilon: Annotated[float, typer.Option("--epsilon", help="Epsilon that is wanted.")],
    rows: Annotated[int, typer.Option("--rows", help="Training rows.")],
    epochs: Annotated[int, typer.Option("--epochs", help="Times over the rows.")] = 1,
    tokens_per_row: Annotated[int, typer.Option(help="Vectors of the longest row.")] = 128,
    rows_per_step: Annotated[int, typer.Option(help="Rows of one optimizer step.")] = 8,
    delta: Annotated[float, typer.Option("--delta", help="Delta.")] = 1e-5,
    unit: Annotated[str, typer.Option("--unit", help="token vector, row or client.")] = "row",
    head_trains: Annotated[
        bool, typer.Option("--head-trains/--frozen-head", help="Whether the head learns.")
    ] = True,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Gradients leave under the same rule too.")
    ] = False,
    mechanism: Annotated[str, typer.Option("--mechanism", help="Rule.")] = "clipped_gaussian",
    clip: Annotated[float | None, typer.Option("--clip", help="C; else sigma is in C.")] = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", metavar="FILE", help="Recorded runs to compare with.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The noise that an epsilon needs, and what recorded runs say about its price."""
    import msgspec

    from cutlayer.errors import ConfigError
    from cutlayer.privacy.guarantee import PrivacyUnit
    from cutlayer.privacy.plan import Workload, plan_noise
    from cutlayer.privacy.recorded_runs import comparable_runs, load_recorded, runs_without_noise

    if unit not in tuple(PrivacyUnit):
        raise ConfigError(f"--unit {unit!r} is unknown; known: {', '.join(PrivacyUnit)}")
    if rows_per_step < 1:
        raise ConfigError(f"--rows-per-step must be 1 or more, got {rows_per_step}")
    workload = Workload(
        rows=rows,
        epochs=epochs,
        tokens_per_row=tokens_per_row,
        head_trains=head_trains,
        has_gradients=gradients,
    )
    chosen = 1.0 if clip is None else clip
    found = plan_noise(mechanism, epsilon, delta, PrivacyUnit(unit), workload, chosen)
    recorded = load_recorded(runs)
    like = comparable_runs(recorded, mechanism, found.scale)
    plain = runs_without_noise(recorded)
    num_steps = epochs * -(-rows // rows_per_step)
    out = Output(as_json)
    _print_plan(out, found, clip, num_steps)
    _print_runs(out, like, plain, found)
    out.result(
        {
            **_plan_result(found, clip, num_steps),
            "recorded": msgspec.to_builtins(like),
            "recorded_without_noise": msgspec.to_builtins(plain),
        }
    )


@app.command("show")
def show(config: ConfigOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """What has left a run so far, its epsilons per unit, and what the budgets still allow."""
    from cutlayer.client.accounts import report_from_files
    from cutlayer.client.hops import hop_views
    from cutlayer.client.settings import ClientSettings
    from cutlayer.privacy.hop_names import at_hop
    from cutlayer.settings import load_settings

    out = Output(as_json)
    settings = load_settings(ClientSettings, config, set_ or ())
    report = report_from_files(settings)
    rules = {}
    for number, view in enumerate(hop_views(settings), start=1):
        rules[at_hop("lower cut", number)] = view.privacy.activation_rule()
        rules[at_hop("gradients", number)] = view.privacy.gradient_rule()
    for place, rule in rules.items():
        out.say(f"{place}: {rule.label}; {rule.guarantee}")
    _print_report(out, report)
    described = {place: {"rule": r.label, "guarantee": r.guarantee} for place, r in rules.items()}
    out.result({"folder": str(settings.run.folder), "rules": described, **report.as_json()})


def _print_plan(out: Output, plan: "NoisePlan", clip: float | None, num_steps: int) -> None:
    out.say(f"{plan.mechanism} with scale {plan.scale:.6g}")
    if plan.sigma_in_clips is not None:
        sigma = "" if clip is None else f" = {plan.sigma_in_clips * clip:.6g} in activations"
        out.say(f"standard deviation of the noise: {plan.sigma_in_clips:.6g} C{sigma}")
    elif clip is None:
        out.say("the scale is for C = 1; divide it by your clip")
    out.say(
        f"{plan.applications} noisy releases count for one {plan.promised.unit}, in {num_steps} "
        "steps; validation rows and generation come on top"
    )
    out.say(f"enforced: {plan.promised}")
    out.say(f"exact:    epsilon {plan.exact.epsilon:.4g} ({plan.exact.accountant})")


def _print_runs(
    out: Output, like: "list[RecordedRun]", plain: "list[RecordedRun]", plan: "NoisePlan"
) -> None:
    title = "utility to expect from recorded runs"
    if like:
        _print_list(out, like, f"{title} near scale {plan.scale:.4g}")
        return
    out.say(
        "utility: no recorded run with this mechanism at a comparable scale, so nothing is "
        "known of what this noise costs; measure it with `cutlayer audit`"
    )
    if plain:
        _print_list(out, plain, f"{title} without noise: with it, no more than this")


def _print_list(out: Output, runs: "list[RecordedRun]", title: str) -> None:
    out.say(f"{title}:")
    for run in runs:
        out.say(f"  {_line(run)}")


def _line(run: "RecordedRun") -> str:
    """One run in words: the score first, then what it was got with and what it gave away."""
    facts = [
        run.model,
        "" if run.rows is None else f"{run.rows} rows",
        "" if run.steps is None else f"{run.steps} steps",
        f"cut {run.cut[0]}:{run.cut[1]}",
        f"mechanism {run.mechanism}"
        if run.scale is None
        else f"{run.mechanism} scale={run.scale:g}",
        "" if run.clip is None else f"clip={run.clip:g}",
        f"withhold={run.withhold}",
        "no epsilon" if run.epsilon is None else run.epsilon,
        "" if run.recovery is None else f"attacks recovered {run.recovery:.1%}",
    ]
    known = ", ".join(fact for fact in facts if fact)
    return f"{run.score:.3g} (unprotected {run.score_without_noise:.3g}): {run.task}; {known}"


def _plan_result(plan: "NoisePlan", clip: float | None, num_steps: int) -> dict[str, object]:
    return {
        "mechanism": plan.mechanism,
        "scale": plan.scale,
        "clip": clip,
        "sigma_in_clips": plan.sigma_in_clips,
        "applications": plan.applications,
        "steps": num_steps,
        "unit": str(plan.promised.unit),
        "relation": plan.promised.relation,
        "delta": plan.promised.delta,
        "epsilon_rdp": plan.promised.epsilon,
        "epsilon_pld": plan.exact.epsilon,
        "assumption": plan.promised.assumption,
    }


def _print_report(out: Output, report: "PrivacyReport") -> None:
    if not report.num_vectors:
        out.say("nothing has left yet")
    for boundary, count in report.num_vectors.items():
        out.say(f"{boundary}: {count} vectors have left")
    for promise in report.promises:
        rdp = f"; RDP {promise.rdp.epsilon:.4g}" if promise.rdp.is_bounded else ""
        out.say(f"{promise.boundary}, {promise.rdp.unit}: {promise.pld or promise.rdp}{rdp}")
    if report.uncounted:
        out.say(report.remainder.removeprefix("; "))
    for budget in report.budgets:
        out.say(
            f"budget {budget.scope}: {budget.spent:.4g} of {budget.limit:g} spent per "
            f"{budget.unit}, {budget.left:.4g} left"
        )
    if not report.budgets:
        out.say("budgets in epsilon: none set")
