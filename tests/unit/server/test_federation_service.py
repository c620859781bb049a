"""The federation's thread: whatever is sent and whatever breaks, everybody gets an answer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cutlayer.errors import ProtocolError, StorageError
from cutlayer.federation.coordinator import Coordinator
from cutlayer.federation.cuts import block_of
from cutlayer.federation.settings import FederationSettings
from cutlayer.identity.certificates import Role
from cutlayer.model.cut import Cut
from cutlayer.server.audit import Audit
from cutlayer.server.federation import FederationService
from cutlayer.server.federation_calls import start_call
from cutlayer.server.quota import DailyQuota
from cutlayer.server.run_files import load_saved_adapter, run_folder
from cutlayer.storage.steps import StepStore
from cutlayer.storage.vault import open_vault
from cutlayer.wire.channel import Peer
from cutlayer.wire.codec import get_codec
from cutlayer.wire.federation_messages import Adopt, EnterRound, Join, Joined
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Kind
from tests.unit.federation.cuts_world import CutTrunk, greeting, joining
from tests.unit.federation.rounds_world import ENDS, FINGERPRINT, ToyTrunk

ENTER = EnterRound(federation="oncology", round=0, digest="", needs_state=True)


def _peer(name: str) -> Peer:
    return Peer(name=name, roles=frozenset({Role.TRAIN}), serial=1, address="127.0.0.1:1")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[FederationService]:
    settings = FederationSettings(name="oncology", rounds=2)
    made = FederationService(settings, tmp_path, open_vault(None), ToyTrunk())
    yield made
    made.close()


def _join(service: FederationService, name: str) -> None:
    call = Join(federation="oncology", fingerprint=dict(FINGERPRINT), layout=dict(ENDS))
    reply = service.submit(_peer(name), Frame(kind=Kind.JOIN, header=call)).result(5)
    assert isinstance(reply.header, Joined)


def test_a_thread_that_ends_tells_everybody_who_waits_and_who_comes(
    service: FederationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    _join(service, "a")
    waiting = service.submit(_peer("a"), Frame(kind=Kind.ENTER_ROUND, header=ENTER))

    def broken(coordinator: Coordinator) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Coordinator, "next_deadline_s", broken)
    with pytest.raises(StorageError, match=r"has stopped at the server \(RuntimeError\)"):
        waiting.result(5)
    with pytest.raises(StorageError, match="has stopped"):
        service.submit(_peer("a"), Frame(kind=Kind.ENTER_ROUND, header=ENTER))


def test_a_full_disk_under_the_thread_is_said_and_not_waited_for(
    service: FederationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    _join(service, "a")
    waiting = service.submit(_peer("a"), Frame(kind=Kind.ENTER_ROUND, header=ENTER))

    def full(coordinator: Coordinator) -> None:
        raise StorageError("disk full; free space")

    monkeypatch.setattr(Coordinator, "next_deadline_s", full)
    with pytest.raises(StorageError, match="disk full"):
        waiting.result(5)


def test_who_is_no_member_cannot_take_the_trunks_adapter_home(
    service: FederationService, tmp_path: Path
) -> None:
    _join(service, "a")
    call = Adopt(federation="oncology", round=0, run_id="mine")
    stolen = service.submit(_peer("eve"), Frame(kind=Kind.ADOPT, header=call))
    with pytest.raises(ProtocolError, match="eve is no member"):
        stolen.result(5)
    assert not list(tmp_path.rglob("mine"))


def test_an_adopted_run_has_the_blocks_of_the_cut_that_it_will_be_opened_with(
    tmp_path: Path,
) -> None:
    """The connection's, though the member joined with another one on an earlier connection."""
    settings = FederationSettings(name="oncology", rounds=2, mixed_cuts=True)
    service, trunk = FederationService(settings, tmp_path, open_vault(None), CutTrunk()), Cut(2, 4)
    try:
        joined = Frame(kind=Kind.JOIN, header=joining(Cut(3, 4)))
        service.submit(_peer("a"), joined, greeting(Cut(3, 4))).result(5)
        call = Frame(kind=Kind.ADOPT, header=Adopt(federation="oncology", round=0, run_id="mine"))
        service.submit(_peer("a"), call, greeting(trunk)).result(5)
    finally:
        service.close()
    store = StepStore(run_folder(tmp_path, "a", "mine"), open_vault(None))
    assert load_saved_adapter(store, 0).cut == trunk
    assert {block_of(key) for key in load_saved_adapter(store, 0).state} == set(trunk.trunk)


def test_only_an_update_has_tensors(service: FederationService) -> None:
    packed = get_codec("raw").encode(torch.zeros(4, 4))
    frame = Frame(kind=Kind.ENTER_ROUND, header=ENTER, tensors={"x": packed})
    with pytest.raises(ProtocolError, match="only SEND_UPDATE has any"):
        start_call(service, _peer("a"), frame, DailyQuota(None), Audit(None))
