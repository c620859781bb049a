"""A whole plan from what a user names: reads, measures, predicts and recommends, in this order.

It does not print, probe or draw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.model.checkpoint import DTYPES
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.model.partition import Cut
from cutlayer.planner.inputs import Given, parse_blocks, with_given, workload_of
from cutlayer.planner.leak import Leak, LeakTable, read_leaks, rule_of
from cutlayer.planner.link_test import measure_link
from cutlayer.planner.measure import describe_model, describe_work, measure_here
from cutlayer.planner.measurements import Measurements, read_measurements, write_measurements
from cutlayer.planner.plan import CutPlan, LeakAt, check_context, feasible, plan_cuts
from cutlayer.planner.recommend import ASSUMED, pareto_front, recommend
from cutlayer.planner.report import PlanResult
from cutlayer.planner.shapes import ModelShapes, read_shapes
from cutlayer.planner.uncounted import uncounted
from cutlayer.planner.workload import Workload
from cutlayer.privacy.mechanism import PrivacySettings
from cutlayer.settings import load_settings, parse_settings
from cutlayer.wire.codec import get_codec

__all__ = ["Sources", "client_of", "make_plan"]


_ROOM = 16
"""Positions that a prefix may take."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a user names."""

    model: str
    """Model folder, GGUF file, hub id, or a client's settings."""
    overrides: tuple[str, ...] = ()
    """Of the client's settings, `section.key=value`."""
    workload: tuple[str, ...] = ()
    """Of what is planned for, `name=value`."""
    server_blocks: str | None = None
    """ "LOWER:UPPER"; None is all."""
    audits: tuple[Path, ...] = ()
    """Results of audits."""
    measures: bool = True
    """Time this machine, and the link of a client's settings."""
    measurements: Path | None = None
    """Take these instead."""
    save_measurements: Path | None = None
    """Keep them here."""
    budget_s: float = 2.0
    """Time for repetitions of each measurement, roughly."""

    @property
    def is_client(self) -> bool:
        """Whether a client's settings are named."""
        return self.model.endswith(".toml")


def client_of(sources: Sources) -> ClientSettings:
    """The client's settings.

    Raises:
        ConfigError: a model alone is named, or the settings are wrong.
    """
    if not sources.is_client:
        raise ConfigError("this needs a client's settings in TOML form in place of a model")
    return load_settings(ClientSettings, Path(sources.model), sources.overrides)


def make_plan(
    sources: Sources, given: Given, say: Callable[[str], None] = lambda text: None
) -> PlanResult:
    """Measure what is not given, predict every cut and recommend.

    Args:
        sources: what to plan for.
        given: numbers that take the place of measured ones.
        say: told what goes on.

    Raises:
        ConfigError: wrong numbers, no feasible cut, or a model that cannot be cut.
        TransportError: the link is to be measured and the server does not answer.
    """
    if sources.budget_s < 0:
        raise ConfigError(f"--budget-s {sources.budget_s} is no time; give 0 or more")
    client = client_of(sources) if sources.is_client else None
    if client is None and sources.overrides:
        raise ConfigError("--set changes a client's settings, and a model has none; use --work")
    name = sources.model if client is None else client.model.path
    folder = resolve_model(name, None if client is None else client.model.revision)
    workload, rows_source = _workload(sources, client, folder)
    shapes = read_shapes(folder.config, workload.dtype, workload.adapter)
    served = parse_blocks(sources.server_blocks, shapes.num_blocks)
    check_context(shapes, workload)
    table = read_leaks(sources.audits)
    measured = _measured(sources, given, client, folder, (shapes, workload), say)
    if sources.save_measurements is not None:
        write_measurements(sources.save_measurements, measured)
        say(f"measurements: {sources.save_measurements}")
    numbers = with_given(measured, given)
    plans = plan_cuts(shapes, workload, numbers, served, _leak_at(table, client))
    found = feasible(plans, numbers)
    return PlanResult(
        model=name,
        shapes=shapes,
        workload=workload,
        rows_source=rows_source,
        numbers=numbers,
        served=served,
        served_source="all of the model" if sources.server_blocks is None else "given",
        plans=plans,
        feasible=found,
        front=pareto_front(found),
        choices=recommend(found),
        notes=_notes(found, numbers, workload) + ([] if client is None else uncounted(client)),
    )


