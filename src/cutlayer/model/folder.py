"""Where a model comes from: a local folder, a GGUF file or a hub id, behind one `ModelFolder`.

It does not build modules, convert dtypes or know what a part needs: callers ask for tensors by the
checkpoint's own names, and only what is asked for is read or downloaded. Code that a checkpoint
brings along is never run.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from cutlayer.errors import ModelError
from cutlayer.model.gguf_import import import_gguf
from cutlayer.model.tensor_file import TensorFile

__all__ = ["TOKENIZER_FILES", "HubFolder", "ModelFolder", "default_cache_folder", "resolve_model"]

T = TypeVar("T")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelFolder:
    """A Hugging Face model folder on disk: config, tokenizer and safetensors read on demand."""

    def __init__(self, path: str | Path) -> None:
        """Read the index of tensors.

        Args:
            path: folder with config.json and model.safetensors or its index.

        Raises:
            ModelError: the folder is missing, holds no model or a pickled one.
        """
        self.path = Path(path)
        _check_folder(self.path)
        self._shard_of = self._read_index()
        self._files: dict[str, TensorFile] = {}
        self._config: PreTrainedConfig | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers config of the whole model, read from the folder alone."""
        if self._config is None:
            self._config = _read_locally(AutoConfig.from_pretrained, self.path, "config.json")
        return self._config

    def fetch_tokenizer(self) -> None:
        """Make sure that the tokenizer's files are in `path`."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        self.fetch_tokenizer()
        return _read_locally(AutoTokenizer.from_pretrained, self.path, "tokenizer")

    def names(self) -> frozenset[str]:
        """The names of all tensors of the checkpoint, as its files spell them."""
        return frozenset(self._shard_of)

    def layout(self) -> dict[str, Tensor]:
        """Dtype and shape of every tensor, as meta tensors; every shard's header is read."""
        shards = sorted(set(self._shard_of.values()))
        found = {
            name: meta for shard in shards for name, meta in self._file(shard).layout().items()
        }
        if missing := sorted(self._shard_of.keys() - found.keys()):
            raise ModelError(f"the shards of {self.path} lack {missing}; download them again")
        return {name: found[name] for name in self._shard_of}

    def get(self, name: str) -> Tensor:
        """Read one tensor in the file's dtype, and nothing else.

        Raises:
            ModelError: unknown name, missing or damaged shard.
        """
        shard = self._shard_of.get(name)
        if shard is None:
            raise ModelError(f"{self.path} has no tensor {name}; the checkpoint is incomplete")
        return self._file(shard).get(name)

    def _file(self, shard: str) -> TensorFile:
        if shard not in self._files:
            self._files[shard] = TensorFile(self._locate(shard))
        return self._files[shard]

    def _locate(self, shard: str) -> Path:
        path = self.path / shard
        if not path.is_file():
            raise ModelError(f"shard {path} is missing; copy it there or download the model again")
        return path

    def _read_index(self) -> dict[str, str]:
        index = self.path / INDEX
        if index.is_file():
            return _parse_index(index)
        return dict.fromkeys(TensorFile(self.path / SINGLE).names(), SINGLE)


