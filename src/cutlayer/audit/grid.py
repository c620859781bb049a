"""The settings that an audit tries: cuts x noise rules x withholding x phases.

It runs nothing (`trial`) and judges nothing (`results`).
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from cutlayer.audit.settings import AuditPlan, Phase
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.model.partition import Cut
from cutlayer.privacy.mechanism import MECHANISMS, PrivacySettings
from cutlayer.settings import parse_settings

__all__ = ["Rule", "TrialSpec", "grid", "parse_rule", "settings_of", "with_scale"]

_RULE_KEYS = ("scale", "clip")
_SHARE = " keep_share="


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A noise rule of the lower cut, as the settings name it."""

    mechanism: str
    """Registered name."""
    scale: float | None = None
    """In the mechanism's own unit."""
    clip: float | None = None
    """Norm bound, in units of the activations."""

    @property
    def label(self) -> str:
        """What `parse_rule` reads."""
        numbers = (("scale", self.scale), ("clip", self.clip))
        shown = [f"{name}={value:g}" for name, value in numbers if value is not None]
        return " ".join([self.mechanism, *shown])


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One setting to attack."""

    lower: int
    """Blocks of the head."""
    upper: int
    """First block of the tail."""
    rule: Rule
    withhold: str
    """privacy.withhold, and keep_share=X behind it where a share leaves."""
    phase: Phase

    @property
    def cut(self) -> Cut:
        """Where the model is cut."""
        return Cut(self.lower, self.upper)

    @property
    def label(self) -> str:
        """The whole setting in one text."""
        withheld = "" if self.withhold == "none" else f", withhold={self.withhold}"
        return f"cut {self.lower}:{self.upper}, {self.rule.label}{withheld}, {self.phase}"

    @property
    def key(self) -> str:
        """A name for files: the setting exactly, whatever digits the label rounds away."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def grid(plan: AuditPlan, client: ClientSettings) -> list[TrialSpec]:
    """Every setting to try, in the order of the plan.

    Raises:
        ConfigError: a rule or a value is unknown.
    """
    cuts = plan.cuts or [(client.model.lower, client.model.upper)]
    rules = [parse_rule(text) for text in plan.rules] or [_own_rule(client.privacy)]
    withhold = [_exactly(text, client.privacy) for text in plan.withhold or [_own(client.privacy)]]
    specs = [
        TrialSpec(lower=lower, upper=upper, rule=rule, withhold=held, phase=phase)
        for (lower, upper), rule, held, phase in product(cuts, rules, withhold, plan.phases)
    ]
    for spec in specs:
        settings_of(spec, client)
    return list(dict.fromkeys(specs))


def parse_rule(text: str) -> Rule:
    """A rule of its text, such as `gaussian scale=0.02`.

    Raises:
        ConfigError: the mechanism or a key is unknown, or a value is no number.
    """
    name, *pairs = text.split() or [""]
    if name not in MECHANISMS.names:
        known = ", ".join(MECHANISMS.names)
        raise ConfigError(f"audit.rules: mechanism {name!r} is unknown; known: {known}")
    numbers: dict[str, float] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            if key not in _RULE_KEYS:
                raise ValueError(key)
            numbers[key] = float(value)
        except ValueError as error:
            raise ConfigError(
                f"audit.rules: {pair!r} in {text!r} is neither scale=NUMBER nor clip=NUMBER"
            ) from error
    return Rule(mechanism=name, scale=numbers.get("scale"), clip=numbers.get("clip"))


def settings_of(
    spec: TrialSpec, client: ClientSettings, **sections: Mapping[str, object] | None
) -> ClientSettings:
    """The client's settings under one spec.

    Args:
        spec: cut, rule and withholding.
        client: the owner's settings.
        sections: further keys by section; None removes the section.

    Raises:
        ConfigError: the client's settings do not allow it, an unknown rule for one.
    """
    table: dict[str, object] = client.model_dump()
    changes: dict[str, Mapping[str, object] | None] = {
        "model": {"lower": spec.lower, "upper": spec.upper},
        "privacy": _privacy(spec),
        **sections,
    }
    for name, section in changes.items():
        before = table.get(name)
        if section is None:
            table[name] = None
        else:
            table[name] = {**(before if isinstance(before, dict) else {}), **section}
    settings = parse_settings(ClientSettings, table, f"audit of {spec.label}")
    settings.privacy.activation_rule()
    return settings


def with_scale(spec: TrialSpec, scale: float) -> TrialSpec:
    """The same setting with another scale."""
    return dataclasses.replace(spec, rule=dataclasses.replace(spec.rule, scale=scale))


def _exactly(text: str, own: PrivacySettings) -> str:
    """What withholds as its owner does keeps what the owner keeps, and says so: results are kept
    under it."""
    return _own(own) if text == str(own.withhold) else text


def _own(own: PrivacySettings) -> str:
    return f"{own.withhold}{_SHARE}{own.keep_share!r}" if own.keep_share else str(own.withhold)


def _privacy(spec: TrialSpec) -> dict[str, object]:
    """Keys of [privacy]; those that this version does not have are left out where unused."""
    table: dict[str, object] = {"mechanism": spec.rule.mechanism, "scale": spec.rule.scale}
    withhold, _, share = spec.withhold.partition(_SHARE)
    return {**table, "clip": spec.rule.clip, "withhold": withhold, "keep_share": share or 0.0}


def _own_rule(own: PrivacySettings) -> Rule:
    return Rule(mechanism=own.mechanism, scale=own.scale, clip=own.clip)