def _workload(
    sources: Sources, client: ClientSettings | None, folder: ModelFolder
) -> tuple[Workload, str]:
    base, source = (Workload(), "default")
    if client is not None:
        base, source = workload_of(client, folder)
    table: dict[str, object] = base.model_dump()
    given = {"mean_length"} if source != "default" else set()
    for text in sources.workload:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--work {text!r} is not of the form name=value")
        parent, _, last = key.strip().rpartition(".")
        section = table if not parent else table.setdefault(parent, {})
        if not isinstance(section, dict) or parent not in ("", "adapter"):
            raise ConfigError(f"--work {text!r}: {parent} is no section; known: adapter")
        section[last] = _value(value.strip())
        if last == "kinds":
            # What is written for earlier releases says `kind` where there is one alone.
            section.pop("kind", None)
        given.add(last)
        source = "given" if key.strip() in ("mean_length", "max_length", "rows") else source
    found = parse_settings(Workload, _fitted(table, given, folder), where="--work")
    get_codec(found.codec)
    if found.dtype not in DTYPES:
        raise ConfigError(f"dtype={found.dtype} is not known; choose one of {', '.join(DTYPES)}")
    return found, source


def _fitted(table: dict[str, object], given: set[str], folder: ModelFolder) -> dict[str, object]:
    """Default lengths cut to half the model's context each, where it is short."""
    context = getattr(folder.config, "max_position_embeddings", None)
    if not isinstance(context, int):
        return table
    names = {"mean_length", "prompt_tokens", "new_tokens"} - given
    most = max(2, context // 2 - _ROOM)
    short = {
        name: most for name in names if isinstance(value := table.get(name), int) and value > most
    }
    return {**table, **short}


def _value(text: str) -> object:
    if "," in text or text.startswith("["):
        return [piece.strip().strip("\"'") for piece in text.strip("[]").split(",")]
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _measured(
    sources: Sources,
    given: Given,
    client: ClientSettings | None,
    folder: ModelFolder,
    about: tuple[ModelShapes, Workload],
    say: Callable[[str], None],
) -> Measurements:
    shapes, workload = about
    if sources.measurements is not None:
        return _read(sources.measurements, shapes)
    if sources.measures:
        say("measuring this machine")
    needs_baseline = given.baseline_memory_gb is None
    found = measure_here(shapes, workload, sources.budget_s, sources.measures, needs_baseline)
    is_link_given = given.rtt_ms is not None and given.mbit_per_s is not None
    if client is None or is_link_given or not sources.measures:
        return found
    say(f"measuring the link to {client.connection.address}")
    link = measure_link(client, folder)
    source = f"measured here, to {client.connection.address}; the way down taken as the way up"
    return found.model_copy(update={"link": link, "link_source": source})


def _read(path: Path, shapes: ModelShapes) -> Measurements:
    found = read_measurements(path)
    if found.model and found.model != describe_model(shapes):
        raise ConfigError(
            f"{path} was measured for another model ({found.model}), this one is "
            f"{describe_model(shapes)}; measure again"
        )
    return found


def _leak_at(table: LeakTable, client: ClientSettings | None) -> LeakAt:
    privacy = PrivacySettings(mechanism="none") if client is None else client.privacy
    rule = rule_of(privacy.noise())

    def leak_at(cut: Cut) -> Leak | None:
        return table.leak_at(cut, rule)

    return leak_at


def _notes(found: list[CutPlan], numbers: Measurements, workload: Workload) -> list[str]:
    notes = []
    if all(plan.leak is None for plan in found):
        notes.append(f"leak unknown, {ASSUMED}; measure it with `cutlayer audit` and --audit")
    elif any(plan.leak is None for plan in found):
        notes.append(
            f"where the leak is unknown, blocks of the thinner end stand for it: {ASSUMED}"
        )
    if any(plan.cut.lower == 0 for plan in found):
        notes.append(
            "a cut at 0 sends embedding rows, which anybody who has the model reads off; choose it "
            "for public text alone"
        )
    if numbers.ends is None:
        notes.append("seconds are unknown: the client's ends were not measured")
    if "as if the server" in numbers.server_source:
        notes.append("the server is taken as fast as this machine; give --server-train-s and so on")
    if numbers.work and numbers.work != describe_work(workload):
        notes.append(f"times were measured for other work ({numbers.work}); measure again")
    if workload.rows is not None:
        steps = -(-workload.rows // workload.rows_per_step) * workload.epochs
        notes.append(f"{workload.rows} rows, epochs: {workload.epochs}, steps: {steps}")
    return notes
