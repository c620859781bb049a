"""What the server sees of one update is uniform, whatever the update is; and lies open nothing.

All figures come from the protocol's own randomness with the generators replaced by seeded ones
where a statistic is judged, so a test fails for a reason or never.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator

import pytest
import torch
from torch import Tensor

from cutlayer.errors import CutlayerError, ProtocolError, QuorumNotMet
from cutlayer.federation.secure import member as member_module
from cutlayer.federation.secure.masks import add_pair_mask, add_seed_mask
from cutlayer.federation.secure.recovery import Recovery
from cutlayer.federation.secure.ring import dequantise, quantise
from cutlayer.federation.settings import SecureSettings
from cutlayer.wire.federation_messages import UpdateTaken
from tests.unit.federation.secure.crowd import Crowd, attempt_of, names, updates

_NUM_VALUES = 20_000
_CHI_LIMIT = 400.0
"""Chi-square with 255 degrees of freedom: above 400 with less than 1e-7."""


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets from a counter, so that every run sees the same masks."""
    stream = _stream()
    monkeypatch.setattr(member_module, "token_bytes", lambda count: next(stream)[:count])


def _stream() -> Iterator[bytes]:
    number = 0
    while True:
        number += 1
        yield hashlib.sha256(f"secret {number}".encode()).digest()


def masked_by(values_N: Tensor, attempt_number: int = 1) -> Tensor:
    """What the server receives from the first of three."""
    crowd = Crowd(attempt_of(names(3), number=attempt_number), num_values=values_N.numel())
    crowd.send_secrets(crowd.send_keys())
    member = crowd.members["owner0"]
    member.take_secrets(crowd.server.peer_secrets("owner0"))
    return member.mask(values_N, 1000)


def chi_square(vector_M: Tensor, byte: int) -> float:
    """Of one byte of every value against the uniform distribution."""
    bins = torch.bincount((vector_M >> (8 * byte)) & 0xFF, minlength=256).double()
    expected = vector_M.numel() / 256
    return float(((bins - expected) ** 2 / expected).sum())


UPDATES: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(_NUM_VALUES),
    "constant": lambda: torch.full((_NUM_VALUES,), 0.125),
    "largest": lambda: torch.full((_NUM_VALUES,), 16.0),
    "adapter": lambda: torch.randn(_NUM_VALUES, generator=torch.Generator().manual_seed(1)) * 0.02,
}


@pytest.mark.parametrize("kind", list(UPDATES))
def test_a_masked_update_is_uniform_whatever_it_holds(kind: str) -> None:
    values_N = UPDATES[kind]()
    vector_M = masked_by(values_N)
    assert max(chi_square(vector_M, byte) for byte in range(8)) < _CHI_LIMIT
    bare_M = quantise(values_N, 1000, SecureSettings()).vector_M
    assert max(chi_square(bare_M, byte) for byte in range(8)) > 10 * _CHI_LIMIT, "the test sees it"