class HubFolder(ModelFolder):
    """A model of a hub: every file is downloaded when it is first needed, all of one commit."""

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        cache_folder: Path | None = None,
        endpoint: str | None = None,
    ) -> None:
        """Download the config and the index of tensors.

        Args:
            model_id: "organisation/name".
            revision: branch, tag or commit; None is the default branch.
            cache_folder: where downloads are kept; None is the hub client's own cache.
            endpoint: base URL of the hub; None is the client's own (`HF_ENDPOINT`).

        Raises:
            ModelError: no such model or revision, no access, no network.
        """
        self.model_id = model_id
        self._revision = revision
        self._cache_folder = cache_folder
        self._endpoint = endpoint
        config_path = self._download("config.json")
        # Later downloads name the commit, or a push in between would mix two versions.
        self._revision = config_path.parent.name
        if self._download_if_there(INDEX) is None and self._download_if_there(SINGLE) is None:
            raise ModelError(
                f"{model_id} has no safetensors file; choose a revision that has "
                f"(often refs/pr/...) or {_HOW_TO_CONVERT}"
            )
        super().__init__(config_path.parent)

    def fetch_tokenizer(self) -> None:
        """Download the tokenizer's files, where the model has them."""
        for name in TOKENIZER_FILES:
            self._download_if_there(name)

    def _locate(self, shard: str) -> Path:
        return self._download(shard)

    def _download_if_there(self, name: str) -> Path | None:
        try:
            return self._download(name)
        except _NoSuchEntryError:
            return None

    def _download(self, name: str) -> Path:
        try:
            path = hf_hub_download(
                self.model_id,
                name,
                revision=self._revision,
                cache_dir=self._cache_folder,
                endpoint=self._endpoint,
            )
        except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
            raise _explain_hub_error(self.model_id, name, error) from error
        return Path(path)


def resolve_model(
    name: str | Path, revision: str | None = None, cache_folder: Path | None = None
) -> ModelFolder:
    """Open a model by whatever a user calls it.

    Args:
        name: a local folder, a .gguf file, or a hub id "organisation/name".
        revision: branch, tag or commit of a hub id; None is its default branch.
        cache_folder: where conversions and downloads are kept; None is the user's cache.

    Raises:
        ModelError: nothing of that name, or it cannot be read.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        root = default_cache_folder() if cache_folder is None else cache_folder
        return ModelFolder(import_gguf(path, root / "gguf"))
    if path.exists():
        return ModelFolder(path)
    if _HUB_ID.fullmatch(str(name)):
        hub_cache = None if cache_folder is None else cache_folder / "hub"
        return HubFolder(str(name), revision, hub_cache)
    raise ModelError(
        f"model {str(name)!r} is neither a folder, a .gguf file nor a hub id "
        '"organisation/name"; check the spelling'
    )


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cutlayer`, or `~/.cache/cutlayer`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "cutlayer"


_HOW_TO_CONVERT = (
    "convert it once on a machine that trusts it: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)


class _NoSuchEntryError(ModelError):
    """The repository exists and has no such file."""


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder; name the folder that holds config.json")
    if not (path / "config.json").is_file():
        if (path / "sealed.json").is_file():
            raise ModelError(
                f"{path} holds sealed weights; servers and enclaves open them with their owner's "
                "key, nothing else does"
            )
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"; name the file {ggufs[0]} itself" if ggufs else ""
        raise ModelError(f"{path} has no config.json, so it is no model folder{hint}")
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return
    pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt")) + sorted(path.glob("*.pth"))
    if pickled:
        raise ModelError(
            f"{pickled[0]} is a pickle, which may run code; cutlayer reads safetensors only: "
            + _HOW_TO_CONVERT
        )
    raise ModelError(f"{path} has neither {SINGLE} nor {INDEX}; copy the weights there")


def _parse_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        pairs = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a tensor index ({error}); download it again") from error
    for shard in pairs.values():
        # A hostile index must not reach files outside its folder.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{path} names the shard {shard!r}, which is no plain file name")
    return pairs


def _read_locally(load: Callable[..., T], path: Path, what: str) -> T:
    try:
        return load(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        raise ModelError(f"cannot read the {what} of {path}: {error}") from error


def _explain_hub_error(model_id: str, name: str, error: Exception) -> ModelError:
    what = f"{name} of {model_id}"
    if isinstance(error, GatedRepoError):
        return ModelError(f"{what} is gated; ask for access and log in with `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{model_id} has no such revision; check model.revision")
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(f"no model {model_id} on the hub; check the name or log in")
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return ModelError(
            f"{what} is not in the cache and the hub cannot be reached; "
            "connect, unset HF_HUB_OFFLINE, or give a local folder"
        )
    if isinstance(error, EntryNotFoundError):
        return _NoSuchEntryError(f"{model_id} has no file {name}")
    return ModelError(f"cannot download {what}: {error}")
