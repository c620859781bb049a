"""Folders, hub ids and what is wrong with them; the hub is a real HTTP server on 127.0.0.1."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cutlayer.errors import ModelError
from cutlayer.model.folder import HubFolder, ModelFolder, resolve_model
from cutlayer.model.tensor_file import TensorFile, write_tensor_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def save_tokenizer(folder: Path) -> None:
    words = {f"w{index}": index for index in range(31)} | {"<unk>": 31}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one safetensors file, with a tokenizer."""
    path = tmp_path_factory.mktemp("whole")
    tiny_llama().save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def sharded_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in several shards."""
    path = tmp_path_factory.mktemp("sharded")
    tiny_llama().save_pretrained(path, max_shard_size="6KB")
    save_tokenizer(path)
    return path


@pytest.fixture
def copy_of(tmp_path: Path, model_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(model_path, tmp_path / "copy"))


def test_every_tensor_is_read_as_it_was_saved(model_path: Path, sharded_path: Path) -> None:
    expected = tiny_llama().state_dict()
    for path in (model_path, sharded_path):
        folder = ModelFolder(path)
        assert folder.names() == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(folder.get(name), tensor)
            assert folder.layout()[name].shape == tensor.shape
    assert len(list(sharded_path.glob("*.safetensors"))) > 3


def test_dtypes_and_empty_and_scalar_tensors_survive(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.arange(7, dtype=torch.int64),
        "c": torch.tensor(2.5),
        "d": torch.empty(0, 4),
        "e": torch.tensor([True, False, True]),
        "f": torch.randn(9).to(torch.float8_e4m3fn),
    }
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, theirs)
    write_tensor_file(ours, tensors, tensors.__getitem__)
    for path in (theirs, ours):
        file = TensorFile(path)
        for name, tensor in tensors.items():
            read = file.get(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_a_tensor_file_is_what_safetensors_itself_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"x": torch.randn(4, 3).T, "y": torch.randn(2).half(), "z": torch.randn(3).double()}
    write_tensor_file(tmp_path / "m.safetensors", tensors, tensors.__getitem__)
    loaded = load_file(tmp_path / "m.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_tensor_that_was_read_keeps_no_page_of_its_file_mapped(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    size = 64 * 1024 * 1024
    header = f'{{"big":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
    with path.open("wb") as sparse:
        sparse.write(len(header).to_bytes(8, "little") + header)
        sparse.truncate(8 + len(header) + size)
    before = mapped_bytes()
    big = TensorFile(path).get("big")
    assert int(big.sum()) == 0
    assert mapped_bytes() - before < size // 8


def mapped_bytes() -> int:
    """Resident pages of files; the heap, which may reuse what is resident, does not count."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


def test_config_and_tokenizer_come_from_the_folder(model_path: Path) -> None:
    folder = ModelFolder(model_path)
    assert folder.config.num_hidden_layers == 3
    assert folder.tokenizer().convert_tokens_to_ids("w7") == 7


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder"):
        resolve_model(tmp_path / "nowhere")


def test_a_folder_without_config_points_to_its_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ModelError, match=r"no config\.json.*x\.gguf itself"):
        resolve_model(tmp_path)


def test_a_pickled_checkpoint_is_refused_with_the_way_out(copy_of: Path) -> None:
    (copy_of / "model.safetensors").rename(copy_of / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        ModelFolder(copy_of)


def test_a_folder_without_weights_says_so(copy_of: Path) -> None:
    (copy_of / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        ModelFolder(copy_of)


@pytest.mark.parametrize("keep", [0, 5, 200, -4])
def test_a_truncated_file_is_refused_before_any_tensor(copy_of: Path, keep: int) -> None:
    path = copy_of / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="truncated"):
        ModelFolder(copy_of)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[1]", "no table"),
        (b"{]", "malformed"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "do not fit a"),
        (b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', "do not fit a"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', "do not fit a"),
        (b'{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}', "dtype Q4"),
        (b'{"a":{"dtype":"F32","shape":"x","data_offsets":[0,4]}}', "malformed"),
        (b'{"a":{"dtype":"F32","shape":[400],"data_offsets":[0,1600]}}', "truncated"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=message):
        TensorFile(path)


def test_a_missing_shard_is_named_when_it_is_needed(tmp_path: Path, sharded_path: Path) -> None:
    copy = Path(shutil.copytree(sharded_path, tmp_path / "copy"))
    index = json.loads((copy / "model.safetensors.index.json").read_bytes())["weight_map"]
    shard = index["model.norm.weight"]
    (copy / shard).unlink()
    folder = ModelFolder(copy)
    with pytest.raises(ModelError, match=f"{shard} is missing"):
        folder.get("model.norm.weight")
    other = next(name for name, file in index.items() if file != shard)
    folder.get(other)


def test_a_shard_that_lacks_an_indexed_tensor_is_named(tmp_path: Path, sharded_path: Path) -> None:
    copy = Path(shutil.copytree(sharded_path, tmp_path / "copy"))
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    index["weight_map"]["model.layers.9.x"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"has no tensor model\.layers\.9\.x"):
        ModelFolder(copy).get("model.layers.9.x")
    with pytest.raises(ModelError, match=r"lack \['model\.layers\.9\.x'\]"):
        ModelFolder(copy).layout()


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "x.bin"])
def test_an_index_cannot_reach_outside_its_folder(
    tmp_path: Path, sharded_path: Path, shard: str
) -> None:
    copy = Path(shutil.copytree(sharded_path, tmp_path / "copy"))
    path = copy / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelError, match="no plain file name"):
        ModelFolder(copy)


