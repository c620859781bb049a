"""Every registered noise rule, one conformance class; settings that refuse silence."""

import math

import pytest
import torch

from cutlayer.errors import ConfigError
from cutlayer.privacy.mechanism import MECHANISMS, Gaussian, Mechanism, PrivacySettings
from cutlayer.privacy.noise import RowNoise
from cutlayer.settings import Settings, parse_settings

SCALES: dict[str, float | None] = {"none": None, "gaussian": 0.05}
"""A valid scale per registered rule; a new rule adds its own."""
N, D = 200, 64


def noise(key: int = 1, num_vectors: int = N) -> RowNoise:
    return RowNoise([bytes([key]) * 32], (num_vectors,))


def test_every_registered_rule_is_tested_here():
    assert set(SCALES) == set(MECHANISMS.names)


@pytest.mark.parametrize("name", sorted(SCALES))
class TestMechanismConformance:
    def rule(self, name: str) -> Mechanism:
        return MECHANISMS.make(name, SCALES[name])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_shape_and_dtype(self, name: str, dtype: torch.dtype):
        x = torch.randn(N, D).to(dtype)
        y = self.rule(name).apply(x, noise())
        assert y.shape == x.shape
        assert y.dtype == dtype

    def test_gradient_passes_unchanged(self, name: str):
        x = torch.randn(N, D, requires_grad=True)
        upstream = torch.randn(N, D)
        self.rule(name).apply(x, noise()).backward(upstream)
        assert x.grad is not None
        assert x.grad.equal(upstream)

    def test_leaves_its_input_alone(self, name: str):
        x = torch.randn(N, D)
        before = x.clone()
        self.rule(name).apply(x, noise())
        assert x.equal(before)

    def test_is_deterministic_by_key(self, name: str):
        x = torch.randn(N, D)
        first = self.rule(name).apply(x, noise())
        assert first.equal(self.rule(name).apply(x, noise()))

    def test_is_unbiased(self, name: str):
        x = torch.randn(N, D)
        error = (self.rule(name).apply(x, noise()) - x).double()
        assert abs(float(error.mean())) <= 5 * float(error.std()) / math.sqrt(N * D)

    def test_event_and_label_say_the_rule_and_its_scale(self, name: str):
        rule = self.rule(name)
        event = rule.event(7)
        assert (event.mechanism, event.scale, event.num_vectors) == (name, SCALES[name], 7)
        assert rule.label.startswith(name)
        assert SCALES[name] is None or repr(SCALES[name]) in rule.label

    def test_says_what_it_promises(self, name: str):
        assert self.rule(name).guarantee


def test_guarantees_read_as_documented():
    assert MECHANISMS.make("none").guarantee == "no noise: none"
    assert MECHANISMS.make("gaussian", 0.02).guarantee == "no guarantee (unclipped)"


def test_none_changes_nothing():
    x = torch.randn(3, 4)
    assert MECHANISMS.make("none").apply(x, noise(num_vectors=3)) is x


@pytest.mark.parametrize("scale", [0.02, 0.05, 0.1, 3.0])
def test_gaussian_scale_is_the_mean_absolute_noise(scale: float):
    x = torch.zeros(2000, D)
    z = Gaussian(scale).apply(x, noise(num_vectors=2000)).double()
    count, sigma = z.numel(), scale * math.sqrt(math.pi / 2)
    assert abs(float(z.abs().mean()) - scale) < 5 * sigma * math.sqrt(1 - 2 / math.pi) / count**0.5
    assert abs(float(z.square().mean()) - sigma**2) < 5 * sigma**2 * math.sqrt(2 / count)
    assert abs(float(z.pow(4).mean()) - 3 * sigma**4) < 5 * sigma**4 * math.sqrt(96 / count)


def test_different_keys_noise_the_same_input_independently():
    x = torch.zeros(2000, D)
    a = Gaussian(1.0).apply(x, noise(1, 2000)).double()
    b = Gaussian(1.0).apply(x, noise(2, 2000)).double()
    correlation = float((a * b).mean()) / float(a.std() * b.std())
    assert abs(correlation) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, math.inf, math.nan])
def test_gaussian_refuses_a_scale_that_is_none(scale: float | None):
    with pytest.raises(ConfigError, match="needs a scale above 0"):
        MECHANISMS.make("gaussian", scale)


def test_none_refuses_a_scale():
    with pytest.raises(ConfigError, match="takes no scale"):
        MECHANISMS.make("none", 0.02)


def test_an_unknown_rule_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'gausian' is unknown; known: gaussian, none"):
        MECHANISMS.make("gausian", 0.1)


class Outer(Settings):
    privacy: PrivacySettings


def test_a_run_without_noise_has_to_say_so():
    with pytest.raises(ConfigError, match=r'has to say so \(mechanism = "none"\)'):
        parse_settings(PrivacySettings, {}, where="run.toml")
    with pytest.raises(ConfigError, match=r"run.toml: privacy.*has to say so"):
        parse_settings(Outer, {"privacy": {"scale": 0.1}}, where="run.toml")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"mechanism": "gaussian"}, "needs a scale"),
        ({"mechanism": "none", "scale": 0.1}, "takes no scale"),
        ({"mechanism": "laplace", "scale": 0.1}, "known: gaussian, none"),
        ({"mechanism": "none", "gradient_mechanism": "gaussian"}, "needs a scale"),
        ({"mechanism": "none", "mechanisms": "none"}, "did you mean mechanism"),
    ],
)
def test_settings_refuse_what_makes_no_sense(table: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        parse_settings(PrivacySettings, table, where="run.toml")


def test_settings_build_both_rules():
    table = {"mechanism": "gaussian", "scale": 0.02, "gradient_mechanism": "gaussian"}
    settings = parse_settings(PrivacySettings, table | {"gradient_scale": 1e-4}, where="run.toml")
    assert settings.activation_rule().label == "gaussian scale=0.02"
    assert settings.gradient_rule().label == "gaussian scale=0.0001"
    assert parse_settings(PrivacySettings, {"mechanism": "none"}, where="x").gradient_scale is None
