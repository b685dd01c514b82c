"""What a call takes and returns: starts, scales, numbers that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import grad

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.deq import (
    ConvergenceError,
    ConvergenceWarning,
    DEQFixedPoint,
    Implicit,
    OneStep,
    Phantom,
    StateCache,
)
from deep_implicit_attention.solvers import anderson, gmres


class TestWarmStart:
    @pytest.fixture
    def layer(self):
        torch.manual_seed(0)
        return DEQFixedPoint(DEQMeanFieldAttention(5, 4)).double()

    def test_gets_no_gradient(self, layer):
        x = torch.randn(2, 5, 4, dtype=torch.float64)
        z = layer(x)
        z.sum().backward()
        for steps in (None, 2):
            layer(x, state=z, steps=steps).sum().backward()

    def test_samples_that_are_not_finite_start_afresh(self, layer):
        x = torch.randn(3, 5, 4, dtype=torch.float64)
        bad = x.clone()
        bad[1] = torch.nan
        with pytest.warns(ConvergenceWarning):
            previous = layer(bad)
        solution = layer(x, state=previous, return_solution=True)
        assert bool(solution.converged.all())
        torch.testing.assert_close(solution.value, layer(x), rtol=1e-3, atol=1e-3)


class TestScales:
    @pytest.mark.parametrize("power", [-83, -70, 10, 66])
    @pytest.mark.parametrize("adjoint", [None, Implicit(gmres)])
    def test_loss_scaling_does_not_change_the_gradient(self, power, adjoint):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4))
        x = torch.randn(2, 5, 4)
        gradients = [
            grad((layer(x, adjoint=adjoint) * factor).sum(), layer.fun._weight)[0] / factor
            for factor in (2.0**power, 1.0)
        ]
        assert torch.equal(*gradients)

    @pytest.mark.parametrize("power", [-80, 70, 110])
    def test_fields_of_any_size_have_a_response(self, power):
        """Squares of such numbers are none of float32. Of a linear map only the unit changes."""
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4, lin_response=False))
        x = torch.randn(2, 5, 4, requires_grad=True)
        results = []
        for unit in (1.0, 2.0**power):
            solution = layer(unit * x, return_solution=True)
            assert bool(solution.converged.all())
            z = solution.value / unit
            results.append((z.detach(), grad(z.square().sum(), x)[0]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

    def test_solver_options_may_be_positional_or_numpy(self, rich, x):
        import numpy as np

        def mine(f, z0, tol=1e-3, max_iter=10, m=3):
            return anderson(f, z0, tol=tol, max_iter=max_iter, m=m)

        layer = DEQFixedPoint(rich, mine, solver_fwd_m=2, solver_fwd_max_iter=np.int64(60))
        assert bool(layer(x, return_solution=True).converged.all())


class TestNonfinite:
    def test_a_batch_of_nothing_else_leaves_finite_gradients_if_left_out(self):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4))
        x = torch.full((1, 5, 4), torch.nan)
        with pytest.warns(ConvergenceWarning):
            z = layer(x)
        (z[:0].sum() + layer(torch.randn(1, 5, 4)).sum()).backward()
        assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())

    def test_a_fixed_horizon_reports_them_too(self):
        layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4), steps=3)
        x = torch.randn(2, 5, 4)
        x[0] = torch.inf
        with pytest.warns(ConvergenceWarning, match="1 of 2 samples.*nonfinite"):
            layer(x)
        with pytest.raises(ConvergenceError):
            layer(x, on_failure="raise")


def test_an_adjoint_for_one_call_replaces_the_backward_options():
    layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4), solver_bwd_tol=1e-6)
    layer(torch.randn(2, 5, 4), adjoint=OneStep()).sum().backward()


@pytest.mark.parametrize("adjoint", [OneStep(), Phantom(3, 0.5)], ids=repr)
def test_what_a_layer_says_of_its_adjoint_makes_one(adjoint):
    assert eval(repr(adjoint)) == adjoint
    assert f"adjoint={adjoint!r}" in repr(
        DEQFixedPoint(DEQMeanFieldAttention(5, 4), adjoint=adjoint)
    )


def test_a_solution_is_a_warm_start(rich, x):
    layer = DEQFixedPoint(rich, solver_fwd_tol=1e-8)
    solution = layer(x, return_solution=True)
    for start in (solution, (solution,), solution.value):
        assert torch.equal(layer(x, state=start), solution.value)
    with pytest.raises(TypeError, match="state element 0 must be a tensor, got list"):
        layer(x, state=[[1.0, 2.0]])


def test_a_solve_cannot_be_exported():
    layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4))
    with pytest.raises(RuntimeError, match="steps=K"):
        torch.export.export(layer, (torch.randn(2, 5, 4),))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_solve_cannot_be_traced():
    """The trace would be of the steps, and the numbers in them, that its example takes."""
    module, x = DEQMeanFieldAttention(5, 4), torch.randn(2, 5, 4)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"would keep the steps .*steps=K"):
            torch.jit.trace(DEQFixedPoint(module), (x,))
        layer = DEQFixedPoint(module, steps=3)
        traced = torch.jit.trace(layer, (x,))
        torch.testing.assert_close(traced(-2 * x), layer(-2 * x))


def test_a_parametrisation_is_evaluated_once_a_call():
    calls = []

    class Counting(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return weight

    for module, name in (
        (DEQMeanFieldAttention(5, 4), "_weight"),
        (DEQAdaTAPMeanFieldAttention(5, 4), "_weight"),
        (DEQMLPMixerAttention(5, 4), "sum_over_couplings.expand.weight"),
    ):
        owner, _, last = name.rpartition(".")
        part = module.get_submodule(owner)
        nn.utils.parametrize.register_parametrization(part, last, Counting())
        calls.clear()
        DEQFixedPoint(module)(torch.randn(2, 5, 4)).sum().backward()
        assert len(calls) == 1


def test_warnings_point_at_the_caller():
    layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4), solver_fwd_max_iter=1)
    with pytest.warns(ConvergenceWarning) as caught:
        layer(torch.randn(2, 5, 4))
    assert caught[0].filename == __file__


def test_warnings_call_options_as_the_layer_does():
    module, x = DEQMeanFieldAttention(5, 4), torch.randn(2, 5, 4, requires_grad=True)
    for part in ("fwd", "bwd"):
        layer = DEQFixedPoint(module, **{f"solver_{part}_max_iter": 1, f"solver_{part}_tol": 1e-6})
        with pytest.warns(ConvergenceWarning, match=f"solver_{part}_max_iter.*_{part}_tol"):
            layer(x, solver_fwd_preconditioner=None).sum().backward()
    with pytest.warns(ConvergenceWarning) as caught:
        DEQFixedPoint(module)(torch.full_like(x, torch.nan))
    assert "max_iter" not in str(caught[0].message)


def test_warnings_of_cached_states_point_at_the_caller():
    module = DEQVanillaSoftmaxAttention(4, 4, causal=True)
    layer = DEQFixedPoint(module, solver_fwd_max_iter=1, solver_fwd_tol=1e-9)
    with pytest.warns(ConvergenceWarning) as caught:
        cache = StateCache.start(layer, torch.randn(2, 3, 4))
    with pytest.warns(ConvergenceWarning) as later:
        cache.append(torch.randn(2, 1, 4))
    assert {warning.filename for warning in [*caught, *later]} == {__file__}


def test_on_the_meta_device_there_are_shapes_only() -> None:
    layer = DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4)).to("meta")
    x = torch.randn(3, 5, 4, device="meta")
    z = layer(x, steps=2)
    assert z.is_meta
    assert z.shape == x.shape
    with pytest.raises(ValueError, match=r"meta device.*steps=K"):
        layer(x)


def test_a_state_is_no_initial_state() -> None:
    with pytest.raises(ValueError, match=r"got Tensor; a state to start a call from is .*`state`"):
        DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4), initial_state=torch.zeros(3, 5, 4))


def test_nor_is_an_array() -> None:
    import numpy as np

    with pytest.raises(ValueError, match=r"initial_state must be .* got ndarray"):
        DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4), initial_state=np.zeros((3, 5, 4)))


def test_output_elements_may_be_numpy() -> None:
    import numpy as np

    layer = DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4), output_elements=(np.int64(0),))
    assert layer.output_elements == (0,)
    with pytest.raises(ValueError, match="increasing indices"):
        DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4), output_elements=(True,))
