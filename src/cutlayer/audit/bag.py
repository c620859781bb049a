"""What a bag of named tokens is worth by chance. It scores nothing else."""

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["bag_chance"]

_DRAWS = 100


def bag_chance(
    bags: Mapping[int, set[int]],
    named: Mapping[int, set[int]],
    pool: Sequence[int],
    seed: int,
) -> tuple[float, float]:
    """Share of random bags that the named tokens cover: mean over draws, and its spread.

    Args:
        bags: the true tokens by round; a random bag has as many different ones.
        named: the guessed tokens of the same rounds.
        pool: tokens as often as they occur in public text; a bag is drawn from it.
        seed: of the draws.
    """
    num_wanted = sum(map(len, bags.values()))
    tokens, counts = np.unique(np.asarray(pool, dtype=np.int64), return_counts=True)
    if not len(tokens):
        return 0.0, 1 / num_wanted
    generator = np.random.default_rng(seed)
    weights = counts / counts.sum()
    is_named = {n: np.isin(tokens, list(named[n])) for n in bags}
    shares = []
    for _ in range(_DRAWS):
        found = 0
        for number, bag in bags.items():
            size = min(len(bag), len(tokens))
            drawn = generator.choice(len(tokens), size, replace=False, p=weights)
            found += int(is_named[number][drawn].sum())
        shares.append(found / num_wanted)
    return float(np.mean(shares)), max(float(np.std(shares)), 1 / num_wanted)
