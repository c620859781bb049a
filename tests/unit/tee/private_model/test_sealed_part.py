"""Sealed parts and adapters: the same weights come out, for the key alone, nowhere in the clear."""

import json
import secrets
from pathlib import Path

import pytest
import torch

from cutlayer.errors import ConfigError, ModelError, StorageError
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import ModelFolder
from cutlayer.model.manifest import MANIFEST_NAME, manifest_of
from cutlayer.model.partition import Cut, Part
from cutlayer.tee.private_model.label import LABEL_NAME, What, read_label
from cutlayer.tee.private_model.sealed_adapter import (
    open_adapter,
    read_adapter_files,
    seal_adapter,
)
from cutlayer.tee.private_model.sealed_part import SealedFolder, seal_part
from tests.tiny_models import tiny_model

KEY = secrets.token_bytes(32)
CUT = Cut(1, 3)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Untied and tied models, and one with learned positions."""
    return ModelFolder(tiny_model(request.param, tmp_path_factory.mktemp("plain"))[0])


@pytest.mark.parametrize("part", list(Part))
def test_a_sealed_part_loads_as_the_plain_one(
    plain: ModelFolder, part: Part, tmp_path: Path
) -> None:
    label = seal_part(plain, CUT, part, tmp_path / "sealed", KEY)
    sealed = SealedFolder(tmp_path / "sealed", KEY)
    wanted, found = load_part(plain, CUT, part), load_part(sealed, CUT, part)
    assert found.leaves == wanted.leaves == sealed.leaves
    assert sealed.leaves.items() <= manifest_of(plain).leaves.items()
    assert read_label(tmp_path / "sealed") == label
    state = found.state_dict()
    for name, weight in wanted.state_dict().items():
        assert torch.equal(weight, state[name]), name


def test_no_weight_name_or_size_is_in_the_clear(plain: ModelFolder, tmp_path: Path) -> None:
    seal_part(plain, CUT, Part.TRUNK, tmp_path / "sealed", KEY)
    seal_part(plain, CUT, Part.TRUNK, tmp_path / "again", KEY)
    files = {path.name: path.read_bytes() for path in (tmp_path / "sealed").iterdir()}
    assert set(files) == {LABEL_NAME, MANIFEST_NAME, "index.sealed", "weights.sealed"}
    together = b"".join(files.values())
    for name in plain.names():
        assert name.encode() not in together
        weight = plain.get(name).contiguous().numpy().tobytes()
        assert weight[:64] not in together
    assert set(json.loads(files[LABEL_NAME])) == {
        *("format", "what", "content", "key_id", "part", "lower", "upper")
    }
    # A fresh salt each time: equal weights do not show as equal files.
    assert (tmp_path / "again" / "weights.sealed").read_bytes()[64:128] != files["weights.sealed"][
        64:128
    ]


def test_another_key_part_or_cut_is_refused(plain: ModelFolder, tmp_path: Path) -> None:
    seal_part(plain, CUT, Part.TRUNK, tmp_path / "sealed", KEY)
    with pytest.raises(StorageError, match="sealed with key"):
        SealedFolder(tmp_path / "sealed", secrets.token_bytes(32))
    sealed = SealedFolder(tmp_path / "sealed", KEY)
    with pytest.raises(ModelError, match="sealed trunk of blocks 1 to 3 and has no"):
        load_part(sealed, Cut(1, 4), Part.TRUNK)
    with pytest.raises(ModelError, match="without a tokenizer"):
        sealed.tokenizer()
    with pytest.raises(ConfigError, match="exceeds"):
        seal_part(plain, Cut(1, 9), Part.TRUNK, tmp_path / "other", KEY)


@pytest.mark.parametrize("name", ["weights.sealed", "index.sealed"])
def test_a_changed_bit_or_a_missing_end_is_refused(
    plain: ModelFolder, tmp_path: Path, name: str
) -> None:
    seal_part(plain, CUT, Part.TRUNK, tmp_path / "sealed", KEY)
    path = tmp_path / "sealed" / name
    data = path.read_bytes()
    for bad in (data[:-1], data[:100] + bytes([data[100] ^ 1]) + data[101:]):
        path.write_bytes(bad)
        with pytest.raises(StorageError, match="changed, cut short"):
            load_part(SealedFolder(tmp_path / "sealed", KEY), CUT, Part.TRUNK)


def test_pieces_of_another_part_of_the_same_key_do_not_fit(
    plain: ModelFolder, tmp_path: Path
) -> None:
    seal_part(plain, CUT, Part.TRUNK, tmp_path / "one", KEY)
    seal_part(plain, Cut(1, 2), Part.TRUNK, tmp_path / "two", KEY)
    (tmp_path / "one" / "index.sealed").write_bytes(
        (tmp_path / "two" / "index.sealed").read_bytes()
    )
    with pytest.raises(StorageError, match="moved"):
        SealedFolder(tmp_path / "one", KEY)


@pytest.mark.parametrize(
    "bad",
    [b"", b"{}", b"[1]", b"\xff", b'{"format": 1}', b"[" * 70000],
    ids=["empty", "no fields", "list", "no text", "few fields", "too large"],
)
def test_a_label_that_is_none_is_refused(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / LABEL_NAME).write_bytes(bad)
    with pytest.raises(ModelError, match="label"):
        read_label(tmp_path)


def test_a_folder_without_a_label_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds nothing sealed"):
        SealedFolder(tmp_path, KEY)


def test_sealed_weights_never_show_their_key(plain: ModelFolder, tmp_path: Path) -> None:
    seal_part(plain, CUT, Part.TRUNK, tmp_path / "sealed", KEY)
    sealed = SealedFolder(tmp_path / "sealed", KEY)
    assert KEY.hex() not in f"{sealed!r} {vars(sealed)!r}"


def test_an_adapter_is_sealed_and_opened_in_memory(tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 9}
    (tmp_path / "plain").mkdir()
    for name, data in files.items():
        (tmp_path / "plain" / name).write_bytes(data)
    label = seal_adapter(read_adapter_files(tmp_path / "plain"), tmp_path / "sealed", KEY)
    assert label.what is What.ADAPTER
    assert open_adapter(tmp_path / "sealed", KEY) == files
    assert (
        files["adapter_model.safetensors"][:64]
        not in (tmp_path / "sealed" / "adapter.sealed").read_bytes()
    )
    with pytest.raises(StorageError):
        open_adapter(tmp_path / "sealed", secrets.token_bytes(32))
    with pytest.raises(ModelError, match="not a part's weights"):
        SealedFolder(tmp_path / "sealed", KEY)


def test_a_folder_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        read_adapter_files(tmp_path)
