"""Scene two: four owners of sentiment train together, and each is compared with itself alone.

It says what is simulated; `simulation` does it. `examples/federation.toml` says the same.
"""

from cutlayer.settings import parse_settings
from cutlayer.simulation.settings import SimulationSettings

__all__ = ["federation_settings"]


def federation_settings(seed: int = 0) -> SimulationSettings:
    """Four owners with four rows each; masked updates, the published noise on activations.

    A round of every_step is one step on the rows of all. Its optimizer is that of `train`, so that
    together and alone have the same steps and differ in rows alone.
    """
    strategy = {"kind": "every_step", "lr": 5e-4, "beta2": 0.999, "clip_norm": 1.0}
    table = {
        "simulation": {"seed": seed},
        "domains": {"train_rows": 4, "heldout_rows": 200},
        "model": {"path": "asset:smollm2", "lower": 2, "upper": 28, "threads": 2},
        "connection": {"codec": "bf16"},
        "privacy": {"mechanism": "gaussian", "scale": 0.02},
        "federation": {"name": "sentiment", "rounds": 20, "strategy": strategy},
        "adapter": {"rank": 8, "alpha": 16, "seed": seed},
        "train": {"rows_per_step": 4, "lr": 5e-4, "schedule": "constant"},
    }
    return parse_settings(SimulationSettings, table, "the demo's settings")
