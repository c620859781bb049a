"""[[hops]] of a client: what each hop's settings are, and what is refused before work."""

from pathlib import Path

import pytest

from cutlayer import ClientSettings
from cutlayer.client.hops import chain_identity, hop_views, placement_of
from cutlayer.errors import ConfigError, SpecMismatch
from cutlayer.settings import parse_settings
from tests.chain_worlds import chain_settings, client_of_hops, hop_server, running_hops, six_blocks
from tests.worlds import client_settings, running_server

MODEL = Path("model")
LATER = {
    "place": "server",
    "lower": 3,
    "upper": 5,
    "connection": {"address": "127.0.0.1:2"},
    "privacy": {"mechanism": "none"},
}
FIRST = {"place": "server", "lower": 1, "upper": 3}


def _parsed(folder: Path, *hops: dict[str, object], **sections: object) -> ClientSettings:
    plain = client_settings(MODEL, folder, model__upper=5)
    table = plain.model_dump(mode="json", exclude_none=True)
    return parse_settings(ClientSettings, {**table, "hops": list(hops), **sections}, "test")


def test_each_hop_is_a_u_of_its_own_with_what_it_does_not_say_as_in_the_settings(
    tmp_path: Path,
) -> None:
    noise = {"mechanism": "gaussian", "scale": 0.5}
    first, later = hop_views(_parsed(tmp_path, FIRST, {**LATER, "privacy": noise}))
    assert (first.model.lower, first.model.upper) == (1, 3)
    assert first.privacy.mechanism == "none"
    assert (later.model.lower, later.model.upper) == (3, 5)
    assert later.connection.address == "127.0.0.1:2"
    assert later.connection.codec == "bf16"
    assert later.connection.deadline_s == first.connection.deadline_s
    assert (later.privacy.mechanism, later.privacy.scale) == ("gaussian", 0.5)
    assert not first.hops
    assert not later.hops


def test_without_hops_the_settings_are_a_u_and_name_no_chain(tmp_path: Path) -> None:
    settings = client_settings(MODEL, tmp_path)
    assert hop_views(settings) == (settings,)
    assert set(chain_identity(settings).values()) == {"none"}
    assert placement_of(settings, 4).shape == "client-server-client"
    one = _parsed(tmp_path, {"place": "member", "lower": 1, "upper": 5})
    assert placement_of(one, 6).shape == "client-member-client"


@pytest.mark.parametrize(
    ("hops", "said"),
    [
        ([FIRST], "blocks 3 to 4 have no place"),
        ([FIRST, {**LATER, "lower": 4}], "block 3 have no place"),
        ([FIRST, {**LATER, "lower": 2}], "two places"),
        ([FIRST, {**LATER, "upper": 3}], "hop 2 .server. has no block"),
        ([LATER, FIRST], "have no place"),
        ([{**LATER, "lower": 1}], "the first of ..hops.. is at .connection."),
        ([FIRST, {**LATER, "privacy": None}], r"hop 2 has no \[hops.privacy\]"),
        ([FIRST, {**LATER, "connection": None}], r"hop 2 has no \[hops.connection\]"),
        ([FIRST, {**LATER, "connection": {"address": "127.0.0.1:1"}}], "one server is one hop"),
        ([FIRST, {**LATER, "privacy": {"mechanism": "gaussian"}}], "scale"),
        ([FIRST, {**LATER, "place": "enclave"}], "place"),
    ],
)
def test_hops_that_are_no_chain_are_refused(
    tmp_path: Path, hops: list[dict[str, object]], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        _parsed(tmp_path, *hops)


def test_a_mistake_is_told_without_all_the_settings_around_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _parsed(tmp_path, FIRST)
    assert str(caught.value).startswith("test: blocks 3 to 4 have no place")
    with pytest.raises(ConfigError, match=r"hops.0.lowr is not a setting; did you mean lower"):
        _parsed(tmp_path, {**FIRST, "lowr": 1})


def test_what_does_not_work_with_hops_is_refused_by_name(tmp_path: Path) -> None:
    run = {"folder": str(tmp_path / "run"), "record_file": str(tmp_path / "x")}
    with pytest.raises(ConfigError, match="record_file records one trunk server"):
        _parsed(tmp_path, FIRST, LATER, run=run)
    train = {"rows_per_step": 8}
    with pytest.raises(ConfigError, match=r"federation.*does not work with"):
        _parsed(tmp_path, FIRST, LATER, federation={"name": "clinics"}, train=train)


def test_a_hop_outside_of_what_its_server_holds_is_refused_and_a_larger_server_serves(
    tmp_path: Path,
) -> None:
    model = six_blocks(tmp_path)
    settings = chain_settings(model, tmp_path)
    narrow = hop_server(model, tmp_path / "narrow", 4, 5)
    whole = hop_server(model, tmp_path / "whole", 1, 6)
    with (
        running_hops(model, tmp_path) as servers,
        running_server(narrow) as small,
        running_server(whole) as large,
    ):
        with (
            client_of_hops([servers[0], small], settings) as client,
            pytest.raises(SpecMismatch),
        ):
            client.train()
        with client_of_hops([servers[0], large], settings) as client:
            assert client.train().step == 6


def test_a_run_keeps_its_hops_and_their_noise(tmp_path: Path) -> None:
    model = six_blocks(tmp_path)
    with running_hops(model, tmp_path) as servers:
        with client_of_hops(servers, chain_settings(model, tmp_path)) as client:
            client.train()
        noise = {"mechanism": "gaussian", "scale": 0.5}
        other = chain_settings(model, tmp_path, privacy=noise)
        with (
            client_of_hops(servers, other) as client,
            pytest.raises(ConfigError, match="other hops' privacy"),
        ):
            client.train()
