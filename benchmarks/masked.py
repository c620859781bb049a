"""Masked layers: how exact, how safe against wrong products, what inside and what elsewhere.

Run it with `python -m benchmarks.masked --json`; `--profile smoke` takes seconds. One core.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.masked_errors import (
    TAMPERINGS,
    count_detected,
    layer_errors,
    measure_uniformity,
)
from benchmarks.masked_speed import LayerCost, measure_layer
from benchmarks.masked_training import final_losses
from benchmarks.report import Value, emit, parse_arguments, print_table

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    told = parse_arguments("masked linear layers", arguments)
    torch.set_num_threads(1)
    widths = (64, 128) if told.is_smoke else (576, 2048, 4096)
    repeats, num_tokens = (3, 16) if told.is_smoke else (15, 64)
    costs = [
        measure_layer(width, tokens, bits, repeats)
        for width in widths
        for tokens in (num_tokens, 4 * num_tokens)
        for bits in (8, 16)
    ]
    _show(costs)
    result: dict[str, Value] = {
        **_errors(widths[-1], num_tokens),
        **_tampering(20 if told.is_smoke else 2000),
        **_costs(costs, num_tokens),
        **_uniformity(32 if told.is_smoke else 512),
        **_training(12 if told.is_smoke else 200),
    }
    emit(result, told)


def _errors(width: int, num_tokens: int) -> dict[str, Value]:
    forward, backward = layer_errors(width, num_tokens, 16)
    of_eight, _ = layer_errors(width, num_tokens, 8)
    return {
        "rel_err_forward": forward,
        "rel_err_backward": backward,
        "rel_err_forward_8_bits": of_eight,
    }


def _tampering(times: int) -> dict[str, Value]:
    detected = {name: count_detected(name, times) for name in TAMPERINGS}
    print_table(
        "tampered products",
        ("kind", "tampered", "detected"),
        [(name, times, found) for name, found in detected.items()],
    )
    return {"tampered": times * len(detected), "detected": sum(detected.values())}


def _costs(costs: Sequence[LayerCost], num_tokens: int) -> dict[str, Value]:
    found: dict[str, Value] = {}
    largest = max(cost.width for cost in costs)
    for cost in costs:
        if cost.num_tokens != num_tokens:
            continue
        name = f"_{cost.width}_{cost.weight_bits}_bits"
        found[f"online_speedup{name}"] = cost.online_speedup
        found[f"offline_ratio{name}"] = cost.offline_ratio
        if cost.width == largest and cost.weight_bits == 16:
            found["online_speedup"] = cost.online_speedup
            found["offline_ratio"] = cost.offline_ratio
            found["inside_us_per_token"] = cost.inside_us
            found["layer_us_per_token"] = cost.layer_us
            found["bytes_per_token"] = cost.bytes_per_token
    return found


def _uniformity(num_tokens: int) -> dict[str, Value]:
    found = measure_uniformity(num_tokens, 1024)
    return {
        "chi_square_sigmas": found.chi_square,
        "kolmogorov": found.kolmogorov,
        "worst_bit_sigmas": found.worst_bit,
        "correlation_sigmas": found.correlation,
    }


def _training(steps: int) -> dict[str, Value]:
    with tempfile.TemporaryDirectory() as folder:
        plain, masked = final_losses(Path(folder), steps)
    return {
        "plain_loss": plain,
        "masked_loss": masked,
        "loss_difference": abs(masked - plain) / plain,
    }


def _show(costs: Sequence[LayerCost]) -> None:
    # Two tables: a terminal of 80 columns cuts the numbers of one.
    times: list[Sequence[Value]] = [
        (
            f"{cost.width}, {cost.num_tokens}, {cost.weight_bits}",
            cost.layer_us,
            cost.inside_us,
            cost.backward_us,
            cost.unsealing_us,
            cost.pad_us,
        )
        for cost in costs
    ]
    ratios: list[Sequence[Value]] = [
        (case[0], cost.online_speedup, cost.offline_ratio, cost.bytes_per_token)
        for case, cost in zip(times, costs, strict=True)
    ]
    case = "width, tokens, bits"
    print_table(
        "microseconds of one core per token",
        (case, "layer", "inside", "backward", "unsealing", "pad"),
        times,
    )
    print_table("against the layer", (case, "online speedup", "offline ratio", "bytes"), ratios)


if __name__ == "__main__":
    main()
