"""The tail's denoiser alone: the identity at first, safe on nothing, and able to learn."""

import pytest
import torch

from cutlayer.errors import ModelError
from cutlayer.model.denoiser import DENOISER_PREFIX, Denoiser, Passed
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer

N, D = 64, 32


def passed(sigma: float = 2.0) -> Passed:
    h_ND = torch.randn(N, D)
    return Passed(h_ND=h_ND, sent_ND=h_ND + sigma * torch.randn(N, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_denoiser_changes_nothing(dtype: torch.dtype) -> None:
    y_ND = torch.randn(N, D).to(dtype)
    assert Denoiser(D, seed=1)(y_ND, passed()).equal(y_ND)


def test_the_gradient_of_what_the_trunk_returned_passes() -> None:
    y_ND, upstream = torch.randn(N, D, requires_grad=True), torch.randn(N, D)
    denoiser, given = Denoiser(D, seed=1), passed()
    given.h_ND.requires_grad_()
    denoiser(y_ND, given).backward(upstream)
    assert y_ND.grad is not None
    assert y_ND.grad.equal(upstream)
    assert given.h_ND.grad is None
    assert bool(denoiser.gate_D.grad.any())
    assert bool(denoiser.outer_DR.grad.any())


def test_withheld_and_empty_vectors_stay_finite() -> None:
    denoiser = Denoiser(D, seed=1)
    torch.nn.init.normal_(denoiser.outer_DR)
    zeros_ND = torch.zeros(N, D)
    y_ND = zeros_ND.clone().requires_grad_()
    for given in (
        Passed(h_ND=zeros_ND, sent_ND=zeros_ND),
        Passed(h_ND=1e4 + zeros_ND, sent_ND=zeros_ND),
    ):
        clean_ND = denoiser(y_ND, given)
        clean_ND.sum().backward()
        assert bool(torch.isfinite(clean_ND).all())
        assert y_ND.grad is not None
        assert bool(torch.isfinite(y_ND.grad).all())
        assert all(bool(torch.isfinite(p.grad).all()) for p in denoiser.parameters())


def test_it_learns_to_take_off_the_noise_that_went_through_a_residual_trunk() -> None:
    weight_DD = torch.randn(D, D) / D**0.5

    def trunk(x_ND: torch.Tensor) -> torch.Tensor:
        return x_ND + torch.tanh(x_ND @ weight_DD)

    denoiser = Denoiser(D, seed=1)
    optimizer, errors = PartOptimizer(denoiser, AdamWSettings()), []
    for _ in range(200):
        given = passed()
        error = (denoiser(trunk(given.sent_ND), given) - trunk(given.h_ND)).square().mean()
        error.backward()
        optimizer.step(scale=1.0, lr=3e-3)
        errors.append(float(error.detach()))
    # The gate alone takes off what was added; the rest is what tanh made of it.
    assert errors[-1] < errors[0] / 5


def test_weights_go_to_a_file_and_back() -> None:
    one, two = Denoiser(D, seed=1), Denoiser(D, seed=2)
    torch.nn.init.normal_(one.gate_D)
    state = one.state()
    assert all(key.startswith(DENOISER_PREFIX) for key in state)
    two.load({**state, "another": torch.zeros(1)})
    y_ND, given = torch.randn(N, D), passed()
    assert two(y_ND, given).equal(one(y_ND, given))
    with pytest.raises(ModelError, match=r"privacy.denoiser changed"):
        Denoiser(2 * D, seed=1).load(state)
    with pytest.raises(ModelError, match=r"has no denoiser"):
        one.load({})


def test_its_seed_alone_decides_its_first_weights() -> None:
    torch.manual_seed(1)
    one = Denoiser(D, seed=3).state()
    torch.manual_seed(2)
    assert all(one[key].equal(value) for key, value in Denoiser(D, seed=3).state().items())
