"""How fast a device multiplies exactly: every kernel of masked products against bf16.

Run it with `python -m benchmarks.masked_kernels --json`, on a GPU where there is one. It measures
nothing of what is inside (`masked`).

Shapes: N = tokens, K = inputs, O = outputs.
"""

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.report import Value, emit, median, parse_arguments, print_table
from cutlayer.tee.masked.field import PRIME
from cutlayer.tee.masked.kernels import KERNELS

__all__ = ["main"]

_LIMIT = 127


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    told = parse_arguments("exact products on a device", arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(told.threads[0])
    width, num_tokens, repeats = (128, 32, 3) if told.is_smoke else (4096, 2048, 10)
    x_NK = torch.randint(PRIME, (num_tokens, width), dtype=torch.int32, device=device)
    weight_OK = torch.randint(-_LIMIT, _LIMIT + 1, (width, width), device=device).to(torch.int8)
    plain_NK, plain_OK = x_NK.to(torch.bfloat16), weight_OK.to(torch.bfloat16)
    seconds = {"bf16": _time(lambda: plain_NK @ plain_OK.mT, repeats, device)}
    for name in KERNELS:
        # Without integer units a CPU takes minutes for one product.
        if name != "int8" or device.type == "cuda":
            seconds[name] = _time(
                lambda name=name: KERNELS.get(name).multiply(x_NK, weight_OK, _LIMIT),  # type: ignore[misc]
                repeats,
                device,
            )
    rows: list[Sequence[Value]] = [
        (name, taken / num_tokens * 1e6, taken / seconds["bf16"]) for name, taken in seconds.items()
    ]
    print_table(f"{width} x {width} on {device.type}", ("kernel", "us/token", "times bf16"), rows)
    result: dict[str, Value] = {"device": device.type, "width": width, "num_tokens": num_tokens}
    for name, taken in seconds.items():
        result[f"us_per_token_{name}"] = taken / num_tokens * 1e6
        result[f"times_bf16_{name}"] = taken / seconds["bf16"]
    emit(result, told)


def _time(work: Callable[[], torch.Tensor], repeats: int, device: torch.device) -> float:
    """Median seconds of one call, the device's queue included."""
    taken = []
    for _ in range(repeats + 1):
        began_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began_s)
    return median(taken, skip=1)


if __name__ == "__main__":
    main()
