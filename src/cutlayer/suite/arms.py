"""Results in the order of a reader: sheets of one task, and in each its settings over seeds.

It compares nothing and knows no metric.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from cutlayer.suite.result import RunResult
from cutlayer.suite.spec import Method, RunSpec, Sizes

__all__ = ["Arm", "Sheet", "sheets"]

_FIRST_TASKS = ("topics", "sentiment", "coqa", "xsum", "cnn_dailymail", "multirc")
_METHODS = tuple(Method)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting with its runs, which differ in their seeds alone."""

    spec: RunSpec
    """Its seed is 0, whatever the runs' are."""
    results: tuple[RunResult, ...]
    """Runs that ended well, by seed; at least one."""

    @property
    def name(self) -> str:
        """For people: what tells it from other arms of its sheet."""
        parts = [_method_name(self.spec), *_federation_parts(self.spec)]
        if (self.spec.head_blocks, self.spec.tail_blocks) != (2, 2):
            parts.append(f"p={self.spec.head_blocks} q={self.spec.tail_blocks}")
        if self.spec.adapter != "lora":
            parts.append(self.spec.adapter)
        if self.spec.codec != "raw":
            parts.append(self.spec.codec)
        if self.spec.mechanism != "none":
            scale = "" if self.spec.scale is None else f" {self.spec.scale:g}"
            parts.append(self.spec.mechanism + scale)
        if self.spec.in_processes:
            parts.append("own processes")
        return ", ".join(parts)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of its runs."""
        return tuple(result.spec.seed for result in self.results)

    @property
    def is_plain_split(self) -> bool:
        """One owner, nothing rounded and nothing noised: what must equal the unsplit model."""
        spec = self.spec
        return (spec.method, spec.codec, spec.mechanism) == (Method.SPLIT, "raw", "none")


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Runs that may be compared: one task, source of rows, model, form and sizes."""

    task: str
    source: str
    model: str
    form: str
    """How the model is spoken to."""
    sizes: Sizes
    arms: tuple[Arm, ...]

    @property
    def scored(self) -> tuple[Arm, ...]:
        """Arms that answer questions; audits do not."""
        return tuple(arm for arm in self.arms if arm.spec.method is not Method.AUDIT)

    @property
    def untuned(self) -> Arm | None:
        """The model as it came."""
        return next((arm for arm in self.arms if arm.spec.method is Method.UNTUNED), None)

    def centralised(self, adapter: str = "lora") -> Arm | None:
        """The unsplit counterpart: with that kind of adapter, else with LoRA, else None."""
        found = {arm.spec.adapter: arm for arm in self._unsplit if arm.spec.owners == 1}
        return found.get(adapter, found.get("lora"))

    def partner(self, arm: Arm) -> Arm | None:
        """What an arm is compared with: of a federation, best one with the same rows in a step."""
        kind = (arm.spec.owners, arm.spec.alpha, arm.spec.adapter)
        alike = [a for a in self._unsplit if (a.spec.owners, a.spec.alpha, a.spec.adapter) == kind]
        if arm.spec.method is Method.TOGETHER and alike:
            return alike[0]
        return self.centralised(arm.spec.adapter)

    @property
    def _unsplit(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.spec.method is Method.CENTRALISED]

    @property
    def plain_splits(self) -> list[Arm]:
        """Split runs with LoRA in which at most the cut is varied, or where they ran."""
        return [arm for arm in self.arms if arm.is_plain_split and arm.spec.adapter == "lora"]

    def plain_split(self) -> Arm | None:
        """The split run that the others vary: usual cut, LoRA, threads rather than processes."""
        usual = [a for a in self.plain_splits if (a.spec.head_blocks, a.spec.tail_blocks) == (2, 2)]
        return min(usual, key=lambda arm: arm.spec.in_processes, default=None)


def sheets(results: Iterable[RunResult]) -> list[Sheet]:
    """Sheets of all runs that ended well; the order of `results` does not matter."""
    by_sheet: dict[tuple[str, str, str, str, bytes], list[RunResult]] = {}
    for result in results:
        if result.error is None:
            by_sheet.setdefault(_sheet_key(result.spec), []).append(result)
    ordered = sorted(by_sheet, key=lambda key: (_task_rank(key[0]), key))
    return [_sheet(by_sheet[key]) for key in ordered]


def _sheet(results: Sequence[RunResult]) -> Sheet:
    spec = results[0].spec
    arms = tuple(sorted(_arms(results), key=lambda arm: _arm_rank(arm.spec)))
    return Sheet(
        task=spec.task,
        source=spec.source,
        model=spec.model,
        form=spec.form,
        sizes=spec.sizes,
        arms=arms,
    )


def _arms(results: Sequence[RunResult]) -> list[Arm]:
    by_setting: dict[bytes, list[RunResult]] = {}
    for result in sorted(results, key=lambda result: result.spec.seed):
        setting = msgspec.structs.replace(result.spec, seed=0)
        key = msgspec.json.encode(setting, order="deterministic")
        by_setting.setdefault(key, []).append(result)
    return [
        Arm(spec=msgspec.structs.replace(runs[0].spec, seed=0), results=tuple(runs))
        for runs in by_setting.values()
    ]


def _sheet_key(spec: RunSpec) -> tuple[str, str, str, str, bytes]:
    sizes = msgspec.json.encode(spec.sizes, order="deterministic")
    return (spec.task, spec.model, spec.source, spec.form, sizes)


def _task_rank(task: str) -> int:
    return _FIRST_TASKS.index(task) if task in _FIRST_TASKS else len(_FIRST_TASKS)


def _arm_rank(spec: RunSpec) -> tuple[object, ...]:
    """Plain settings first, then what is varied, one thing after the other."""
    is_usual_cut = (spec.head_blocks, spec.tail_blocks) == (2, 2)
    return (
        _METHODS.index(spec.method),
        spec.method is Method.CENTRALISED and spec.owners,
        not is_usual_cut,
        spec.adapter != "lora",
        spec.mechanism != "none",
        spec.codec != "raw",
        spec.alpha is not None,
        spec.mechanism,
        spec.scale or 0.0,
        spec.run_id.rpartition("-")[0],
        spec.local_steps,
        spec.in_processes,
        spec.run_id,
    )


def _method_name(spec: RunSpec) -> str:
    kind = "IID" if spec.alpha is None else f"label-skewed {spec.alpha:g}"
    if spec.method is Method.TOGETHER:
        return f"{spec.owners} owners, {kind}"
    order = f", in the order of {spec.owners} owners, {kind}" if spec.owners > 1 else ""
    return f"{spec.method.value}{order}"


def _federation_parts(spec: RunSpec) -> list[str]:
    if spec.method is not Method.TOGETHER:
        return []
    parts = [] if spec.strategy == "every_step" else [spec.strategy]
    return parts + ([f"{spec.local_steps} local steps"] if spec.local_steps > 1 else [])
