"""One trunk over several processes: rank 0 serves, the others follow what it computes.

It does not shard (`model.tensor_parallel`) nor start processes (`torchrun` does). Followers know no
clients, runs, steps or files: a leader's call of the trunk tells them to make the same call on
their share, its backward to run theirs. So whatever the leader's server does with its trunk works.

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

import itertools
import os
import signal
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from cutlayer.errors import ConfigError, CutlayerError, TransportError
from cutlayer.model.adapter_mirror import AdapterChange, AdapterCopies, AdapterSource
from cutlayer.model.checkpoint import DTYPES, load_part
from cutlayer.model.collectives import Ranks, join_ranks, own_device
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.part_settings import TrunkWeights
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.model.rows import Rows
from cutlayer.model.tensor_parallel import ParallelTrunk, load_parallel_trunk
from cutlayer.model.threads import set_threads
from cutlayer.server.settings import TrunkSettings

__all__ = [
    "follow",
    "follow_leader",
    "is_follower",
    "is_parallel",
    "parallel_trunk",
    "stop_followers",
    "when_lost",
]

DEFAULT_TIMEOUT_S = 120.0
"""A rank that says nothing for this long within one call is lost."""


def is_parallel() -> bool:
    """Whether `torchrun` started several processes for one trunk."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_follower() -> bool:
    """Whether `torchrun` started this process to compute for another that serves."""
    return is_parallel() and os.environ.get("RANK", "0") != "0"


def parallel_trunk(
    source: ModelFolder | str | Path,
    cut: Cut,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    ranks: Ranks | None = None,
    weights: TrunkWeights = TrunkWeights.FULL,
) -> Trunk:
    """The trunk of this process: whole where it is alone, its share where `torchrun` started more.

    Args:
        source: as `checkpoint.load_part`.
        cut: where the model is cut.
        dtype: of the weights.
        device: plain "cuda" is the GPU that torchrun counts for this process.
        timeout_s: a process that is silent for longer within one call is lost.
        ranks: processes that have met already; None meets those that torchrun started.
        weights: as `checkpoint.load_part`.

    Raises:
        ConfigError: as `checkpoint.load_part`; or weights of several processes are not full.
        ModelError: also where the family has no plan, or its heads cannot be shared out.
        TransportError: the processes did not meet.
    """
    if ranks is None and not is_parallel():
        trunk = load_part(source, cut, Part.TRUNK, dtype, device, weights)
        assert isinstance(trunk, Trunk)
        return trunk
    if weights is not TrunkWeights.FULL:
        raise ConfigError(
            f'model.trunk_weights = "{weights}" is for a trunk in one process, and torchrun shares '
            'this one out over several: set it to "full", or start the server without torchrun'
        )
    place = own_device(device)
    ranks = ranks or join_ranks(place, timeout_s)
    shared = load_parallel_trunk(source, cut, dtype, place, ranks)
    if shared.ranks.is_leader:
        shared.mirror = _Leader(shared)
    return shared


def follow_leader(model: TrunkSettings) -> None:
    """All that a follower does: load its share, follow until the leader stops.

    SIGTERM and SIGINT are ignored from here on: `torchrun` sends them to every process, and the
    leader still needs this one to drain.

    Raises:
        ConfigError: as `parallel_trunk`.
        TransportError: the leader is gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    set_threads(model.threads)
    folder = resolve_model(model.path, model.revision)
    cut = Cut(model.lower, model.upper)
    trunk = parallel_trunk(folder, cut, model.dtype, model.device, weights=model.trunk_weights)
    trunk.decode_threads = model.decode_threads
    try:
        follow(trunk)
    finally:
        assert isinstance(trunk, ParallelTrunk)
        trunk.ranks.leave()


def follow(trunk: Trunk) -> None:
    """Compute what the leader computes, until it says stop.

    Raises:
        TransportError: the leader is gone.
    """
    assert isinstance(trunk, ParallelTrunk)
    _Follower(trunk).run()


def stop_followers(trunk: Trunk) -> None:
    """End the other processes of a leader's trunk; a whole trunk has none."""
    if isinstance(trunk, ParallelTrunk) and trunk.mirror is not None:
        trunk.mirror.stop()
        trunk.ranks.leave()


def when_lost(trunk: Trunk, callback: Callable[[str], None]) -> None:
    """Call back with the reason when a process of this trunk is gone: this one has to end too."""
    if isinstance(trunk, ParallelTrunk):
        trunk.ranks.when_lost(callback)


class _Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """Tensors follow: h [N, D], then the adapters' weights."""

    number: int
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    dtype: str
    caches: list[tuple[int, int]] | None
    """Number and token limit of each row's cache."""
    adapters: AdapterChange
    needs_graph: bool
    wants_input_grad: bool
    is_training: bool
    is_inference: bool
    random_state: bytes
    """Of the device's generator, for dropout; empty where nothing is dropped."""
    gone_calls: list[int]
    """Calls whose graphs are no longer needed."""
    gone_caches: list[int]


class _Backward(msgspec.Struct, frozen=True, kw_only=True, tag="backward"):
    """A tensor follows: the gradient of the call's output [N, D]."""

    number: int


class _Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """No command follows."""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Call | _Backward | _Stop)


class _LeadingCall:
    """One call under way; when it is gone, so is its graph."""

    def __init__(self, ranks: Ranks, number: int) -> None:
        self._ranks = ranks
        self._number = number

    def backward(self, grad_ND: Tensor) -> None:
        """Tell the followers, who then meet this process in the sums of its own backward."""
        self._ranks.tell(_ENCODER.encode(_Backward(number=self._number)))
        self._ranks.from_leader(grad_ND.detach().contiguous())


