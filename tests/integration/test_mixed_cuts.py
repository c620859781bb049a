"""Different cuts where members die: who stays alone with a block reveals nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cutlayer.client.train import Report
from cutlayer.errors import ConfigError
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
