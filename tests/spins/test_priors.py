"""Priors against their definition: derivatives, sums, quadrature, high-precision arithmetic."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from deep_implicit_attention.spins import (
    AdaptiveTAP,
    ExpectationPropagation,
    GaussianPrior,
    IsingPrior,
    PottsPrior,
    SelfAveragingTAP,
    SphericalPrior,
    SpinSystem,
    sherrington_kirkpatrick,
)
from deep_implicit_attention.spins._bessel import bessel


def gaussian() -> GaussianPrior:
    torch.manual_seed(0)
    root = torch.randn(3, 3, dtype=torch.float64) / 2
    covariance = root @ root.T + 0.5 * torch.eye(3, dtype=torch.float64)
    return GaussianPrior(torch.randn(3, dtype=torch.float64), covariance).double()


def symmetric(*shape: int, scale: float = 0.05) -> torch.Tensor:
    V = scale * torch.randn(*shape, dtype=torch.float64)
    return V + V.mT


CASES = {
    "ising": (IsingPrior(), (5,), lambda: torch.randn(5, dtype=torch.float64)),
    "gaussian": (gaussian(), (5, 3), lambda: symmetric(5, 3, 3)),
    "potts": (PottsPrior(3), (5, 3), lambda: symmetric(5, 3, 3, scale=0.5)),
    "sphere-2": (SphericalPrior(2, 1.3), (5, 2), lambda: torch.randn(5, dtype=torch.float64)),
    "sphere-3": (SphericalPrior(3, 0.7), (5, 3), lambda: torch.randn(5, dtype=torch.float64)),
    "sphere-60": (SphericalPrior(60), (5, 60), lambda: torch.randn(5, dtype=torch.float64)),
}


@pytest.fixture(params=list(CASES))
def prior_case(request):
    prior, shape, make_v = CASES[request.param]
    torch.manual_seed(1)
    field = 2 * torch.randn(shape, dtype=torch.float64)
    return prior, field, make_v()


@pytest.mark.quick(
    "ising-*", "gaussian-*", "potts-*", "sphere-2-*", "sphere-3-*", "sphere-60-True-1.0"
)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0, 10.0])
@pytest.mark.parametrize("with_v", [True, False])
def test_moments_are_the_derivatives_of_log_partition(prior_case, scale, with_v):
    prior, field, V = prior_case
    V = V if with_v else None
    field = (scale * field).requires_grad_()
    log = prior.log_partition(field, V)
    assert log.shape == field.shape[:1]
    first = grad(log.sum(), field, create_graph=True)[0]
    torch.testing.assert_close(prior.mean(field, V), first, rtol=1e-9, atol=1e-12)
    flat = first.reshape(5, -1)
    rows = [grad(flat[:, a].sum(), field, retain_graph=True)[0] for a in range(flat.shape[1])]
    second = torch.stack(rows, dim=1).reshape(*field.shape, *field.shape[1:])
    torch.testing.assert_close(prior.covariance(field, V), second, rtol=1e-9, atol=1e-12)


def test_moments_are_differentiable_twice(prior_case):
    prior, field, V = prior_case
    field, V = field[:1].requires_grad_(), V[:1]
    assert gradcheck(lambda h: prior.covariance(h, V), field, fast_mode=True)
    assert gradgradcheck(lambda h: prior.mean(h, V), field, fast_mode=True)


def test_zero_field_and_no_v_is_a_probability_measure(prior_case):
    prior, field, _ = prior_case
    torch.testing.assert_close(
        prior.log_partition(torch.zeros_like(field)),
        torch.zeros(5, dtype=torch.float64),
        rtol=0,
        atol=1e-14,
    )


def test_ising_and_potts_by_summation():
    h, V = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    direct = math.log(sum(0.5 * math.exp(s * 0.7 + 0.5 * 0.3) for s in (1, -1)))
    assert IsingPrior().log_partition(h, V).item() == pytest.approx(direct, rel=1e-14)
    torch.manual_seed(0)
    field, V = torch.randn(4, dtype=torch.float64), symmetric(4, 4)
    states = torch.eye(4, dtype=torch.float64)
    weights = torch.stack([(field @ s + 0.5 * s @ V @ s).exp() / 4 for s in states])
    prior = PottsPrior(4)
    torch.testing.assert_close(prior.log_partition(field, V), weights.sum().log())
    mean = weights @ states / weights.sum()
    torch.testing.assert_close(prior.mean(field, V), mean)


def test_gaussian_by_quadrature():
    prior = GaussianPrior(torch.tensor([0.4]), torch.tensor([[0.6]])).double()
    mean, variance = prior.location.item(), prior.scale_tril().item() ** 2
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    s = mean + math.sqrt(variance) * nodes
    h, V = 0.8, -0.5
    boltzmann = weights / math.sqrt(2 * math.pi) * np.exp(h * s + 0.5 * V * s**2)
    field = torch.tensor([h], dtype=torch.float64)
    matrix = torch.tensor([[V]], dtype=torch.float64)
    total = boltzmann.sum()
    assert prior.log_partition(field, matrix).item() == pytest.approx(math.log(total), rel=1e-10)
    average = (boltzmann * s).sum() / total
    assert prior.mean(field, matrix).item() == pytest.approx(average, rel=1e-10)


def test_sphere_by_quadrature():
    """In three dimensions the measure along the field is uniform on [−R, R]."""
    prior = SphericalPrior(3, 1.7)
    field = torch.tensor([0.3, -1.1, 0.8], dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(80)
    s, size = 1.7 * nodes, field.norm().item()
    boltzmann = weights / 2 * np.exp(size * s)
    total = boltzmann.sum()
    assert prior.log_partition(field).item() == pytest.approx(math.log(total), rel=1e-13)
    average = (boltzmann * s).sum() / total
    torch.testing.assert_close(prior.mean(field), average * field / size)
    along, across = prior.variances(field)
    second = (boltzmann * s**2).sum() / total
    assert along.item() == pytest.approx(second - average**2, rel=1e-12)
    assert across.item() == pytest.approx((1.7**2 - second) / 2, rel=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 4, 33, 81, 100, 4096])
def test_bessel_functions_to_relative_accuracy(dim):
    nu = mpmath.mpf(dim) / 2 - 1
    with mpmath.workdps(60):
        for kappa in (1e-6, 1e-2, 1.0, 10.0, 60.0, 300.0, 1e4, 1e6):
            k = mpmath.mpf(kappa)
            low, high = mpmath.besseli(nu, k), mpmath.besseli(nu + 1, k)
            ratio = high / low
            slope = 1 - ratio**2 - (dim - 1) * ratio / k
            log = mpmath.log(mpmath.gamma(nu + 1) * (2 / k) ** nu * low)
            fall = (slope - ratio / k) / (2 * k**2)
            found = bessel(torch.tensor(kappa, dtype=torch.float64) ** 2, float(nu))
            for mine, exact, tolerance in zip(
                found, (ratio / k, slope, fall, log), (1e-14, 2e-12, 1e-13, 1e-14), strict=True
            ):
                assert abs(mpmath.mpf(mine.item()) / exact - 1) < tolerance, kappa


@pytest.mark.parametrize("dim", [2, 3, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sphere_is_finite_and_accurate_in_both_precisions(dim, dtype):
    prior = SphericalPrior(dim, 1.0)
    for kappa in (0.0, 1e-6, 1.0, 1e3, 1e6):
        field = torch.zeros(dim, dtype=dtype)
        field[0] = kappa
        field.requires_grad_()
        exact = SphericalPrior(dim, 1.0).variances(field.double())
        for mine, wide in zip(prior.variances(field), exact, strict=True):
            torch.testing.assert_close(mine.double(), wide, rtol=torch.finfo(dtype).eps * 4, atol=0)
        gradient = grad(prior.log_partition(field) + prior.mean(field).sum(), field)[0]
        assert bool(gradient.isfinite().all())
        assert prior.mean(field).dtype == dtype


def test_large_dimension_form_and_its_inverse():
    torch.manual_seed(0)
    errors = []
    for dim in (10, 100, 1000):
        prior = SphericalPrior(dim)
        field = 3 * torch.randn(dim, dtype=torch.float64)
        exact, limit = prior.mean(field), prior.large_dim_mean(field)
        errors.append(((exact - limit).norm() / exact.norm()).item())
        torch.testing.assert_close(prior.large_dim_field(limit), field)
        stretch = 1 + math.sqrt(1 + field.square().sum().item() / prior.radius**2)
        torch.testing.assert_close(limit, field / stretch)
    # The error falls like 1/d.
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    with pytest.raises(ValueError, match="inside the sphere"):
        prior.large_dim_field(100 * field)


def test_gaussian_parameters_learn():
    prior = gaussian()
    field = torch.randn(4, 3, dtype=torch.float64)

    def loss(*parameters):
        names = ["location", "log_diagonal", "below_diagonal"]
        state = dict(zip(names, parameters, strict=True))
        from torch.func import functional_call

        class Wrap(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.prior = prior

            def forward(self, h):
                return self.prior.log_partition(h)

        return functional_call(Wrap(), {f"prior.{n}": p for n, p in state.items()}, (field,))

    parameters = [p.detach().clone().requires_grad_() for p in prior.parameters()]
    assert gradcheck(loss, parameters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianPrior(torch.zeros(2), torch.eye(3)), r"\(d,\)"),
        (lambda: GaussianPrior(torch.zeros(2), -torch.eye(2)), "smallest eigenvalue is -1"),
        (
            lambda: GaussianPrior(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
            "symmetric",
        ),
        (
            lambda: GaussianPrior(torch.zeros(2), torch.eye(2)).mean(
                torch.zeros(2), 2 * torch.eye(2)
            ),
            "P − V must be positive definite.*-1",
        ),
        (lambda: SphericalPrior(1), "at least 2"),
        (lambda: SphericalPrior(3, 0.0), "radius"),
        (lambda: SphericalPrior(3).mean(torch.zeros(4)), r"\(..., 3\)"),
        (
            lambda: SphericalPrior(2).log_partition(torch.zeros(2), torch.ones(2, 2)),
            "isotropic",
        ),
        (lambda: SphericalPrior(2).large_dim_mean(torch.zeros(2)), "at least 3"),
        (lambda: PottsPrior(0), "num_states"),
        (lambda: PottsPrior(1), "num_states must be at least 2, got 1"),
        (lambda: SphericalPrior(3, float("inf")), "radius must be finite, got inf"),
        (lambda: GaussianPrior(torch.tensor([torch.nan]), torch.eye(1)), "mean must be finite"),
        (
            lambda: GaussianPrior(torch.zeros(2), torch.full((2, 2), torch.nan)),
            "covariance must be finite",
        ),
        (lambda: GaussianPrior(torch.zeros(0), torch.zeros(0, 0)), "at least one component"),
        (lambda: PottsPrior(3).mean(torch.zeros(2)), r"\(..., 3\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gaussian_priors_of_wrong_types():
    with pytest.raises(TypeError, match=r"mean must be float32 or float64, got torch.int64"):
        GaussianPrior(torch.zeros(2).long(), torch.eye(2))
    with pytest.raises(TypeError, match="covariance must be a tensor, got list"):
        GaussianPrior(torch.zeros(1), [[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"mean is torch.float32.*covariance torch.float64"):
        GaussianPrior(torch.zeros(2), torch.eye(2).double())


def test_isotropic_v_as_number_or_matrix():
    prior = SphericalPrior(3)
    torch.manual_seed(0)
    field, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    matrix = v[:, None, None] * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(prior.log_partition(field, v), prior.log_partition(field, matrix))


def test_gaussian_prior_in_bfloat16():
    """Factors are computed in float32, whatever the parameters are kept in."""
    prior = GaussianPrior(torch.zeros(2), torch.diag(torch.tensor([1.0, 4.0]))).bfloat16()
    log_diagonal = torch.tensor([0.0, 4.0**0.5]).log().bfloat16().float()
    expected = torch.diag(torch.tensor([1.0, (-2 * log_diagonal[1]).exp().item()]))
    assert prior.scale_tril().dtype == torch.float32
    torch.testing.assert_close(prior.precision(), expected)
    field = torch.ones(3, 2, dtype=torch.bfloat16)
    for value in (prior.mean(field), prior.covariance(field), prior.log_partition(field)):
        assert value.dtype == torch.bfloat16
    torch.testing.assert_close(
        prior.mean(field).float(), torch.tensor([1.0, 4.0]).expand(3, 2), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("batch", [(), (3,), (3, 3), (4, 5), (2, 3, 3)])
def test_one_v_for_all_fields_on_the_sphere(batch):
    """SᵀVS/2 = vR²/2, whatever the fields, also where a matrix looks like numbers for them."""
    torch.manual_seed(0)
    prior, field = SphericalPrior(3, 2.0), torch.randn(*batch, 3, dtype=torch.float64)
    matrix = 0.7 * torch.eye(3, dtype=torch.float64)
    for V in (matrix, matrix.expand(*batch, 3, 3), torch.tensor(0.7, dtype=torch.float64)):
        added = prior.log_partition(field, V) - prior.log_partition(field)
        torch.testing.assert_close(added, torch.full(batch, 1.4, dtype=torch.float64))


@pytest.mark.slow
def test_as_many_spherical_spins_and_samples_as_components():
    """Then numbers v, one a spin and sample, have the shape of a matrix."""
    couplings = sherrington_kirkpatrick(3, 0.6)[0]
    system = SpinSystem(couplings, SphericalPrior(3, 1.5))
    torch.manual_seed(0)
    fields = torch.randn(3, 3, 3, dtype=torch.float64)
    for method in (AdaptiveTAP(), SelfAveragingTAP(), ExpectationPropagation()):
        together = method(system, fields).log_partition
        alone = torch.stack([method(system, x).log_partition for x in fields])
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_isotropic_v_is_one_on_every_scale(dtype, scale):
    prior, field = SphericalPrior(3, 1.0), torch.ones(3, dtype=dtype)
    prior.log_partition(field, scale * torch.eye(3, dtype=dtype))
    with pytest.raises(ValueError, match="isotropic"):
        prior.log_partition(field, scale * torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=dtype)))


@pytest.mark.parametrize("name", CASES)
def test_results_broadcast_over_fields_and_v(name):
    prior, shape, make_v = CASES[name]
    torch.manual_seed(2)
    field, V = torch.randn(shape, dtype=torch.float64), make_v()
    one, many = field[0], torch.stack([V, V])
    expected = field.shape[:1]
    for answer in (prior.log_partition, prior.mean, prior.covariance):
        whole = answer(one.expand(2, *shape), many)
        torch.testing.assert_close(answer(one, many), whole)
        torch.testing.assert_close(answer(one.expand(shape), many), whole)
        assert whole.shape[:2] == (2, *expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ising_derivatives_are_accurate_in_fields_of_any_strength(dtype):
    sizes = [0.0, 1e-9, 1e-3, 0.5, 0.999, 1.0, 3.0, 20.0, 45.0, 400.0, 1e4]
    field = torch.tensor([s * size for size in sizes for s in (1, -1)], dtype=dtype)
    field.requires_grad_()
    tanh, square = mpmath.tanh, lambda h: mpmath.sech(h) ** 2
    derivatives = [
        lambda h: mpmath.log(mpmath.cosh(h)),
        tanh,
        square,
        lambda h: -2 * tanh(h) * square(h),
        lambda h: square(h) * (4 - 6 * square(h)),
    ]

    def check(value: torch.Tensor, order: int, atol: float) -> None:
        with mpmath.workdps(40):
            exact = [float(derivatives[order](mpmath.mpf(h))) for h in field.tolist()]
        expected = torch.tensor(exact, dtype=torch.float64).to(dtype)
        rtol = (4, 4, 10, 20, 100)[order] * torch.finfo(dtype).eps
        torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)

    least = 100 * torch.finfo(dtype).tiny
    value = IsingPrior().log_partition(field)
    for order in range(5):
        check(value, order, least)
        value = grad(value.sum(), field, create_graph=True)[0]
    value = IsingPrior().covariance(field)
    for order in range(2, 5):
        # The slope at its zero is a difference of numbers of order one.
        check(value, order, 4 * torch.finfo(dtype).eps if order == 3 else least)
        value = grad(value.sum(), field, create_graph=True)[0]


def test_ising_derivatives_work_in_transforms_and_for_no_dimensions():
    field = torch.tensor([-60.0, -0.3, 0.0, 2.0, 400.0], dtype=torch.float64)
    prior = IsingPrior()
    hessian = torch.func.vmap(torch.func.hessian(prior.log_partition))(field)
    torch.testing.assert_close(hessian, prior.covariance(field))
    assert prior.log_partition(field[:0]).shape == (0,)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 3e-6), (torch.float64, 3e-15)])
@pytest.mark.parametrize("h", [0.0, 0.3, 5.0, 9.0, 18.0, 25.0, 40.0])
def test_derivatives_of_the_mean_have_all_digits_in_strong_fields(h, dtype, close):
    """Of tanh and softmax they are differences of almost equal numbers."""
    field = torch.tensor([h, -h], dtype=dtype, requires_grad=True)
    mean = IsingPrior().mean(field)
    assert torch.equal(mean, field.detach().tanh())
    first = grad(mean.sum(), field, create_graph=True)[0]
    second = grad(first.sum(), field)[0]
    exact = field.detach().double()
    torch.testing.assert_close(first.detach().double(), exact.cosh() ** -2, rtol=close, atol=0)
    ratio = (second / first.detach()).double()
    torch.testing.assert_close(ratio, -2 * exact.tanh(), rtol=close, atol=close)

    field, prior = torch.tensor([h, 0.1, -0.2], dtype=dtype), PottsPrior(3)
    assert torch.equal(prior.mean(field.clone().requires_grad_()), field.softmax(dim=0))
    with mpmath.workdps(60):
        weights = [mpmath.exp(float(value)) for value in field]
        m = [weight / sum(weights) for weight in weights]
        expected = torch.tensor(
            [[float(m[a] * ((a == b) - m[b])) for b in range(3)] for a in range(3)],
            dtype=torch.float64,
        )
    for found in (
        prior.covariance(field),
        torch.autograd.functional.jacobian(prior.mean, field),
        torch.autograd.functional.hessian(prior.log_partition, field),
        torch.func.jacfwd(prior.mean)(field),
        torch.func.jacrev(prior.mean)(field),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=close, atol=0)


def test_states_that_are_excluded_have_no_part_in_potts_spins():
    field = torch.tensor([0.5, -torch.inf, 0.1], dtype=torch.float64, requires_grad=True)
    for function in (PottsPrior(3).mean, PottsPrior(3).log_partition):
        (gradient,) = grad(function(field)[..., None][:1].sum(), field)
        assert bool(gradient.isfinite().all())
        assert gradient[1] == 0


def test_a_square_of_numbers_v_is_no_matrix_on_a_sphere_of_another_dimension():
    prior, field, v = SphericalPrior(3), torch.ones(4, 4, 3), torch.linspace(0, 1, 16).view(4, 4)
    rows = torch.stack([prior.log_partition(*row) for row in zip(field, v, strict=True)])
    torch.testing.assert_close(prior.log_partition(field, v), rows)
