"""The settings of scene two: what makes together and alone comparable."""

from cutlayer.demo.federation import federation_settings
from cutlayer.simulation.parties import num_steps


def test_together_and_alone_take_the_same_steps_with_the_same_optimizer() -> None:
    settings = federation_settings()
    train, server = settings.train, settings.federation.strategy
    assert server.kind == "every_step"
    assert num_steps(settings.federation) == 20
    assert server.lr == train.lr
    assert server.clip_norm == train.clip_norm
    assert (server.beta1, server.beta2) == (train.optimizer.beta1, train.optimizer.beta2)
    assert (server.eps, server.weight_decay) == (train.optimizer.eps, train.optimizer.weight_decay)
    assert train.schedule == "constant"


def test_every_owner_learns_from_all_of_its_rows_in_every_step() -> None:
    settings = federation_settings()
    assert settings.domains is not None
    assert settings.train.rows_per_step == settings.domains.train_rows


def test_the_seed_chooses_the_rows_and_the_first_weights() -> None:
    settings = federation_settings(seed=2)
    assert settings.simulation.seed == 2
    assert settings.federation.adapter.seed == 2
