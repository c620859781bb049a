"""Placements: which there are, and each way in which one is wrong."""

import pytest

from cutlayer.errors import ConfigError
from cutlayer.model.chain import Hop, PlaceKind, Placement

CLIENT, SERVER, MEMBER, ENCLAVE = PlaceKind


def _placement(*hops: tuple[PlaceKind, int, int], shares_labels: bool = False) -> Placement:
    made = tuple(Hop(place, range(lower, upper)) for place, lower, upper in hops)
    return Placement(num_blocks=8, hops=made, shares_labels=shares_labels)


def test_the_u_is_one_value() -> None:
    u = Placement.u_shaped(2, 6, 8)
    assert u == _placement((CLIENT, 0, 2), (SERVER, 2, 6), (CLIENT, 6, 8))
    assert u.shape == "client-server-client"
    assert u.has_tail_at_client
    assert [str(hop) for hop in u.hops] == [
        "client (blocks 0 to 1)",
        "server (blocks 2 to 5)",
        "client (blocks 6 to 7)",
    ]


@pytest.mark.parametrize(
    ("hops", "shape"),
    [
        ([(CLIENT, 0, 0), (SERVER, 0, 8), (CLIENT, 8, 8)], "client-server-client"),
        ([(CLIENT, 0, 1), (MEMBER, 1, 2), (CLIENT, 2, 8)], "client-member-client"),
        (
            [(CLIENT, 0, 1), (SERVER, 1, 4), (MEMBER, 4, 5), (CLIENT, 5, 8)],
            "client-server-member-client",
        ),
        ([(CLIENT, 0, 3), (ENCLAVE, 3, 8)], "client-enclave"),
        ([(CLIENT, 0, 3), (SERVER, 3, 5), (ENCLAVE, 5, 8)], "client-server-enclave"),
    ],
)
def test_every_shape_is_a_chain(hops: list[tuple[PlaceKind, int, int]], shape: str) -> None:
    assert _placement(*hops).shape == shape


def test_labels_are_shared_only_where_it_is_accepted() -> None:
    hops = ((CLIENT, 0, 3), (SERVER, 3, 8))
    with pytest.raises(ConfigError, match="labels and the text's distribution would be visible"):
        _placement(*hops)
    assert not _placement(*hops, shares_labels=True).has_tail_at_client


@pytest.mark.parametrize(
    ("hops", "said"),
    [
        ([], "the client is first"),
        ([(SERVER, 0, 8)], "the client is first"),
        ([(SERVER, 0, 4), (CLIENT, 4, 8)], "the client is first"),
        ([(CLIENT, 0, 4), (CLIENT, 4, 8)], "without a trunk"),
        (
            [(CLIENT, 0, 2), (SERVER, 2, 4), (CLIENT, 4, 5), (SERVER, 5, 6), (CLIENT, 6, 8)],
            "blocks in the middle",
        ),
        ([(CLIENT, 0, 2), (ENCLAVE, 2, 4), (CLIENT, 4, 8)], "an enclave holds the last"),
        ([(CLIENT, 0, 2), (SERVER, 2, 2), (CLIENT, 2, 8)], "hop 1 .server. has no block"),
        ([(CLIENT, 0, 2), (SERVER, 4, 3), (CLIENT, 3, 8)], "has no block"),
        ([(CLIENT, 0, 2), (SERVER, 3, 6), (CLIENT, 6, 8)], "block 2 have no place"),
        (
            [(CLIENT, 0, 2), (SERVER, 2, 3), (SERVER, 5, 6), (CLIENT, 6, 8)],
            "blocks 3 to 4 have no place: hop 1 ends before 3, hop 2 begins at 5",
        ),
        ([(CLIENT, 0, 2), (SERVER, 2, 5), (CLIENT, 6, 8)], "the client's last blocks begins at 6"),
        (
            [(CLIENT, 0, 2), (SERVER, 2, 5), (SERVER, 4, 6), (CLIENT, 6, 8)],
            "two places or the hops are not in order",
        ),
        (
            [(CLIENT, 0, 2), (SERVER, 4, 6), (SERVER, 2, 4), (CLIENT, 6, 8)],
            "have no place",
        ),
        ([(CLIENT, 1, 2), (SERVER, 2, 6), (CLIENT, 6, 8)], "from 0 to 7"),
        ([(CLIENT, 0, 2), (SERVER, 2, 6), (CLIENT, 6, 7)], "from 0 to 7"),
        ([(CLIENT, 0, 2), (SERVER, 2, 9), (CLIENT, 9, 8)], "before 9; the model has 8"),
        ([(CLIENT, 0, 2), (SERVER, 2, 8), (ENCLAVE, 8, 8)], "the enclave at the end has no block"),
    ],
)
def test_what_is_no_placement_is_refused_by_name(
    hops: list[tuple[PlaceKind, int, int]], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        _placement(*hops)