class _Leader:
    """Implements `model.tensor_parallel.Mirror` at rank 0."""

    def __init__(self, trunk: ParallelTrunk) -> None:
        self._trunk = trunk
        self._adapters = AdapterSource(trunk)
        self._numbers = itertools.count()
        self._cache_numbers: weakref.WeakKeyDictionary[RowCache, int] = weakref.WeakKeyDictionary()
        # Filled by finalizers, which may run in any thread.
        self._gone_calls: deque[int] = deque()
        self._gone_caches: deque[int] = deque()

    def call(self, h_ND: Tensor, rows: Rows, caches: Sequence[RowCache] | None) -> _LeadingCall:
        change, vectors = self._adapters.changes()
        number = next(self._numbers)
        command = _Call(
            number=number,
            lengths=rows.lengths,
            starts=rows.starts,
            dtype=str(h_ND.dtype).removeprefix("torch."),
            caches=None if caches is None else [self._number_of(cache) for cache in caches],
            adapters=change,
            needs_graph=torch.is_grad_enabled(),
            wants_input_grad=h_ND.requires_grad,
            is_training=self._trunk.training,
            is_inference=torch.is_inference_mode_enabled(),
            random_state=_random_state(h_ND.device) if self._trunk.training else b"",
            gone_calls=_drain(self._gone_calls),
            gone_caches=_drain(self._gone_caches),
        )
        ranks = self._trunk.ranks
        ranks.tell(_ENCODER.encode(command))
        for tensor in (h_ND.detach().contiguous(), *vectors):
            ranks.from_leader(tensor)
        call = _LeadingCall(ranks, number)
        weakref.finalize(call, self._gone_calls.append, number).atexit = False
        return call

    def stop(self) -> None:
        """Let the followers end; those that are gone have."""
        with suppress(TransportError):
            self._trunk.ranks.tell(_ENCODER.encode(_Stop()))

    def _number_of(self, cache: RowCache) -> tuple[int, int]:
        if cache not in self._cache_numbers:
            number = next(self._numbers)
            self._cache_numbers[cache] = number
            weakref.finalize(cache, self._gone_caches.append, number).atexit = False
        return self._cache_numbers[cache], cache.max_length


class _Follower:
    """Every rank but the leader's."""

    def __init__(self, trunk: ParallelTrunk) -> None:
        self._trunk = trunk
        self._adapters = AdapterCopies(trunk)
        self._caches: dict[int, RowCache] = {}
        self._outputs_ND: dict[int, Tensor] = {}

    def run(self) -> None:
        """Until the leader stops."""
        while not isinstance(command := _DECODER.decode(self._trunk.ranks.hear()), _Stop):
            if isinstance(command, _Call):
                self._call(command)
            else:
                self._backward(command)

    def _call(self, command: _Call) -> None:
        for number in command.gone_calls:
            self._outputs_ND.pop(number, None)
        for number in command.gone_caches:
            self._caches.pop(number, None)
        h_ND = self._receive_call(command)
        rows = Rows(lengths=command.lengths, starts=command.starts)
        self._trunk.train(command.is_training)
        _set_random_state(h_ND.device, command.random_state)
        try:
            with (
                torch.inference_mode(command.is_inference),
                torch.set_grad_enabled(command.needs_graph),
                self._adapters.using(command.adapters),
            ):
                y_ND = self._trunk(h_ND, rows, self._caches_of(command))
        except TransportError:
            raise
        except CutlayerError:
            # Refused by the same check as at the leader, which tells the client.
            return
        if y_ND.requires_grad:
            self._outputs_ND[command.number] = y_ND

    def _receive_call(self, command: _Call) -> Tensor:
        ranks, like = self._trunk.ranks, self._trunk.zeros_ND(1)
        shape = (sum(command.lengths), self._trunk.hidden_size)
        h_ND = torch.empty(shape, dtype=DTYPES[command.dtype], device=like.device)
        ranks.from_leader(h_ND)
        counts = [count for _, count in command.adapters.loaded]
        vectors = [ranks.from_leader(torch.empty(count, device=like.device)) for count in counts]
        self._adapters.apply(command.adapters, vectors)
        return h_ND.requires_grad_(command.wants_input_grad)

    def _backward(self, command: _Backward) -> None:
        y_ND = self._outputs_ND[command.number]
        grad_ND = self._trunk.ranks.from_leader(torch.empty_like(y_ND))
        # The leader may come back to this graph; it says when it does not.
        y_ND.backward(grad_ND, retain_graph=True)
        self._adapters.clear_gradients()

    def _caches_of(self, command: _Call) -> list[RowCache] | None:
        if command.caches is None:
            return None
        found = []
        for (number, max_length), start in zip(command.caches, command.starts, strict=True):
            if number not in self._caches:
                self._caches[number] = RowCache(len(self._trunk.block_range), max_length)
            self._caches[number].truncate(start)
            found.append(self._caches[number])
        return found


def _drain(gone: deque[int]) -> list[int]:
    return [gone.popleft() for _ in range(len(gone))]


def _random_state(device: torch.device) -> bytes:
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state.numpy().tobytes()


def _set_random_state(device: torch.device, state: bytes) -> None:
    if not state:
        return
    values = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.set_rng_state(values, device)
    else:
        torch.set_rng_state(values)
