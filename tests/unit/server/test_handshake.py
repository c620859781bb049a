"""What a server answers to HELLO."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from cutlayer.errors import ConfigError, SpecMismatch
from cutlayer.model.cut import Cut
from cutlayer.model.manifest import Manifest
from cutlayer.server.handshake import ServedModel, agree_on
from cutlayer.wire.messages import Hello
from cutlayer.wire.spec import Spec

SPEC = Spec(
    model_type="llama",
    n_block=2,
    lower=0,
    upper=1,
    hidden_size=8,
    dtype="float32",
    codec_up="raw",
    codec_down="raw",
)
LEAVES = {"config": "aa" * 32, "block.0": "bb" * 32}
CLIENT_LEAVES = {
    "config": "aa" * 32,
    "embedding": "cc" * 32,
    "block.1": "dd" * 32,
    "norm": "ee" * 32,
    "lm_head": "ff" * 32,
}
MODEL = ServedModel(
    spec=SPEC, manifest=Manifest(LEAVES), digest=None, boot_id="boot", software="cutlayer 0"
)


def _hello(spec: Spec = SPEC, changed: Mapping[str, str] | None = None) -> Hello:
    leaves = {**CLIENT_LEAVES, **(changed or {})}
    return Hello(nonce="00" * 32, spec=spec.to_table(), leaves=leaves)


def test_the_client_chooses_the_codecs() -> None:
    agreement = agree_on(MODEL, _hello(replace(SPEC, codec_up="int8", codec_down="bf16")))
    assert (agreement.theirs.codec_up, agreement.theirs.codec_down) == ("int8", "bf16")
    assert agreement.welcome.spec == agreement.theirs.to_table()
    assert agreement.welcome.place == ""
    assert agreement.welcome.leaves == LEAVES


def test_the_digest_is_over_the_leaves_of_both() -> None:
    assert agree_on(MODEL, _hello()).root == Manifest({**LEAVES, **CLIENT_LEAVES}).root()


def test_another_cut_another_block_and_an_unknown_codec_are_refused() -> None:
    with pytest.raises(SpecMismatch, match="lower"):
        agree_on(MODEL, _hello(replace(SPEC, lower=1, upper=2)))
    with pytest.raises(SpecMismatch, match=r"block\.0"):
        agree_on(MODEL, _hello(changed={"block.0": "dd" * 32}))
    with pytest.raises(ConfigError, match="morse"):
        agree_on(MODEL, _hello(replace(SPEC, codec_up="morse")))


def test_a_client_may_cut_anywhere_within_the_trunk() -> None:
    wide = replace(MODEL, spec=replace(SPEC, n_block=6, lower=1, upper=5))
    for lower, upper in ((1, 5), (2, 4), (1, 2), (4, 5)):
        agreement = agree_on(wide, _hello(replace(wide.spec, lower=lower, upper=upper)))
        assert agreement.cut == Cut(lower, upper)
        assert agreement.welcome.spec["lower"] == lower
    for lower, upper in ((0, 5), (1, 6), (3, 3), (4, 2), (-1, 2)):
        with pytest.raises(SpecMismatch, match="blocks that the server holds"):
            agree_on(wide, _hello(replace(wide.spec, lower=lower, upper=upper)))


def test_a_trunk_of_several_processes_has_one_cut() -> None:
    wide = replace(MODEL, spec=replace(SPEC, n_block=6, lower=1, upper=5), has_one_cut=True)
    with pytest.raises(SpecMismatch, match="runs blocks 1 to 5 as one, not those from 2 to 5"):
        agree_on(wide, _hello(replace(wide.spec, lower=2)))
    assert agree_on(wide, _hello(wide.spec)).cut == Cut(1, 5)
