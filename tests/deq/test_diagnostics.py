"""Diagnostics against dense linear algebra."""

from __future__ import annotations

import pytest
import torch

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.deq import (
    DEQFixedPoint,
    error_bound,
    fixed_point,
    jacobian_norm,
    jacobian_penalty,
    spectral_radius,
)
from deep_implicit_attention.solvers import picard
from deep_implicit_attention.spins import PottsPrior


@pytest.fixture
def matrices():
    torch.manual_seed(0)
    return torch.randn(5, 8, 8, dtype=torch.float64)


def penalty(f, z):
    return jacobian_penalty(f, z, generator=torch.Generator().manual_seed(0))


def linear(matrices):
    return lambda z: (matrices @ z.unsqueeze(-1)).squeeze(-1)


def test_spectral_radius_is_that_of_the_matrix(matrices):
    z = torch.randn(5, 8, dtype=torch.float64)
    expected = torch.linalg.eigvals(matrices).abs().amax(dim=1)
    torch.testing.assert_close(spectral_radius(linear(matrices), z), expected)


def test_spectral_radius_of_a_large_map_from_few_products():
    torch.manual_seed(0)
    matrix = torch.randn(1, 200, 200, dtype=torch.float64) / 200**0.5
    matrix = matrix + 0.2 * torch.ones_like(matrix)  # one real eigenvalue far outside
    expected = torch.linalg.eigvals(matrix).abs().amax(dim=1)
    z = torch.zeros(1, 200, dtype=torch.float64)
    torch.testing.assert_close(spectral_radius(linear(matrix), z, max_iter=15), expected)


def test_jacobian_norm_is_the_largest_singular_value(matrices):
    z = torch.randn(5, 8, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(matrices, 2)
    torch.testing.assert_close(jacobian_norm(linear(matrices), z), expected)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e-10, 1e-6, 1e10, 1e15, 1e30])
@pytest.mark.parametrize("diagnostic", [spectral_radius, jacobian_norm])
def test_a_jacobian_may_be_of_any_size(diagnostic, size, matrices):
    # Its squares are beyond what float32 can hold.
    small = (size * matrices).float()
    skew = small - small.mT
    z = torch.zeros(5, 8)
    for jacobians in (small, skew):
        if diagnostic is jacobian_norm:
            expected = torch.linalg.matrix_norm(jacobians.double(), 2)
        else:
            expected = torch.linalg.eigvals(jacobians.double()).abs().amax(dim=1)
        found = diagnostic(linear(jacobians), z).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("diagnostic", [spectral_radius, jacobian_norm])
def test_what_is_found_does_not_depend_on_the_default_device(diagnostic, matrices):
    z = torch.randn(5, 8, dtype=torch.float64)
    expected = diagnostic(linear(matrices), z)
    with torch.device("meta"):
        assert torch.equal(diagnostic(linear(matrices), z), expected)


def test_nonlinear_maps_and_tuple_states(matrices):
    def f(z):
        return torch.tanh(linear(matrices)(z[0]) + z[1]), z[0] * z[1]

    torch.manual_seed(1)
    z = (torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64))

    def flat(v):
        image = f((v[None, :8].expand(5, 8), v[None, 8:].expand(5, 8)))
        return torch.cat([part[0] for part in image])

    jacobian = torch.autograd.functional.jacobian(flat, torch.cat([z[0][0], z[1][0]]))
    expected = torch.linalg.eigvals(jacobian).abs().max()
    torch.testing.assert_close(spectral_radius(f, z)[0], expected)
    torch.testing.assert_close(jacobian_norm(f, z)[0], torch.linalg.matrix_norm(jacobian, 2))


def test_a_sample_does_not_depend_on_its_batch(matrices):
    z = torch.randn(5, 8, dtype=torch.float64)
    for diagnose in (spectral_radius, jacobian_norm):
        alone = diagnose(linear(matrices[2:3]), z[2:3])
        torch.testing.assert_close(diagnose(linear(matrices), z)[2:3], alone)


