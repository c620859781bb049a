"""Every registered noise rule, one conformance class; settings that refuse silence."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.mechanism import (
    MECHANISMS,
    Gaussian,
    Mechanism,
    NoiseForm,
    PrivacySettings,
    ReleaseUnit,
    Withhold,
)
from cutlayer.privacy.noise import RowNoise
from cutlayer.settings import Settings, parse_settings, settings_digest

RULES: dict[str, tuple[float | None, float | None]] = {
    "none": (None, None),
    "gaussian": (0.05, None),
    "clipped_gaussian": (0.5, 3.0),
    "matrix_gaussian": (0.1, 40.0),
    "metric_dp": (8.0, 3.0),
}
"""Valid scale and clip per registered rule; a new rule adds its own. The clips bind on randn(D)."""
N, D = 200, 64


def noise(key: int = 1, num_vectors: int = N) -> RowNoise:
    """Of two rows, so that a rule of whole rows has to tell them apart."""
    first = num_vectors // 4
    keys = [bytes([key]) * 32, bytes([key + 100]) * 32]
    return RowNoise(keys, (first, num_vectors - first))


def norms_of_units(rule: Mechanism, x: Tensor) -> Tensor:
    """L2 norms of what one application covers: vectors, or the two rows of `noise`."""
    if rule.event(1).unit is ReleaseUnit.VECTOR:
        return x.double().norm(dim=1)
    return torch.stack([row.double().norm() for row in x.split((N // 4, N - N // 4))])


class NoNormals:
    """All noise is 0, or for rules that stretch it as short as can be."""

    lengths = noise().lengths

    def standard_normal(self, num_vectors: int, width: int) -> Tensor:
        return torch.full((num_vectors, width), 1e-30)


def test_every_registered_rule_is_tested_here():
    assert set(RULES) == set(MECHANISMS.names)


@pytest.mark.parametrize("name", sorted(RULES))
class TestMechanismConformance:
    def rule(self, name: str) -> Mechanism:
        return MECHANISMS.make(name, *RULES[name])

    def signal(self, name: str, x: Tensor) -> Tensor:
        """What the rule shows of x without its noise."""
        return self.rule(name).apply(x, NoNormals())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_shape_and_dtype(self, name: str, dtype: torch.dtype):
        x = torch.randn(N, D).to(dtype)
        y = self.rule(name).apply(x, noise())
        assert y.shape == x.shape
        assert y.dtype == dtype

    def test_computes_in_float32_and_rounds_once(self, name: str):
        x = torch.randn(N, D).bfloat16()
        exact = self.rule(name).apply(x.float(), noise())
        assert self.rule(name).apply(x, noise()).equal(exact.bfloat16())

    def test_no_signal_is_longer_than_the_clip(self, name: str):
        rule, clip = self.rule(name), RULES[name][1]
        x = torch.randn(N, D) * torch.logspace(-3, 12, N)[:, None]
        norms = norms_of_units(rule, self.signal(name, x))
        if clip is None:
            assert self.signal(name, x).equal(x)
        else:
            assert float(norms.max()) <= clip
            assert float(norms.max()) > clip * (1 - 1e-4)

    def test_what_is_within_the_clip_is_not_touched(self, name: str):
        x = torch.randn(N, D)
        x *= 0.99 * (RULES[name][1] or 1) / norms_of_units(self.rule(name), x).max()
        assert self.signal(name, x).equal(x)

    @pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
    def test_gradient_is_that_of_the_signal(self, name: str, size: float):
        x = (torch.randn(N, D) * size).requires_grad_()
        upstream = torch.randn(N, D)
        self.rule(name).apply(x, noise()).backward(upstream)
        assert x.grad is not None
        # Along a direction the slope is that of the clipped vectors; the noise has none.
        direction, step = torch.randn(N, D), 1e-3 * size
        ahead, behind = (self.signal(name, x.detach() + s * direction) for s in (step, -step))
        slope = float(((ahead.double() - behind.double()) / (2 * step) * upstream).sum())
        assert float((x.grad.double() * direction).sum()) == pytest.approx(slope, rel=0.02, abs=0.5)

    @pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
    def test_extreme_vectors_have_finite_values_and_gradients(self, name: str, size: float):
        x = torch.full((N, D), size, requires_grad=True)
        y = self.rule(name).apply(x, noise())
        y.sum().backward()
        assert x.grad is not None
        assert bool(torch.isfinite(y).all() and torch.isfinite(x.grad).all())

    def test_leaves_its_input_alone(self, name: str):
        x = torch.randn(N, D)
        before = x.clone()
        self.rule(name).apply(x, noise())
        assert x.equal(before)

    def test_is_deterministic_by_key(self, name: str):
        x = torch.randn(N, D)
        first = self.rule(name).apply(x, noise())
        assert first.equal(self.rule(name).apply(x, noise()))

    def test_another_key_gives_independent_noise(self, name: str):
        x = torch.zeros(N, D)
        a, b = (self.rule(name).apply(x, noise(key)).double() for key in (1, 2))
        if name != "none":
            correlation = float((a * b).mean()) / float(a.std() * b.std())
            assert abs(correlation) < 5 / math.sqrt(N * D)

    def test_a_row_is_noised_alike_whatever_its_neighbours(self, name: str):
        x, first = torch.randn(N, D), N // 4
        together = self.rule(name).apply(x, noise())
        alone = self.rule(name).apply(x[:first], RowNoise([bytes([1]) * 32], (first,)))
        assert together[:first].equal(alone)

    def test_is_unbiased_around_the_signal(self, name: str):
        x = torch.randn(N, D)
        error = (self.rule(name).apply(x, noise()) - self.signal(name, x)).double()
        assert abs(float(error.mean())) <= 5 * float(error.std()) / math.sqrt(N * D)

    def test_event_tells_the_noise_that_was_added(self, name: str):
        rule, num_vectors = self.rule(name), 4000
        event = rule.event(num_vectors)
        z = rule.apply(torch.zeros(num_vectors, D), noise(num_vectors=num_vectors)).double()
        if event.form is None:
            assert event.multiplier is None
            return
        assert event.clip is not None
        assert event.multiplier is not None
        if event.form is NoiseForm.GAUSSIAN:
            sigma = event.multiplier * 2 * event.clip
            assert_moments(z.flatten(), {1: 0, 2: sigma**2, 4: 3 * sigma**4, 6: 15 * sigma**6})
        else:
            # Density exp(-eta |z|): |z| is Gamma(D, 1 / eta), and epsilon is eta at distance 2C.
            eta = event.multiplier / (2 * event.clip)
            moments = {k: math.prod(D + i for i in range(k)) / eta**k for k in (1, 2, 3, 4)}
            assert_moments(z.norm(dim=1), moments)
            direction = z / z.norm(dim=1, keepdim=True)
            assert_moments(direction.flatten(), {1: 0.0, 2: 1 / D, 4: 3 / (D * (D + 2))})

    def test_event_and_label_say_the_rule_its_scale_and_its_clip(self, name: str):
        rule, (scale, clip) = self.rule(name), RULES[name]
        event = rule.event(7)
        assert (event.mechanism, event.scale, event.clip) == (name, scale, clip)
        assert event.num_vectors == 7
        words = [name, *(f"{k}={v!r}" for k, v in (("scale", scale), ("clip", clip)) if v)]
        assert rule.label == " ".join(words)

    def test_says_what_it_promises(self, name: str):
        rule = self.rule(name)
        if rule.event(1).form is None:
            assert "no guarantee" in rule.guarantee or rule.guarantee == "no noise: none"
        else:
            assert f"per {rule.event(1).unit}" in rule.guarantee

    @pytest.mark.parametrize("bad", [None, 0.0, -1.0, math.inf, math.nan])
    @pytest.mark.parametrize("place", [0, 1])
    def test_refuses_scales_and_clips_that_do_not_fit(
        self, name: str, place: int, bad: float | None
    ):
        given, parameter = list(RULES[name]), ("scale", "clip")[place]
        wants = given[place] is not None
        if not wants and bad is None:
            return
        given[place] = bad
        message = f"needs a {parameter} above 0" if wants else f"takes no {parameter}"
        with pytest.raises(ConfigError, match=f"mechanism {name} {message}"):
            MECHANISMS.make(name, *given)


def assert_moments(values: Tensor, moments: Mapping[int, float]) -> None:
    """Raw moments within 5 standard errors of independent values."""
    for power, expected in moments.items():
        raised = values.pow(power)
        error = float(raised.std()) / math.sqrt(raised.numel())
        assert abs(float(raised.mean()) - expected) < 5 * error, f"moment {power}"


def test_a_rule_of_rows_shrinks_each_row_by_its_own_norm():
    rule = MECHANISMS.make("matrix_gaussian", 1e-6, 2.0)
    x = torch.ones(6, 4)
    shown = rule.apply(x, RowNoise([bytes(32), bytes([1]) * 32], (1, 5)))
    assert torch.allclose(shown[:1], torch.ones(1, 4), atol=1e-4)
    assert torch.allclose(shown[1:], torch.full((5, 4), 2 / math.sqrt(20)), atol=1e-4)


def test_guarantees_read_as_documented():
    assert MECHANISMS.make("none").guarantee == "no noise: none"
    assert MECHANISMS.make("gaussian", 0.02).guarantee == "no guarantee (unclipped)"
    assert "eta 0.5 per unit of distance" in MECHANISMS.make("metric_dp", 0.5, 2.0).guarantee


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


def test_an_unknown_rule_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'gausian' is unknown; known: clipped_gaussian"):
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
        ({"mechanism": "laplace", "scale": 0.1}, "known: clipped_gaussian, gaussian, matrix_"),
        ({"mechanism": "clipped_gaussian", "scale": 1.0}, "needs a clip above 0"),
        ({"mechanism": "gaussian", "scale": 0.1, "clip": 1.0}, "takes no clip"),
        ({"mechanism": "none", "gradient_clip": 1.0}, "none takes no clip"),
        ({"mechanism": "none", "withhold": "template"}, "withhold"),
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


def test_the_two_boundaries_have_rules_of_their_own():
    table = {"mechanism": "matrix_gaussian", "scale": 2.0, "clip": 30.0}
    gradient = {"gradient_mechanism": "metric_dp", "gradient_scale": 0.5, "gradient_clip": 0.01}
    settings = parse_settings(PrivacySettings, table | gradient, where="run.toml")
    assert settings.activation_rule().label == "matrix_gaussian scale=2.0 clip=30.0"
    assert settings.gradient_rule().label == "metric_dp scale=0.5 clip=0.01"


def test_noise_alone_keeps_clips_and_what_is_withheld():
    table = {"mechanism": "clipped_gaussian", "scale": 2.0, "clip": 3.0, "withhold": "private"}
    settings = parse_settings(PrivacySettings, table, where="run.toml")
    alone = settings.noise()
    assert (alone.clip, alone.withhold) == (3.0, Withhold.PRIVATE)
    for other in ({"clip": 4.0}, {"withhold": "none"}, {"gradient_mechanism": "gaussian"}):
        extra = {"gradient_scale": 1.0} if "gradient_mechanism" in other else {}
        changed = parse_settings(PrivacySettings, table | other | extra, where="run.toml").noise()
        assert settings_digest(changed) != settings_digest(alone)
