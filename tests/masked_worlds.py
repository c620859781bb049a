"""Workers in threads of this process, and masked places that use them over real sockets."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor, nn

from cutlayer.tee.masked.dealer_key import DealerKey
from cutlayer.tee.masked.linear import MaskedLinear, MaskedPlace
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.offload import Accelerator
from cutlayer.tee.masked.quantise import quantise_weight
from cutlayer.tee.masked.sources import Pool, PoolLimits
from cutlayer.tee.masked.worker import Worker
from tests.worlds import Table

Tamper = Callable[[Tensor], Tensor]


class HostileAccelerator(Multiplier):
    """Computes honestly, then changes its answer; keeps what it saw."""

    def __init__(self, tamper: Tamper | None = None) -> None:
        super().__init__(name="hostile")
        self.tamper = tamper
        self.seen: list[Tensor] = []

    def multiply(self, name: str, masked_NK: Tensor, transpose: bool) -> Tensor:
        self.seen.append(masked_NK.clone())
        products_NM = super().multiply(name, masked_NK, transpose)
        return products_NM if self.tamper is None else self.tamper(products_NM)


def pooled_place(accelerator: Accelerator | None = None) -> MaskedPlace:
    """A place whose pads are made on the spot."""
    pool = Pool(PoolLimits(num_tokens=64, waits=True))
    return MaskedPlace(accelerator or Multiplier(), pool)


def masked(layer: nn.Linear, place: MaskedPlace, bits: int = 16) -> MaskedLinear:
    """The layer, masked."""
    assert bits in (8, 16)
    weight = quantise_weight(layer.weight, 16 if bits == 16 else 8)
    return MaskedLinear("layer", weight, place, layer.bias)


@contextmanager
def running_workers(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Addresses of an accelerator and of a dealer, and the dealer's public key."""
    key = DealerKey.load(folder / "dealer.key")
    accelerator = Worker("accelerator", Multiplier())
    dealer = Worker("dealer", Multiplier(), key)
    addresses = [worker.start("127.0.0.1:0") for worker in (accelerator, dealer)]
    try:
        yield addresses[0], addresses[1], key.public_hex
    finally:
        accelerator.stop()
        dealer.stop()


@contextmanager
def masked_table(folder: Path) -> Iterator[Table]:
    """The section [masked] of a server or a member, with workers that run."""
    with running_workers(folder) as (accelerator, dealer, key):
        yield {
            "accelerator": accelerator,
            "dealer": dealer,
            "dealer_key": key,
            "allow_same_machine": True,
        }


@contextmanager
def answering(serve: Callable[[socket.socket], None]) -> Iterator[Callable[..., socket.socket]]:
    """Opens connections whose other end is served by a thread."""
    ends: list[socket.socket] = []
    threads = []

    def open_(address: str, timeout_s: float) -> socket.socket:
        own, other = socket.socketpair()
        ends.append(other)
        thread = threading.Thread(target=serve, args=(other,), daemon=True)
        thread.start()
        threads.append(thread)
        return own

    try:
        yield open_
    finally:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(timeout=5)
        for end in ends:
            end.close()