def test_penalty_estimates_the_frobenius_norm(matrices):
    z = torch.randn(5, 8, dtype=torch.float64)
    samples = 4000
    generator = torch.Generator().manual_seed(0)
    estimate = jacobian_penalty(linear(matrices), z, samples=samples, generator=generator)
    expected = matrices.square().sum(dim=(1, 2))
    # The variance of vᵀ A v for Gaussian v is 2 ‖A‖_F², here with A = J Jᵀ.
    gram = matrices @ matrices.mT
    error = (2 * gram.square().sum(dim=(1, 2)) / samples).sqrt()
    assert bool(((estimate - expected).abs() < 4 * error).all())


def test_penalty_is_differentiable_like_its_definition():
    w = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[0.7]], dtype=torch.float64)
    penalty = jacobian_penalty(lambda z: torch.tanh(z @ w.T), z, samples=1)
    # In one dimension the estimate is v² f′² with f′ = w (1 − tanh²(w z)).
    slope = w * (1 - torch.tanh(w * z) ** 2)
    scale = (penalty / slope.square().squeeze()).detach()
    expected = torch.autograd.grad((scale * slope.square()).sum(), w)[0]
    torch.testing.assert_close(torch.autograd.grad(penalty.sum(), w)[0], expected)


def test_gradients_of_loss_and_penalty_add_up(problem, w, x):
    z = problem.unrolled(w, x).detach()
    f = lambda z: problem.map(z, w, x)  # noqa: E731

    def penalty():
        return jacobian_penalty(f, z, generator=torch.Generator().manual_seed(0)).sum()

    loss = fixed_point(problem.map, z, (w, x), tol=1e-12).value.square().sum()
    together = torch.autograd.grad(loss + 0.3 * penalty(), w, retain_graph=True)[0]
    apart = torch.autograd.grad(loss, w)[0] + 0.3 * torch.autograd.grad(penalty(), w)[0]
    assert penalty() > 0
    torch.testing.assert_close(together, apart)


def test_constant_maps_have_no_jacobian():
    z = torch.ones(3, 4)
    for diagnose in (spectral_radius, jacobian_norm, jacobian_penalty):
        assert torch.equal(diagnose(lambda z: torch.zeros_like(z), z), torch.zeros(3))


def test_error_bound_holds_and_is_infinite_without_contraction():
    torch.manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(4, 6, 6, dtype=torch.float64)).Q * 0.8
    b = torch.randn(4, 6, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - matrix, b)
    f = lambda z: linear(matrix)(z) + b  # noqa: E731
    solution = fixed_point(f, torch.zeros_like(b), solver=picard, tol=1e-3)
    error = (solution.value - exact).norm(dim=1)
    bound = error_bound(solution, 0.8)
    assert bool((error <= bound).all())
    assert bool((bound < 20 * error).all())
    assert bool(error_bound(solution, 1.0).isinf().all())
    assert torch.equal(error_bound(solution, torch.full_like(bound, 0.8)), bound)
    for wrong in (-0.1, torch.tensor([0.5, -0.1, 0.5, 0.5]), torch.full((4, 1), 0.8)):
        with pytest.raises(ValueError, match="contraction"):
            error_bound(solution, wrong)


@pytest.mark.parametrize("diagnostic", [spectral_radius, jacobian_norm, jacobian_penalty])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_without_numbers_the_dtype_is_that_of_the_state(diagnostic, dtype, shape):
    found = diagnostic(lambda z: z / 2, torch.ones(shape, dtype=dtype))
    torch.testing.assert_close(found, torch.zeros(shape[0], dtype=dtype))


@pytest.mark.parametrize("diagnostic", [spectral_radius, jacobian_norm, penalty])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DEQAdaTAPMeanFieldAttention(4, 3, prior=PottsPrior(3)),
        lambda: DEQAdaTAPMeanFieldAttention(4, 3),
        lambda: DEQVanillaSoftmaxAttention(4, 3, causal=True),
    ],
)
def test_autocast_has_no_effect(make, diagnostic):
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 4, 3)
    parts = len(module.initial_state(x)) if isinstance(module, DEQAdaTAPMeanFieldAttention) else 1
    layer = DEQFixedPoint(module, output_elements=tuple(range(parts)))
    with torch.no_grad():
        z = layer(x)
    expected = diagnostic(layer.map(x), z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(diagnostic(layer.map(x), z), expected)
