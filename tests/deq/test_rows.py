"""Modules that know the arguments of some samples: solved alone, once the others are done."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from deep_implicit_attention.deq import DEQFixedPoint, DEQModule, Implicit, fixed_point
from deep_implicit_attention.solvers import anderson, broyden, picard

BATCH, SIZE = 12, 5
SOLVERS = [picard, anderson, broyden]


class Map(nn.Module):
    """z ↦ tanh(s W z + x), beside a second part that the first drives; s is a number a sample."""

    def __init__(self, sizes):
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(SIZE, SIZE, dtype=torch.float64)
        self.weight = nn.Parameter(weight / torch.linalg.matrix_norm(weight, 2))
        self.sizes = sizes

    def forward(self, state, x, gain):
        z, y = state
        self.sizes.append(len(z))
        return torch.tanh(gain * z @ self.weight.mT + x), torch.sin(z.sum(dim=1) + y / 2)

    def select_samples(self, index, x, gain):
        return x[index], gain[index]


@pytest.fixture
def arguments():
    torch.manual_seed(1)
    x = torch.randn(BATCH, SIZE, dtype=torch.float64) / 5
    gain = torch.linspace(0.05, 0.95, BATCH, dtype=torch.float64).flip(0)[:, None]
    return x.requires_grad_(), gain.requires_grad_()


def solved(sizes, arguments, rows=True, **options):
    module = Map(sizes)
    if not rows:
        module.select_samples = None
    z0 = torch.zeros(BATCH, SIZE, dtype=torch.float64), torch.zeros(BATCH, dtype=torch.float64)
    return module, fixed_point(module, z0, arguments, max_iter=300, **options)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("graph", [False, True])
def test_a_solve_with_and_without_a_graph(solver, graph, arguments):
    sizes, every = [], []
    with torch.set_grad_enabled(graph):
        _, found = solved(sizes, arguments, solver=solver, tol=1e-8)
        _, expected = solved(every, arguments, rows=False, solver=solver, tol=1e-8)
    assert found.all_converged()
    assert (found.steps - expected.steps).abs().max() <= 1
    assert set(every) == {BATCH}
    assert min(sizes) < BATCH / 2
    for mine, other in zip(found.value, expected.value, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-7)


def test_bit_for_bit_the_same_with_gradients(arguments):
    with torch.no_grad():
        _, plain = solved([], arguments, tol=1e-6)
    _, traced = solved([], arguments, tol=1e-6)
    assert all(map(torch.equal, plain.value, traced.value))


@pytest.mark.parametrize("solver", [*SOLVERS, None])
def test_gradients(solver, arguments):
    adjoint = Implicit(tol=1e-10) if solver is None else Implicit(solver, tol=1e-10)
    found = []
    for rows in (True, False):
        module, solution = solved([], arguments, rows, tol=1e-10, adjoint=adjoint)
        loss = solution.value[0].pow(3).sum() + solution.value[1].sum()
        found.append(torch.autograd.grad(loss, (*arguments, module.weight)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-8)


def test_the_adjoint_is_solved_for_fewer_and_fewer(arguments):
    sizes, seen = [], []
    adjoint = Implicit(anderson, tol=1e-10, observe=seen.append)
    _, solution = solved(sizes, arguments, tol=1e-10, adjoint=adjoint)
    forward = len(sizes)
    solution.value[0].sum().backward()
    # Once for all, and once again for those that are left each time that half of them are done.
    assert sizes[forward] == BATCH
    assert BATCH > sizes[forward + 1] > sizes[-1]
    assert len(sizes) - forward <= 4
    assert seen[0].all_converged()
    assert seen[0].value.shape == (BATCH, SIZE + 1)


def test_derivatives_of_first_and_second_order(arguments):
    x, gain = (t.detach()[::6].requires_grad_() for t in arguments)

    def few(x, gain):
        module = Map([])
        z0 = torch.zeros(2, SIZE, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        adjoint = Implicit(anderson, tol=1e-13)
        options = {"tol": 1e-13, "max_iter": 300, "adjoint": adjoint}
        return fixed_point(module, z0, (x, gain), **options).value[0]

    assert gradcheck(few, (x, gain))
    assert gradgradcheck(few, (x, gain))


class Counting(Map):
    """It updates a buffer, as `spectral_norm` and running statistics do."""

    def __init__(self):
        super().__init__([])
        self.register_buffer("count", torch.tensor(0.0))

    def forward(self, state, x, gain):
        self.count += 1
        return super().forward(state, x, gain)

    select_samples = Map.select_samples


def test_backward_twice_through_a_map_that_updates_buffers(arguments):
    z0 = torch.zeros(BATCH, SIZE, dtype=torch.float64), torch.zeros(BATCH, dtype=torch.float64)
    options = {"tol": 1e-8, "max_iter": 300, "adjoint": Implicit(anderson)}
    value = fixed_point(Counting(), z0, arguments, **options).value[0]
    once = torch.autograd.grad(value.sum(), arguments, retain_graph=True)
    again = torch.autograd.grad(value.sum(), arguments)
    assert all(map(torch.equal, once, again))


class Careless(nn.Module):
    """Of one argument it returns no tuple, of which one sample would be taken for all arguments."""

    def forward(self, z, x):
        return torch.tanh(0.9 * z + x)

    def select_samples(self, index, x):
        return x[index]


def test_arguments_of_some_samples_are_a_tuple():
    x = torch.tensor([0.0, 1.0]).expand(SIZE, 2).T
    with pytest.raises(TypeError, match=r"select_samples must return a tuple.*got Tensor"):
        fixed_point(Careless(), torch.zeros(2, SIZE), (x,))


class Mechanism(DEQModule):
    """z ↦ tanh(s(x) W z + x) with s in the context."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(SIZE, dtype=torch.float64).flip(0))
        self.sizes = []

    def prepare(self, x):
        return {"x": x, "gain": x.abs().amax(dim=1, keepdim=True).clamp(max=0.9)}

    def update(self, z, context):
        self.sizes.append(len(z))
        return torch.tanh(context["gain"] * z @ self.weight + context["x"])

    def select_samples(self, index, context):
        return {name: t[index] for name, t in context.items()}


class Overridden(Mechanism):
    """Its context has another form, of which the inherited `select_samples` knows nothing."""

    def prepare(self, x):
        context = super().prepare(x)
        return {"x": x, "gain": context["gain"], "factor": torch.tensor(1.0)}


@pytest.mark.parametrize(("kind", "leaves_out"), [(Mechanism, True), (Overridden, False)])
def test_of_a_mechanism(kind, leaves_out, arguments):
    module = kind()
    layer = DEQFixedPoint(module, solver_fwd_tol=1e-9, solver_fwd_max_iter=200)
    x = 5 * arguments[1] * arguments[0]
    z = layer(x)
    assert (min(module.sizes) < BATCH) == leaves_out
    alone = torch.cat([layer(one[None]) for one in x])
    torch.testing.assert_close(z, alone, rtol=1e-7, atol=1e-7)
    (found,) = torch.autograd.grad(z.square().sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(alone.square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
