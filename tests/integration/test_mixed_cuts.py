"""Different cuts where members die: who stays alone with a block reveals nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cutlayer.client.train import Report
from cutlayer.errors import ConfigError
from cutlayer.model.cut import Cut
from tests.cuts_worlds import cut_owners, eight_blocks, mixed, wide_server
from tests.worlds import running_server

CUTS = {"anna": (1, 7), "bert": (2, 6), "cleo": (2, 6), "dora": (3, 5), "emil": (3, 5)}


class _Killed(Exception):
    pass


def test_a_member_left_alone_with_a_block_reveals_nothing_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    model = eight_blocks(tmp_path)
    rules = mixed(rounds=1, min_members=3, gather_s=1.0, phase_deadline_s=1.0)
    mine = {"federation__min_cohort": 2}

    def dies(report: Report) -> None:
        raise _Killed

    with (
        running_server(wide_server(model, tmp_path, rules)) as server,
        ThreadPoolExecutor() as pool,
    ):
        clients = cut_owners(server, model, tmp_path, CUTS, **mine)
        *others, dora, emil = clients
        futures = [pool.submit(client.train) for client in (*others, dora)]
        with pytest.raises(_Killed):
            emil.train(on_step=dies)
        emil.close()
        with pytest.raises(ConfigError, match=r"trained at 1 clients.*min_cohort=2"):
            futures[-1].result(60)
        dora.close()
        for future in futures[:-1]:
            assert future.result(60).step == 1
        for client in others:
            client.close()
        assert server.federation is not None
        (row,) = server.federation.store.rounds()
        assert row.survivors == ["anna", "bert", "cleo"]
        outcomes = [attempt.outcome for attempt in server.federation.store.attempts()]
        assert outcomes[-1] == "finished"
        assert len(outcomes) >= 2


def test_a_member_re_cuts_in_the_middle_and_the_federation_goes_on(tmp_path: Path) -> None:
    """Nothing moves: the server has no run of its own yet, and adapters come with the round."""
    model = eight_blocks(tmp_path)
    rules = mixed(rounds=3, min_members=3, gather_s=2.0)
    cuts = {"anna": (1, 7), "bert": (2, 6), "cleo": (2, 6), "dora": (3, 5)}

    def stops(report: Report) -> None:
        if report.record.step == 3:
            raise _Killed

    with (
        running_server(wide_server(model, tmp_path, rules)) as server,
        ThreadPoolExecutor() as pool,
    ):
        clients = cut_owners(server, model, tmp_path, cuts, federation__min_cohort=1)
        anna, *others = clients
        futures = [pool.submit(client.train) for client in others]
        with pytest.raises(_Killed):
            anna.train(on_step=stops)
        report = anna.recut(lower=2, upper=5, share_adapter=True)
        assert (report.old, report.new) == ((1, 7), (2, 5))
        assert anna.train().step == 3
        for future in futures:
            assert future.result(60).step == 3
        logits = [client.score([[97, 98, 97]])[0] for client in clients]
        for client in clients:
            client.close()
        assert server.federation is not None
        survivors = [row.survivors for row in server.federation.store.rounds()]
        assert survivors == [[*cuts], ["bert", "cleo", "dora"], [*cuts]]
        assert server.federation.store.cuts()["anna"] == Cut(2, 5)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-5)
