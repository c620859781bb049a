"""The small adapter that stands where the trunk was, for guesses by the owner's own parts.

It does not guess (`draft_self`). It learns from pairs that the owner sees anyway: what left the
head, and what the trunk gave back for it. It stays at the owner; no server learns of it.

Shapes: N = vectors, D = hidden size, R = rank.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.errors import ConfigError, StorageError
from cutlayer.storage.files import read_private, write_atomic
from cutlayer.storage.vault import Vault

__all__ = ["Distiller", "DraftAdapter", "load_draft_adapter", "save_draft_adapter"]

FILE_NAME = "draft_adapter.safetensors"

_RANK = 128
_LR = 2e-3
_BATCH_VECTORS = 256
_KEPT_VECTORS = 4096
_TAKEN_SHARE = 8
"""One vector of so many is taken, so that learning is a small part of any step."""
_STEP_VECTORS = 64
"""New vectors between two steps, and those taken from one call at most."""
_MAX_NORM = 1.0
_TINY = 1e-6


class DraftAdapter(nn.Module):
    """y = h + up(gelu(down(h / rms(h)))) * rms(h): of low rank, nothing at first."""

    def __init__(self, hidden_size: int, rank: int = _RANK, seed: int = 0) -> None:
        """Weights in float32; the global random generator is not touched.

        Args:
            hidden_size: D.
            rank: R; 2 * D * R weights and some biases.
            seed: of the first weights.
        """
        super().__init__()
        self.down_RD = nn.Parameter(torch.empty(rank, hidden_size))
        self.down_bias_R = nn.Parameter(torch.zeros(rank))
        self.up_DR = nn.Parameter(torch.zeros(hidden_size, rank))
        self.up_bias_D = nn.Parameter(torch.zeros(hidden_size))
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.down_RD, std=1 / math.sqrt(hidden_size), generator=generator)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.up_DR.shape[0]

    def forward(self, h_ND: Tensor) -> Tensor:
        """What the trunk may give for h; [N, D] in and out, in the dtype of h."""
        x_ND = h_ND.float()
        size_N1 = _rms(x_ND)
        inner_NR = functional.gelu(
            functional.linear(x_ND / size_N1, self.down_RD, self.down_bias_R)
        )
        change_ND = functional.linear(inner_NR, self.up_DR, self.up_bias_D)
        return (x_ND + change_ND * size_N1).to(h_ND.dtype)


class Distiller:
    """Trains an adapter beside other work: few vectors of a call, a small step now and then."""

    def __init__(self, adapter: DraftAdapter, seed: int = 0) -> None:
        """Start without vectors.

        Args:
            adapter: changed in place.
            seed: which vectors are taken.
        """
        self.adapter = adapter
        self.num_steps = 0
        self._optimizer = torch.optim.AdamW(adapter.parameters(), lr=_LR, weight_decay=0.01)
        self._generator = torch.Generator().manual_seed(seed)
        self._kept_2ND = torch.empty(2, _KEPT_VECTORS, adapter.hidden_size)
        self._num_seen = 0
        self._num_fresh = 0

    def observe(self, h_ND: Tensor, y_ND: Tensor) -> None:
        """Take some pairs of a call, and learn where enough have come.

        Args:
            h_ND: what the trunk was given (released: noise included).
            y_ND: what it gave back.

        Raises:
            ConfigError: shapes that do not fit the adapter.
        """
        if h_ND.shape != y_ND.shape or h_ND.shape[1:] != (self.adapter.hidden_size,):
            raise ConfigError(
                f"pairs of {tuple(h_ND.shape)} and {tuple(y_ND.shape)} for a draft adapter of "
                f"width {self.adapter.hidden_size}; give [N, {self.adapter.hidden_size}] twice"
            )
        # Generation runs in inference mode, whose tensors cannot be learnt from.
        with torch.inference_mode(False), torch.enable_grad():
            self._take(h_ND, y_ND)
            if self._num_fresh >= _STEP_VECTORS:
                self._num_fresh -= _STEP_VECTORS
                self._step()

    def relative_error(self, h_ND: Tensor, y_ND: Tensor) -> float:
        """Mean squared error of the guessed outputs, as a share of that of y = h."""
        with torch.no_grad():
            error = _distance(self.adapter(h_ND), y_ND)
            return float(error / _distance(h_ND, y_ND).clamp_min(_TINY))

    @property
    def _num_kept(self) -> int:
        return min(self._num_seen, _KEPT_VECTORS)

    def _take(self, h_ND: Tensor, y_ND: Tensor) -> None:
        num = min(-(-len(h_ND) // _TAKEN_SHARE), _STEP_VECTORS)
        chosen_N = torch.randperm(len(h_ND), generator=self._generator)[:num].to(h_ND.device)
        pairs_2ND = torch.stack([x_ND.detach()[chosen_N].float().cpu() for x_ND in (h_ND, y_ND)])
        pairs_2ND = pairs_2ND[:, pairs_2ND.isfinite().all(-1).all(0)]
        places_N = (self._num_seen + torch.arange(pairs_2ND.shape[1])) % _KEPT_VECTORS
        self._kept_2ND[:, places_N] = pairs_2ND
        self._num_seen += len(places_N)
        self._num_fresh += len(places_N)

    def _step(self) -> None:
        chosen_N = torch.randint(self._num_kept, (_BATCH_VECTORS,), generator=self._generator)
        h_ND, y_ND = self._kept_2ND[:, chosen_N]
        self._optimizer.zero_grad()
        loss = _distance(self.adapter(h_ND), y_ND)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.adapter.parameters(), _MAX_NORM)
        self._optimizer.step()
        self.num_steps += 1


def save_draft_adapter(adapter: DraftAdapter, folder: Path, vault: Vault) -> None:
    """Write the adapter into a run's folder, sealed as the rest of it.

    Raises:
        StorageError: it cannot be written.
    """
    state = {name: tensor.detach().contiguous() for name, tensor in adapter.state_dict().items()}
    write_atomic(folder / FILE_NAME, vault.seal(save(state), FILE_NAME))


def load_draft_adapter(folder: Path, vault: Vault, hidden_size: int) -> DraftAdapter | None:
    """The adapter of a run's folder; None where none was saved.

    Raises:
        StorageError: the file is damaged, or of a model of another width.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        state = load(vault.open(read_private(path), FILE_NAME))
    except SafetensorError as error:
        raise StorageError(f"{path} is damaged ({error}); delete it and distil again") from error
    adapter = DraftAdapter(hidden_size, rank=_rank_of(state, path))
    _check(state, adapter, path)
    adapter.load_state_dict(state)
    return adapter


def _rank_of(state: Mapping[str, Tensor], path: Path) -> int:
    down_RD = state.get("down_RD")
    if down_RD is None or down_RD.ndim != 2:
        raise StorageError(f"{path} holds no draft adapter; delete it and distil again")
    return len(down_RD)


def _check(state: Mapping[str, Tensor], adapter: DraftAdapter, path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        raise StorageError(
            f"{path} holds {found}, this model needs {expected}; delete it and distil again"
        )
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise StorageError(f"{path} has weights that are not finite; delete it and distil again")


def _distance(guessed_ND: Tensor, y_ND: Tensor) -> Tensor:
    """Mean squared difference in units of each y: no large vector outweighs the others."""
    y_ND = y_ND.float()
    return (((guessed_ND.float() - y_ND) / _rms(y_ND)) ** 2).mean()


def _rms(x_ND: Tensor) -> Tensor:
    return x_ND.square().mean(-1, keepdim=True).sqrt().clamp_min(_TINY)
