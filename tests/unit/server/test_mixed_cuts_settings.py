"""Different cuts tell members the trunk's adapters; an owner that keeps them in hand forbids it."""

from pathlib import Path

import pytest

from cutlayer import ServerSettings
from cutlayer.errors import ConfigError
from cutlayer.settings import parse_settings
from tests.federation_worlds import federation
from tests.worlds import server_settings


@pytest.mark.parametrize("mixed_cuts", [True, False])
def test_a_private_model_s_adapters_are_not_told_to_members(
    tmp_path: Path, mixed_cuts: bool
) -> None:
    table = server_settings(tmp_path, tmp_path).model_dump(mode="json", exclude_none=True)
    table["federation"] = federation(mixed_cuts=mixed_cuts)
    table["private_model"] = {"owner": str(tmp_path / "owner.pem")}
    if not mixed_cuts:
        parse_settings(ServerSettings, table, "test")
        return
    with pytest.raises(ConfigError, match=r"mixed_cuts tells every member.*private_model\.owner"):
        parse_settings(ServerSettings, table, "test")
    del table["private_model"]["owner"]
    parse_settings(ServerSettings, table, "test")
