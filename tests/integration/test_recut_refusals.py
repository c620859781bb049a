"""What stands against a re-cut is said by name, and the run goes on as if nobody had asked."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cutlayer import Client, ClientSettings
from cutlayer.client.recut import Recutter
from cutlayer.client.recut_watch import RecutWish
from cutlayer.client.run_state import StepRecord
from cutlayer.client.train import Report
from cutlayer.errors import (
    ConfigError,
    CutlayerError,
    PermissionRefused,
    SpecMismatch,
    StepExpired,
)
from cutlayer.model.partition import Cut
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from tests.recut_worlds import (
    adapters_of,
    leave_request,
    losses_of,
    owner,
    wide_server,
)
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, running_server, server_settings

STEPS = 6
SMALL: dict[str, object] = {"train__steps": STEPS, "train__save_every": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[StepRecord], dict[str, torch.Tensor]]:
    """History and adapters of a run that nobody asks anything of."""
    folder = private_folder(tmp_path_factory.mktemp("whole") / "world")
    with (
        running_server(wide_server(model, folder)) as server,
        client_of(server, owner(model, folder, **SMALL)) as client,
    ):
        return client.train().history, adapters_of(client)


def _in_the_middle(client: Client, act: Callable[[], object]) -> list[StepRecord]:
    """Train, and act after the third step; its history."""

    def on_step(report: Report) -> None:
        if report.record.step == 3:
            act()

    return client.train(on_step).history


@pytest.fixture
def world(model: Path, tmp_path: Path) -> Iterator[Client]:
    """An owner whose training is half done."""
    with (
        running_server(wide_server(model, tmp_path)) as server,
        client_of(server, owner(model, tmp_path, **SMALL)) as client,
    ):
        yield client


def _refusals(client: Client, model: Path) -> list[tuple[Callable[[], object], type, str]]:
    def with_settings(**changes: object) -> Callable[[], object]:
        settings = owner(model, client.settings.run.folder.parent, **{**SMALL, **changes})
        return lambda: _recutter(client, settings).move(Cut(2, 3), shares=True)

    return [
        (lambda: client.recut(lower=3), ConfigError, "at least one block"),
        (lambda: client.recut(upper=5), ConfigError, "exceeds the model's 4 blocks"),
        (lambda: client.recut(upper=4), ConfigError, r"blocks 3 .*--share-adapter"),
        (
            lambda: _recutter(client, client.settings, room=1000).move(Cut(2, 3), shares=False),
            ConfigError,
            r"blocks 1 .* without memory",
        ),
        (with_settings(adapter__parts=["head", "tail"]), ConfigError, "trains the head alone"),
        (with_settings(privacy__denoiser=True, privacy__mechanism="gaussian",
                       privacy__scale=0.1), ConfigError, "denoiser"),
        (with_settings(run__record_file="frames"), ConfigError, "run.record_file"),
        (
            lambda: _recutter(
                client, client.settings.model_copy(update={"hops": ("two", "hosts")})
            ).move(Cut(2, 3), shares=True),
            ConfigError,
            "hops",
        ),
        (with_settings(model__lower=0), ConfigError, "was begun at 1 and 3"),
    ]  # fmt: skip


def _recutter(client: Client, settings: ClientSettings, room: int | None = None) -> Recutter:
    return Recutter(
        settings=settings,
        folder=client._folder,
        state=client._state,
        link=client._link,
        connect=client._connect,
        own=client._own,
        leaves=client._leaves,
        room=lambda device: room,
    )


def test_after_every_refusal_the_run_is_what_it_was(
    world: Client, model: Path, whole: tuple[list[StepRecord], dict[str, torch.Tensor]]
) -> None:
    before = (world.run_id, world.ledger.num_vectors.get("adapters"))
    # Before any training the run has no cut of its own that the settings could contradict.
    for act, kind, message in _refusals(world, model)[:-1]:
        with pytest.raises(kind, match=message):
            act()
    assert _in_the_middle(world, lambda: None) == whole[0]
    for act, kind, message in _refusals(world, model):
        with pytest.raises(kind, match=message):
            act()
    assert (world.run_id, world.ledger.num_vectors.get("adapters")) == before
    found = adapters_of(world)
    assert all(torch.equal(found[key], x) for key, x in whole[1].items())


def test_a_refused_request_does_not_disturb_the_training(
    world: Client, whole: tuple[list[StepRecord], dict[str, torch.Tensor]]
) -> None:
    folder = world.settings.run.folder
    asked = _in_the_middle(world, lambda: leave_request(folder, Cut(0, 4), share_adapter=False))
    assert asked == whole[0]
    assert not (folder / "recut.request").exists()
    assert ".c" not in world.run_id


def test_blocks_that_the_server_does_not_hold_are_refused_before_anything_is_shown(
    model: Path, tmp_path: Path
) -> None:
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, owner(model, tmp_path, **SMALL)) as client,
    ):
        client.train()
        with pytest.raises(SpecMismatch, match="lower"):
            client.recut(lower=0, share_adapter=True)
        assert "adapters" not in client.ledger.num_vectors
        # The whole server cannot be re-cut to less than a block either.
        assert client.recut(lower=2).to_client == [1]
        with pytest.raises(ConfigError, match="at least one block"):
            client.recut(lower=3)


def test_a_private_model_s_adapter_does_not_come_down_without_its_owner_s_consent(
    model: Path, tmp_path: Path, whole: tuple[list[StepRecord], dict[str, torch.Tensor]]
) -> None:
    from cutlayer.tee.private_model.consent import new_owner_key

    public = new_owner_key(tmp_path / "owner.key")
    (tmp_path / "consents").mkdir()
    table = wide_server(model, tmp_path).model_dump(mode="json")
    table["private_model"] = {"owner": str(public), "consents": str(tmp_path / "consents")}
    settings = parse_settings(type(wide_server(model, tmp_path)), table, "private server")
    with (
        running_server(settings) as server,
        client_of(server, owner(model, tmp_path, **SMALL)) as client,
    ):
        refused: list[CutlayerError] = []

        def ask() -> None:
            try:
                client._move_cut(RecutWish(lower=2, upper=None))
            except CutlayerError as error:
                refused.append(error)

        assert _in_the_middle(client, ask) == whole[0]
        with pytest.raises(PermissionRefused, match="consent"):
            client.recut(lower=2)
        assert [type(error) for error in refused] == [PermissionRefused]
        assert client.recut(upper=4, share_adapter=True).to_server == [3]


def test_an_untrained_run_moves_nothing_and_begins_at_the_new_cut(
    world: Client, whole: tuple[list[StepRecord], dict[str, torch.Tensor]]
) -> None:
    report = world.recut(lower=2)
    assert (report.step, report.is_moved, report.bytes_down) == (0, True, 0)
    assert torch.equal(losses_of(world.train().history), losses_of(whole[0]))
    assert world.recut(lower=2).is_moved is False


def test_a_server_that_lost_the_run_refuses_and_says_so(model: Path, tmp_path: Path) -> None:
    with running_server(wide_server(model, tmp_path)) as server:
        with client_of(server, owner(model, tmp_path, **SMALL)) as client:
            client.train()
        runs = tmp_path / "server" / "runs"
        runs.rename(tmp_path / "elsewhere")
        with client_of(server, owner(model, tmp_path, **SMALL)) as client:
            with pytest.raises(StepExpired, match="no step 6"):
                client.recut(lower=2)
            (tmp_path / "elsewhere").rename(runs)
            assert client.recut(lower=2).step == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"checks__spot_check_every": 1, "checks__profile": True},
        {"recut__memory": {"below_gb": 1e9, "cut": [2, 3]}},
    ],
    ids=["spot-checked", "by-policy"],
)
def test_other_machinery_goes_on_at_the_new_cut(
    model: Path,
    tmp_path: Path,
    changes: dict[str, object],
    whole: tuple[list[StepRecord], dict[str, torch.Tensor]],
) -> None:
    settings = owner(model, tmp_path, **{**SMALL, **changes})
    with (
        running_server(wide_server(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        folder = settings.run.folder
        is_asked = not settings.recut.has_policy

        def ask() -> None:
            if is_asked:
                leave_request(folder, Cut(2, 3))

        history = _in_the_middle(client, ask)
        assert client.run_id.endswith(".c1")
        assert (client.settings.model.lower, client.settings.model.upper) == (2, 3)
        if is_asked:
            assert client.trunk.checks.num_spot_checks > 0
    assert torch.equal(losses_of(history), losses_of(whole[0]))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"adapter__alpha": 3.0}, "adapter"),
        ({"model__dtype": "bfloat16"}, "dtype"),
        ({"privacy__mechanism": "gaussian", "privacy__scale": 0.1}, "privacy"),
    ],
)
def test_settings_that_could_not_continue_the_run_cannot_re_cut_it_either(
    model: Path, tmp_path: Path, changes: dict[str, object], name: str
) -> None:
    with running_server(wide_server(model, tmp_path)) as server:
        with client_of(server, owner(model, tmp_path, **SMALL)) as client:
            client.train()
        with (
            client_of(server, owner(model, tmp_path, **{**SMALL, **changes})) as client,
            pytest.raises(ConfigError, match=f"other {name}"),
        ):
            client.recut(lower=2)
        with client_of(server, owner(model, tmp_path, **SMALL)) as client:
            assert client.recut(lower=2).step == STEPS


def test_a_recut_does_not_make_another_model_the_run_s(model: Path, tmp_path: Path) -> None:
    """Both sides were given another checkpoint of the same shape."""
    with (
        running_server(wide_server(model, tmp_path)) as server,
        client_of(server, owner(model, tmp_path, **SMALL)) as client,
    ):
        client.train()
    other = tiny_llama_folder(private_folder(tmp_path / "other"), seed=1)
    with (
        running_server(wide_server(other, tmp_path)) as server,
        client_of(server, owner(other, tmp_path, **SMALL)) as client,
        pytest.raises(ConfigError, match="other model"),
    ):
        client.recut(lower=2)
