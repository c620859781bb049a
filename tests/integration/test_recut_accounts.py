"""What was told at one cut stays told at the other: epsilons of a run that was re-cut."""

from pathlib import Path

from cutlayer.client.accounts import account_path, shared_boundaries
from cutlayer.client.train import Report
from cutlayer.model.partition import Cut
from cutlayer.privacy.account import OwnerAccount
from tests.recut_worlds import leave_request, owner, wide_server
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, running_server

NOISE: dict[str, object] = {
    "train__steps": 4,
    "train__save_every": 2,
    "privacy__mechanism": "clipped_gaussian",
    "privacy__scale": 1.0,
    "privacy__clip": 10.0,
    "privacy__gradient_mechanism": "clipped_gaussian",
    "privacy__gradient_scale": 1.0,
    "privacy__gradient_clip": 1.0,
}


def test_rows_count_as_shared_once_a_recut_gives_the_head_blocks_that_learn(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = owner(model, tmp_path, **NOISE, model__lower=0)
    assert "activations" not in shared_boundaries(settings)
    with running_server(wide_server(model, tmp_path)) as server:
        with client_of(server, settings) as client:

            def ask(report: Report) -> None:
                if report.record.step == 2:
                    leave_request(settings.run.folder, Cut(1, 3))

            client.train(ask)
            ledger_id = client._state.privacy.ledger._run_id
        account = OwnerAccount(account_path(settings))
        with account._current():
            line = account.boundaries(ledger_id)["activations"]
        # Every row's release depends on all rows, so that a row's total is the client's.
        assert line.ever.row == line.ever.client
        # And it stays so where the head has no blocks any more: what has left has left.
        with client_of(server, settings) as client:
            client.recut(lower=0, share_adapter=True)
            assert client.settings.model.lower == 0
            assert "activations" in shared_boundaries(client.settings)
            client.train()
        with account._current():
            assert "adapters" in account.boundaries(ledger_id)
