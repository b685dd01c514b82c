"""Samples that are done are left out of a solve, where the map can be asked of the others alone."""

import pytest
import torch

from deep_implicit_attention.solvers import Status, anderson, broyden, newton_krylov, picard

BATCH = 24
EVIDENCE = ("value", "residual", "residual_norm", "trace")


class Rows:
    """A map of the samples `rows`, which keeps how many it was asked of."""

    def __init__(self, problem, sizes, rows=None):
        self.problem, self.sizes = problem, sizes
        if rows is None:
            self.of_samples = lambda index: Rows(problem[index], sizes, index)

    def __call__(self, z):
        self.sizes.append(len(z))
        return self.problem.f(z)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def problem(request, make_problem):
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    norm = torch.linspace(0.02, 0.97, BATCH)[order]
    scale = (10.0 ** torch.linspace(-1, 1, BATCH, dtype=torch.float64))[order.flip(0)]
    return make_problem(BATCH, 12, norm, request.param, scale=scale)


def compare(found, expected, dtype, steps=0):
    """The evidence of two solves, whose products may be rounded differently."""
    assert found.status == expected.status
    assert (found.steps - expected.steps).abs().max() <= steps
    close = {torch.float64: 1e-9, torch.float32: 1e-3}[dtype]
    error = (found.value - expected.value).norm(dim=1) / expected.value.norm(dim=1)
    assert error.max() <= close
    assert found.trace.shape[1] == len(found.value)
    if not steps:
        for name in ("residual", "residual_norm", "trace"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=1e-2, atol=1e-7
            )


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
@pytest.mark.parametrize("damped", [False, True])
def test_same_answers_for_fewer_evaluations(solver, stop_mode, damped, problem):
    options = {"tol": 1e-4, "max_iter": 300, "stop_mode": stop_mode}
    if damped and solver is not broyden:
        options["damping"] = 0.2
    sizes = []
    found = solver(Rows(problem, sizes), problem.z0, **options)
    expected = solver(problem.f, problem.z0, **options)
    compare(found, expected, problem.source.dtype, steps=int(solver is not picard))
    # Each time half and more of them are done they are left out.
    assert sizes == sorted(sizes, reverse=True)
    going = [int((found.steps > k).sum()) for k in range(len(sizes))]
    assert all(now <= 2 * left for now, left in zip(sizes, going, strict=True))
    assert min(sizes) < BATCH / 2


def test_answers_of_picard_are_the_same_bit_for_bit(problem):
    """A product with each sample's own matrix does not depend on how many there are."""
    found = picard(Rows(problem, []), problem.z0, tol=1e-5, max_iter=300)
    expected = picard(problem.f, problem.z0, tol=1e-5, max_iter=300)
    for name in (*EVIDENCE, "steps", "codes", "converged"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
def test_whatever_becomes_of_them(solver):
    """Some converge, at once and late, some diverge, some break, one stays where it is."""
    slopes = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.99, 1.0, 1.5, -1.5, 0.3, 0.7])[:, None]

    class Map:
        def __init__(self, slope, breaks):
            self.slope, self.breaks = slope.double(), breaks

        def __call__(self, z):
            image = self.slope * z + torch.sin(3 * z) / 10 + 1
            return torch.where(self.breaks & (z.abs() > 1.2), torch.nan, image)

        def of_samples(self, index):
            return Map(self.slope[index], self.breaks[index])

    breaks = torch.zeros(10, 1, dtype=torch.bool)
    breaks[8:] = True
    f, z0 = Map(slopes.expand(10, 3), breaks), torch.zeros(10, 3, dtype=torch.float64)
    found = solver(f, z0, tol=1e-8, max_iter=60)
    expected = solver(lambda z: f(z), z0, tol=1e-8, max_iter=60)
    assert Status.NONFINITE in found.status
    assert Status.CONVERGED in found.status
    assert len(set(found.status)) >= (3 if solver is picard else 2)
    assert found.status == expected.status
    assert torch.equal(found.steps, expected.steps)
    torch.testing.assert_close(found.value, expected.value, equal_nan=True)
    torch.testing.assert_close(found.trace, expected.trace)
    torch.testing.assert_close(found.residual, expected.residual)


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
def test_who_went_astray_comes_back(solver):
    """A state far out on a bounded f(z) − z counts as nobody's solution, left out or not."""

    class Map:
        def __init__(self, x):
            self.x = x

        def __call__(self, z):
            return z + torch.tanh(self.x - z) / 2

        def of_samples(self, index):
            return Map(self.x[index])

    x = torch.tensor([0.1, 0.2, 5.0, 0.3, -40.0, 0.2, 0.1, 90.0])[:, None].expand(8, 2)
    f, z0 = Map(x), torch.zeros(8, 2)
    found = solver(f, z0, tol=1e-3, max_iter=400)
    expected = solver(lambda z: f(z), z0, tol=1e-3, max_iter=400)
    assert found.status == expected.status
    torch.testing.assert_close(found.value, expected.value, rtol=1e-4, atol=1e-4)
    assert (found.steps - expected.steps).abs().max() <= 2


def test_solves_that_need_all_samples_keep_them(problem):
    """Preconditioners are of all samples, and Newton steps ask f by themselves."""
    for solver, options in (
        (picard, {"preconditioner": lambda r: 0.9 * r}),
        (anderson, {"preconditioner": lambda r: 0.9 * r}),
        (newton_krylov, {}),
    ):
        sizes = []
        found = solver(Rows(problem, sizes), problem.z0, tol=1e-4, max_iter=300, **options)
        assert found.all_converged()
        assert set(sizes) == {BATCH}


@pytest.mark.parametrize("solver", [picard, anderson])
def test_with_a_rough_map_first(solver, problem):
    sizes = []
    rough = lambda z: 1.001 * problem.f(z)  # noqa: E731
    options = {"tol": 1e-4, "max_iter": 400, "rough": rough}
    found = solver(Rows(problem, sizes), problem.z0, **options)
    expected = solver(problem.f, problem.z0, **options)
    assert found.all_converged()
    compare(found, expected, problem.source.dtype, steps=1)
    assert min(sizes) < BATCH / 4


def test_one_sample_and_none(make_problem):
    for batch in (0, 1):
        problem = make_problem(batch=batch)
        found = anderson(Rows(problem, []), problem.z0, tol=1e-8)
        assert found.all_converged()
        assert found.value.shape == (batch, 6)
