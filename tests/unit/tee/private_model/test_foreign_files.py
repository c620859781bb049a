"""Whatever bytes lie where a label, a consent or a proof should: a named error, never another."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cutlayer.errors import ModelError, PermissionRefused
from cutlayer.tee.private_model.consent import (
    OwnerKey,
    give_consent,
    new_owner_key,
    read_consent,
)
from cutlayer.tee.private_model.label import LABEL_NAME, Label, What, read_label, write_label

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _accepts(read: Callable[[], object], *errors: type[Exception]) -> bool:
    try:
        read()
    except errors:
        return False
    return True


@FEW
@given(data=st.binary(max_size=300))
def test_bytes_are_no_label_and_no_consent(data: bytes, tmp_path: Path) -> None:
    owner = _owner(tmp_path)
    for name in (LABEL_NAME, "consent.json"):
        (tmp_path / name).write_bytes(data)
    assert not _accepts(lambda: read_label(tmp_path), ModelError)
    assert not _accepts(lambda: read_consent(tmp_path / "consent.json", owner), PermissionRefused)


@FEW
@given(field=st.sampled_from(Label.__struct_fields__), value=JSON)
def test_a_label_with_another_value_is_another_label(
    field: str, value: object, tmp_path: Path
) -> None:
    label = Label(what=What.WEIGHTS, content="ab" * 32, key_id="cd" * 8, part="trunk", upper=2)
    write_label(tmp_path, label)
    table = json.loads((tmp_path / LABEL_NAME).read_bytes())
    table[field] = value
    (tmp_path / LABEL_NAME).write_text(json.dumps(table))
    if _accepts(lambda: read_label(tmp_path), ModelError):
        found = read_label(tmp_path)
        assert found == label or found.digest != label.digest


@FEW
@given(
    field=st.sampled_from(["format", "model", "what", "to", "until", "serial"]),
    value=JSON,
)
def test_a_consent_with_another_value_is_refused(field: str, value: object, tmp_path: Path) -> None:
    owner = _owner(tmp_path)
    until = datetime(2026, 12, 1, tzinfo=UTC) + timedelta(days=1)
    table = json.loads(give_consent(tmp_path / "owner.pem", "ab" * 32, What.ADAPTER, "a", until))
    if table["consent"][field] == value:
        return
    table["consent"][field] = value
    (tmp_path / "consent.json").write_text(json.dumps(table))
    assert not _accepts(lambda: read_consent(tmp_path / "consent.json", owner), PermissionRefused)


def _owner(folder: Path) -> OwnerKey:
    if not (folder / "owner.pem").exists():
        new_owner_key(folder / "owner.pem")
    return OwnerKey(folder / "owner.pub.pem")


def test_a_consent_without_a_time_zone_is_refused(tmp_path: Path) -> None:
    owner = _owner(tmp_path)
    until = datetime(2026, 12, 1, tzinfo=UTC)
    table = json.loads(give_consent(tmp_path / "owner.pem", "ab" * 32, What.ADAPTER, "a", until))
    table["consent"]["until"] = "2026-12-01T00:00:00"
    (tmp_path / "consent.json").write_text(json.dumps(table))
    with pytest.raises(PermissionRefused, match="time zone"):
        read_consent(tmp_path / "consent.json", owner)
