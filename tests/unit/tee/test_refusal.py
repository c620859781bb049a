"""What a peer writes into its evidence must not write our logs."""

import msgspec
import pytest

from cutlayer.errors import AttestationError
from cutlayer.tee.exhibit import Exhibit
from cutlayer.tee.refusal import Refusal, refused


def test_a_peers_field_names_write_no_line_of_a_log_and_no_terminal_codes() -> None:
    proof = msgspec.msgpack.encode({"x\n2026-11-21 evidence of clinic accepted\x1b[2K": 1})
    with pytest.raises(AttestationError) as caught:
        Exhibit.unpack(proof)
    assert str(caught.value).isprintable()
    assert "\\n2026-11-21" in str(caught.value)


def test_a_peer_fills_no_page_of_a_log() -> None:
    proof = msgspec.msgpack.encode({"x" * 100_000: 1})
    with pytest.raises(AttestationError) as caught:
        Exhibit.unpack(proof)
    assert len(str(caught.value)) < 1100


def test_other_letters_than_english_ones_stay_as_they_are() -> None:
    assert str(refused(Refusal.TCB, "clé de Zürich")) == "tcb: clé de Zürich"