def test_code_of_a_checkpoint_is_never_run(copy_of: Path) -> None:
    path = copy_of / "config.json"
    config = json.loads(path.read_bytes())
    config["model_type"] = "mystery"
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    path.write_text(json.dumps(config))
    (copy_of / "evil.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ModelError, match="cannot read the config"):
        _ = ModelFolder(copy_of).config


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-model"}', '{"a": 1}'])
def test_a_broken_config_is_a_model_error(copy_of: Path, text: str) -> None:
    (copy_of / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot read the config"):
        _ = ModelFolder(copy_of).config


class Hub:
    """The part of the hub's HTTP interface that downloads use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.revisions: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        pieces = request.path.strip("/").split("/")
        if pieces[:2] == ["acme", "closed"]:
            return self.refuse(request, 403, "GatedRepo")
        if pieces[:3] != ["acme", "tiny", "resolve"]:
            return self.refuse(request, 404, "RepoNotFound")
        revision, name = pieces[3], pieces[4]
        if revision not in ("main", COMMIT):
            return self.refuse(request, 404, "RevisionNotFound")
        path = self.folder / name
        if not path.is_file():
            return self.refuse(request, 404, "EntryNotFound")
        data = path.read_bytes()
        if with_body:
            self.asked.append(name)
        self.revisions.add(revision)
        request.send_response(200)
        request.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if with_body:
            request.wfile.write(data)
        return None

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def hub(sharded_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, acme/tiny; the tests' offline switch is off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    running = Hub(sharded_path)
    yield running
    running.stop()


def shards(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def test_only_the_shards_of_wanted_tensors_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = HubFolder("acme/tiny", cache_folder=tmp_path, endpoint=hub.url)
    index = json.loads((hub.folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    expected = tiny_llama().state_dict()
    assert folder.names() == set(expected)
    assert folder.config.hidden_size == 16
    assert shards(hub.asked) == []
    wanted = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(folder.get(wanted), expected[wanted])
    assert torch.equal(folder.get(wanted), expected[wanted])
    assert shards(hub.asked) == [index[wanted]]
    assert "tokenizer.json" not in hub.asked


def test_tokenizer_files_are_downloaded_when_asked_for(hub: Hub, tmp_path: Path) -> None:
    folder = HubFolder("acme/tiny", cache_folder=tmp_path, endpoint=hub.url)
    assert folder.tokenizer().convert_tokens_to_ids("w7") == 7
    assert shards(hub.asked) == []


def test_all_files_come_from_one_commit(hub: Hub, tmp_path: Path) -> None:
    folder = HubFolder("acme/tiny", cache_folder=tmp_path, endpoint=hub.url)
    hub.revisions.clear()
    folder.get("model.norm.weight")
    assert hub.revisions == {COMMIT}


def test_a_single_file_model_of_the_hub_is_read(hub: Hub, model_path: Path, tmp_path: Path) -> None:
    hub.folder = model_path
    folder = HubFolder("acme/tiny", cache_folder=tmp_path, endpoint=hub.url)
    expected = tiny_llama().state_dict()
    assert torch.equal(folder.get("model.norm.weight"), expected["model.norm.weight"])


@pytest.mark.parametrize(
    ("model_id", "revision", "message"),
    [
        ("acme/nothing", None, "no model acme/nothing on the hub"),
        ("acme/closed", None, "gated"),
        ("acme/tiny", "v9", "no such revision"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: Hub, tmp_path: Path, model_id: str, revision: str | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        HubFolder(model_id, revision, tmp_path, endpoint=hub.url)


def test_a_hub_model_without_safetensors_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "pickled"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    (hub.folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="no safetensors file"):
        HubFolder("acme/tiny", cache_folder=tmp_path / "cache", endpoint=hub.url)


SCRIPT = """
import sys
from pathlib import Path
from cutlayer.errors import ModelError
from cutlayer.model.folder import resolve_model
try:
    folder = resolve_model("acme/tiny", cache_folder=Path(sys.argv[1]))
    print("sum", folder.get("model.norm.weight").sum().item())
except ModelError as error:
    print("error", error)
"""


def run_resolve(cache: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cache)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.strip()


def test_a_hub_id_honours_the_client_s_environment(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    offline = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    assert "hub cannot be reached" in run_resolve(cache, **offline)
    assert hub.asked == []
    assert run_resolve(cache, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0") == "sum 16.0"
    hub.asked.clear()
    assert run_resolve(cache, **offline) == "sum 16.0"
    assert hub.asked == []
