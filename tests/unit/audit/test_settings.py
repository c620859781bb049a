import re
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import BaseModel

from cutlayer.audit.grid import grid, parse_rule, settings_of
from cutlayer.audit.settings import AuditPlan, AuditSettings
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.settings import load_settings, parse_settings

EXAMPLES = Path(__file__).parents[3] / "examples"
EXAMPLE = EXAMPLES / "audit.toml"


@pytest.fixture
def client() -> ClientSettings:
    return load_settings(ClientSettings, EXAMPLES / "client.toml")


def plan_of(**changes: object) -> AuditPlan:
    table = {"audit": {"client": "client.toml", **changes}}
    return parse_settings(AuditSettings, table, "test").audit


def keys(model: type[BaseModel], path: str) -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        found |= keys(kind, f"{path}{name}.") if nested else {f"{path}{name}"}  # type: ignore[arg-type]
    return found


def test_the_example_shows_every_setting_once_with_a_comment_above() -> None:
    section, shown = "", []
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    for before, line in pairwise(lines):
        if header := re.fullmatch(r"\[([a-z.]+)\]", line):
            section = f"{header[1]}."
        elif key := re.match(r"(?:# )?([a-z_]+) = ", line):
            shown.append(f"{section}{key[1]}")
            assert before.startswith("# "), line
            assert " = " not in before, line
    assert sorted(shown) == sorted(keys(AuditSettings, ""))


def test_the_example_loads_and_makes_a_grid(client: ClientSettings) -> None:
    plan = load_settings(AuditSettings, EXAMPLE).audit
    specs = grid(plan, client)
    assert len(specs) == 12
    assert len({spec.key for spec in specs}) == 12


def test_an_empty_grid_is_the_clients_own_setting(client: ClientSettings) -> None:
    (spec,) = grid(plan_of(), client)
    own = client.privacy.activation_rule().label
    assert settings_of(spec, client).privacy.activation_rule().label == own
    assert (spec.lower, spec.upper) == (client.model.lower, client.model.upper)


def test_a_rule_is_read_as_it_is_written(client: ClientSettings) -> None:
    rule = parse_rule("clipped_gaussian scale=4 clip=30")
    assert (rule.mechanism, rule.scale, rule.clip) == ("clipped_gaussian", 4.0, 30.0)
    assert parse_rule(rule.label) == rule
    (spec,) = grid(plan_of(rules=[rule.label]), client)
    assert settings_of(spec, client).privacy.activation_rule().event(1).clip == 30.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("gausian scale=1", "'gausian' is unknown"),
        ("gaussian sigma=1", "neither scale=NUMBER nor clip=NUMBER"),
        ("gaussian scale=much", "neither scale=NUMBER nor clip=NUMBER"),
        ("", "is unknown"),
    ],
)
def test_a_rule_that_is_none_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_rule(text)


def test_a_rule_without_the_scale_that_it_needs_is_refused(client: ClientSettings) -> None:
    with pytest.raises(ConfigError, match="scale"):
        grid(plan_of(rules=["gaussian"]), client)


def test_a_withholding_that_is_unknown_is_refused(client: ClientSettings) -> None:
    with pytest.raises(ConfigError, match="withhold"):
        grid(plan_of(withhold=["everything"]), client)


@pytest.mark.parametrize("cut", [(3, 1), (-1, 4)])
def test_a_cut_in_the_wrong_order_is_refused(cut: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="lower <= upper"):
        plan_of(cuts=[list(cut)])


@pytest.mark.parametrize("wanted", [[], ["private"]])
def test_a_share_that_the_client_keeps_is_part_of_the_setting(
    client: ClientSettings, wanted: list[str]
) -> None:
    found = []
    for share in (0.1, 0.3):
        keeps = {"withhold": "private", "keep_share": share}
        table = client.model_dump()
        own = parse_settings(
            ClientSettings, table | {"privacy": {**table["privacy"], **keeps}}, "test"
        )
        found += grid(plan_of(withhold=wanted), own)
        assert settings_of(found[-1], own).privacy.keep_share == share
    assert len({spec.key for spec in found}) == 2, "a resumed audit would take one for the other"
    assert "keep_share=0.1" in found[0].label