def test_a_masked_update_does_not_depend_on_the_values() -> None:
    """Correlation with the update, and between the masked forms of two updates."""
    values_N = UPDATES["adapter"]()
    first_M, second_M = masked_by(values_N), masked_by(-values_N)
    for vector_M in (first_M, second_M):
        rows = torch.stack([vector_M[:-1].double(), values_N.double()])
        assert abs(float(torch.corrcoef(rows)[0, 1])) < 0.03
    both = torch.stack([first_M.double(), second_M.double()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.03


def test_two_attempts_share_no_mask() -> None:
    """The same secrets in another attempt: the difference of two masked zeros is uniform too."""
    first_M = masked_by(UPDATES["zeros"](), 1)
    second_M = masked_by(UPDATES["zeros"](), 2)
    difference_M = first_M - second_M
    assert max(chi_square(difference_M, byte) for byte in range(8)) < _CHI_LIMIT
    assert not bool((difference_M == 0).any())


def test_even_with_equal_secrets_two_attempts_share_no_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every mask is bound to its attempt, should a machine repeat its random numbers."""
    vectors = []
    for number in (1, 2):
        stream = _stream()
        monkeypatch.setattr(
            member_module, "token_bytes", lambda count, stream=stream: next(stream)[:count]
        )
        vectors.append(masked_by(UPDATES["zeros"](), number))
    difference_M = vectors[0] - vectors[1]
    assert max(chi_square(difference_M, byte) for byte in range(8)) < _CHI_LIMIT


def test_values_of_one_update_share_no_mask() -> None:
    vector_M = masked_by(UPDATES["zeros"]())
    assert vector_M.unique().numel() == vector_M.numel()


def ready(num_members: int, policy: SecureSettings | None = None) -> Crowd:
    """All updates are in."""
    cohort = names(num_members)
    crowd = Crowd(attempt_of(cohort, policy))
    crowd.send_updates(crowd.send_secrets(crowd.send_keys()), updates(cohort))
    return crowd


def told(crowd: Crowd, name: str, dropped: Collection[str]) -> UpdateTaken:
    """What a server tells one member when it calls some of its neighbours dropped."""
    honest = crowd.server.taken(name)
    return UpdateTaken(
        survivors=[other for other in honest.survivors if other not in dropped],
        dropped=[other for other in honest.survivors if other in dropped],
        is_secure=True,
    )


def lies_around(crowd: Crowd, victim: str) -> dict[str, set[str]]:
    """Whom to call dropped towards each member, so that all keys around the victim would open.

    The victim is called a survivor everywhere, and no list has more dropped than a member accepts.
    """
    graph, threshold = crowd.attempt.graph, crowd.attempt.threshold
    lies: dict[str, set[str]] = {name: set() for name in crowd.attempt.cohort}
    for owner in graph.neighbours(victim):
        helpers = sorted(graph.neighbours(owner), key=lambda name: len(lies[name]))
        for helper in helpers[:threshold]:
            lies[helper].add(owner)
    assert all(len(names_) <= graph.degree + 1 - threshold for names_ in lies.values())
    return lies


def test_a_lying_server_cannot_cut_one_member_out_of_a_sparse_graph() -> None:
    """It tells each member something that is possible, but together it would open one update.

    It would hold the victim's seed and the mask keys of all its neighbours. What members reveal is
    sealed under secrets that open only for those whom enough neighbours saw survive.
    """
    victim = "owner0"
    crowd = ready(60, SecureSettings(neighbours=6, threshold=0.51))
    lies = lies_around(crowd, victim)
    answers = {
        name: member.unmask(told(crowd, name, lies[name])) for name, member in crowd.members.items()
    }
    recovery = Recovery(crowd.attempt, answers)
    with pytest.raises(ProtocolError, match="readable shares of the seed of owner0"):
        recovery.seed(victim)
    # With the seals broken the same lies would do: it is the seals that keep the update secret.
    recovery._unlocks = {name: member._secrets.unlock for name, member in crowd.members.items()}
    bare_M = quantise(*updates(crowd.attempt.cohort)[victim], crowd.attempt.policy).vector_M
    assert torch.equal(unmasked_alone(crowd, recovery, victim), bare_M)


def unmasked_alone(crowd: Crowd, recovery: Recovery, victim: str) -> Tensor:
    """One member's update, from its seed and its neighbours' mask keys."""
    attempt, sent = crowd.attempt, crowd.members[victim]._masked
    assert sent is not None
    total_M = sent[1].clone()
    add_seed_mask(total_M, recovery.seed(victim), victim, attempt, -1)
    public = {name: member.share_keys().mask_key for name, member in crowd.members.items()}
    for name in attempt.graph.neighbours(victim):
        key = recovery.mask_key(name, public[name])
        add_pair_mask(total_M, key, name, (victim, public[victim]), attempt)
    return total_M


def _opens(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except CutlayerError:
        return False
    return True


def test_split_views_never_open_both_secrets_of_a_member() -> None:
    """Half of the members are told that owner0 survived, half that it did not; every split."""
    for num_told in range(8):
        crowd = ready(8)
        others = [name for name in names(8) if name != "owner0"]
        answers = {
            name: member.unmask(told(crowd, name, [] if name in others[:num_told] else ["owner0"]))
            for name, member in crowd.members.items()
            if name != "owner0"
        }
        answers["owner0"] = crowd.members["owner0"].unmask(crowd.server.taken("owner0"))
        recovery = Recovery(crowd.attempt, answers)
        key = crowd.members["owner0"].share_keys().mask_key
        has_seed = _opens(lambda: recovery.seed("owner0"))  # noqa: B023
        has_key = _opens(lambda: recovery.mask_key("owner0", key))  # noqa: B023
        assert not (has_seed and has_key)
        assert has_seed == (num_told + 1 >= crowd.attempt.threshold)
        assert has_key == (7 - num_told >= crowd.attempt.threshold)


def test_below_the_threshold_answers_open_nothing() -> None:
    crowd = ready(7)
    crowd.unmask(names(4))
    with pytest.raises(QuorumNotMet, match="4 of 7"):
        crowd.server.total()
    recovery = Recovery(crowd.attempt, crowd.server._answers)
    for name in names(7):
        with pytest.raises(ProtocolError, match="readable shares"):
            recovery.seed(name)


def test_what_members_reveal_hides_the_shares_it_carries() -> None:
    """No share of a seed or a key is in UNMASK in the open."""
    crowd = ready(5)
    bundles = crowd.members["owner0"]._bundles
    answer = crowd.members["owner0"].unmask(told(crowd, "owner0", ["owner3"]))
    revealed = b"".join([*answer.seed_shares.values(), *answer.key_shares.values()])
    for bundle in bundles.values():
        assert bundle.seed not in revealed
        assert bundle.key not in revealed
    assert bundles["owner3"].unlock not in revealed


def test_answers_of_other_secrets_give_noise_that_is_noticed() -> None:
    """A coordinator that repeats an attempt's name and mixes up its answers."""
    first, second = ready(4), ready(4)
    for name, member in first.members.items():
        second.server.add_unmask(name, member.unmask(first.server.taken(name)))
    total_M = second.server.total()
    with pytest.raises(ProtocolError, match="a member sent a wrong vector"):
        dequantise(total_M, second.attempt.policy, 4)


def test_no_secret_is_in_what_the_server_holds_before_unmasking() -> None:
    """Keys, sealed shares and masked sums, searched for every secret of every member."""
    crowd = ready(4)
    server = crowd.server
    held = b"".join(
        [
            *(keys.cipher_key + keys.mask_key for keys in server._keys.values()),
            *(sealed for shared in server._secrets.values() for sealed in shared.sealed.values()),
            server._sum_M.numpy().tobytes(),
        ]
    )
    for member in crowd.members.values():
        secrets = member._secrets
        assert not any(part in held for part in (secrets.seed, secrets.key, secrets.unlock))
        for bundle in member._bundles.values():
            assert not any(part in held for part in (bundle.seed, bundle.key, bundle.unlock))
