"""A member's cut moves while it trains with others: between rounds, and only where it may."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cutlayer.client.train import Report
from cutlayer.errors import ConfigError
from cutlayer.model.cut import Cut
from tests.cuts_worlds import cut_owners, eight_blocks, mixed, wide_server
from tests.federation_worlds import at_once, federation, owners
from tests.recut_worlds import leave_request
from tests.tiny_models import tiny_llama_folder
from tests.worlds import running_server, server_settings

CUTS = {"anna": (1, 7), "bert": (2, 6), "cleo": (2, 6), "dora": (3, 5)}


def test_a_member_joins_again_with_its_new_cut_and_the_rounds_go_on(tmp_path: Path) -> None:
    model = eight_blocks(tmp_path)
    rules = mixed(rounds=4, min_members=3, gather_s=2.0)
    with (
        running_server(wide_server(model, tmp_path, rules)) as server,
        ThreadPoolExecutor() as pool,
    ):
        clients = cut_owners(server, model, tmp_path, CUTS, federation__min_cohort=1)
        anna, *others = clients

        def moves(report: Report) -> None:
            if report.record.step == 3:
                leave_request(anna.settings.run.folder, Cut(2, 5))

        futures = [pool.submit(client.train) for client in others]
        progress = anna.train(moves)
        assert progress.step == 4
        assert (anna.settings.model.lower, anna.settings.model.upper) == (2, 5)
        steps = [record.step for record in progress.history]
        assert steps == sorted(set(steps))
        assert {3, 4} <= set(steps)
        for future in futures:
            assert future.result(60).step == 4
        logits = [client.score([[97, 98, 97]])[0] for client in clients]
        for client in clients:
            client.close()
        assert server.federation is not None
        assert server.federation.store.cuts()["anna"] == Cut(2, 5)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-5)


def test_where_all_members_have_one_cut_a_request_is_refused_and_the_rounds_go_on(
    tmp_path: Path,
) -> None:
    model = tiny_llama_folder(tmp_path)
    with running_server(server_settings(model, tmp_path, federation())) as server:
        clients = owners(server, model, tmp_path, federation__share_plain_updates=True)
        anna = clients[0]

        def asks(report: Report) -> None:
            if report.record.step == 1:
                leave_request(anna.settings.run.folder, Cut(2, 3))

        works = [lambda: anna.train(asks), *(client.train for client in clients[1:])]
        assert [progress.step for progress in at_once(works)] == [2, 2, 2]
        assert not (anna.settings.run.folder / "recut.request").exists()
        assert ".c" not in anna.run_id
        with pytest.raises(ConfigError, match="one cut for all members"):
            anna.recut(lower=2)
        for client in clients:
            client.close()
