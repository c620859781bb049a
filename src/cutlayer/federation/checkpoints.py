"""What a finished round leaves behind, as files' bytes. It does not write them (`store`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from safetensors.torch import save
from torch import Tensor

from cutlayer.model.adapters import AdapterState
from cutlayer.model.tensor_file import read_tensors

__all__ = ["Checkpoint"]

_STATE, _STRATEGY = "state.safetensors", "strategy.safetensors"
_SUM, _SEALED = "sum.safetensors", "sealed.bin"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The federation's state after a round."""

    state: AdapterState
    """Adapters of head and tail (unless hidden) and of the trunk, under `state.owned_key`."""
    strategy: Mapping[str, Tensor] = field(default_factory=dict)
    """The server optimizer's moments."""
    hidden_sum: Tensor | None = None
    """Where the aggregate is hidden: the padded sum of this round, int64."""
    sealed: bytes = b""
    """Where the aggregate is hidden: the state before this round, which members can open."""

    def files(self) -> dict[str, bytes]:
        """Content by file name."""
        files = {_STATE: _saved(self.state), _STRATEGY: _saved(self.strategy)}
        if self.hidden_sum is not None:
            files[_SUM] = _saved({"sum": self.hidden_sum})
            files[_SEALED] = self.sealed
        return files

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> "Checkpoint":
        """What `files` gave.

        Raises:
            StorageError: one is missing or damaged.
        """
        return cls(
            state=read_tensors(files, _STATE),
            strategy=read_tensors(files, _STRATEGY),
            hidden_sum=read_tensors(files, _SUM)["sum"] if _SUM in files else None,
            sealed=files.get(_SEALED, b""),
        )


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    content: bytes = save({key: value.contiguous() for key, value in tensors.items()})
    return content
