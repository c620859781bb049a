"""Scene two: four owners of sentiment train together, and each is compared with itself alone.

It says what is simulated; `simulation` does it. `examples/federation.toml` says the same.
"""

from cutlayer.settings import parse_settings
from cutlayer.simulation.settings import SimulationSettings

__all__ = ["federation_settings"]


def federation_settings(seed: int = 0) -> SimulationSettings:
    """Four owners with a dozen rows each; masked updates, the published noise on activations."""
    table = {
        "simulation": {"seed": seed},
        "domains": {"train_rows": 12, "heldout_rows": 200},
        "model": {"path": "asset:smollm2", "lower": 2, "upper": 28, "threads": 2},
        "connection": {"codec": "bf16"},
        "privacy": {"mechanism": "gaussian", "scale": 0.02},
        "federation": {"name": "sentiment", "rounds": 4, "local_steps": 5},
        "adapter": {"rank": 8, "alpha": 16, "seed": seed},
        "train": {"rows_per_step": 8, "lr": 5e-4, "schedule": "constant"},
    }
    return parse_settings(SimulationSettings, table, "the demo's settings")
