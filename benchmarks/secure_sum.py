"""Secure aggregation alone: processor time and bytes per member, by size of the cohort.

It trains nothing and opens no socket. `python -m benchmarks.secure_sum --json`
"""

import time
from collections.abc import Callable

import msgspec
import torch

from benchmarks.report import Arguments, Value, emit, parse_arguments, print_table
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.member import SecureMember
from cutlayer.federation.secure.server import SecureRound
from cutlayer.federation.settings import SecureSettings

__all__ = ["main"]

_POLICY = SecureSettings(value_bits=28)
"""Two bits less than the default: 1,000 members' sum fits the ring."""
_MASKED_MEMBERS, _MASKED_VALUES = 9, 1_000_000
_VALUES = 100
_LOST = 25
"""From 100 members on, every 25th sends no update."""


def main(arguments: Arguments) -> dict[str, Value]:
    """Measure, print, return the figures."""
    torch.set_num_threads(1)
    sizes = (5, 10) if arguments.is_smoke else (10, 30, 100, 300, 1000)
    rows = [measure(size) for size in sizes]
    print_table(
        "per member, and the server's opening", list(rows[0]), [list(r.values()) for r in rows]
    )
    result: dict[str, Value] = {"mask_million_s": measure_mask()}
    for row in rows:
        for key in ("member_s", "opening_s", "bytes_up", "bytes_down"):
            result[f"{key}_{row['members']}"] = row[key]
    emit(result, arguments)
    return result


def measure_mask() -> float:
    """Processor seconds in which one member masks a million values towards eight neighbours."""
    members, server = _cohort(_MASKED_MEMBERS, _MASKED_VALUES)
    _share(members, server)
    values_N = torch.randn(_MASKED_VALUES)
    return _seconds(lambda: members["owner0"].mask(values_N, 1000))


def measure(num_members: int) -> dict[str, Value]:
    """Processor seconds and bytes of all but the masked values themselves."""
    members, server = _cohort(num_members, _VALUES)
    sharing_s = _seconds(lambda: _share(members, server))
    lost = set(list(members)[::_LOST]) if num_members >= 100 else set()
    survivors = [name for name in members if name not in lost]
    masking_s = _seconds(lambda: _send(members, server, survivors))
    opening_s = _seconds(server.total)
    name, member = survivors[0], members[survivors[0]]
    up = (
        member.share_keys(),
        member.share_secrets(server.peer_keys(name)),
        member.unmask(server.taken(name)),
    )
    down = server.peer_keys(name), server.peer_secrets(name), server.taken(name)
    return {
        "members": num_members,
        "neighbours": len(server.peer_keys(name).peers),
        "threshold": server.peer_keys(name).threshold,
        "member_s": (sharing_s + masking_s) / num_members,
        "opening_s": opening_s,
        "bytes_up": sum(len(msgspec.msgpack.encode(message)) for message in up),
        "bytes_down": sum(len(msgspec.msgpack.encode(message)) for message in down),
    }


def _cohort(num_members: int, num_values: int) -> tuple[dict[str, SecureMember], SecureRound]:
    names = [f"owner{number}" for number in range(num_members)]
    attempt = Attempt(federation="f", round=1, attempt=1, cohort=tuple(names), policy=_POLICY)
    members = {name: SecureMember(name, attempt, num_values) for name in names}
    return members, SecureRound(attempt, num_values)


def _share(members: dict[str, SecureMember], server: SecureRound) -> None:
    for name, member in members.items():
        server.add_keys(name, member.share_keys())
    server.close_keys()
    for name, member in members.items():
        server.add_secrets(name, member.share_secrets(server.peer_keys(name)))
    server.close_secrets()
    for name, member in members.items():
        member.take_secrets(server.peer_secrets(name))


def _send(members: dict[str, SecureMember], server: SecureRound, survivors: list[str]) -> None:
    for name in survivors:
        server.add_masked(name, members[name].mask(torch.randn(_VALUES), 1000))
    server.close_updates()
    for name in survivors:
        server.add_unmask(name, members[name].unmask(server.taken(name)))


def _seconds(action: Callable[[], object]) -> float:
    start_s = time.process_time()
    action()
    return time.process_time() - start_s


if __name__ == "__main__":
    main(parse_arguments(__doc__ or ""))
