"""Backward solves with settings of a user's own: an absolute tolerance, a preconditioner."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad

from deep_implicit_attention.attention import DEQMeanFieldAttention
from deep_implicit_attention.deq import DEQFixedPoint, Implicit, fixed_point
from deep_implicit_attention.solvers import picard

from .conftest import TIGHT


@pytest.mark.parametrize("weight", [2.0**-10, 2.0**10])
def test_an_absolute_tolerance_is_that_of_gradients_of_order_one(weight):
    """A small loss would else be solved for in fewer steps, and a large one in more."""
    slopes = torch.tensor([0.9, 0.5], dtype=torch.float64)
    adjoint = Implicit(picard, tol=1e-3, max_iter=500, stop_mode="abs")

    def gradient(weight):
        x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        z = fixed_point(
            lambda z, x: slopes * z + x, torch.zeros_like(x), (x,),
            tol=1e-10, max_iter=500, adjoint=adjoint,
        ).value  # fmt: skip
        return grad(weight * z.sum(), x)[0] / weight

    torch.testing.assert_close(gradient(1.0), 1 / (1 - slopes)[None], rtol=0, atol=0.02)
    assert torch.equal(gradient(weight), gradient(1.0))


def test_a_preconditioner_of_ones_own_serves_in_the_place_of_the_modules():
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(4, 3).double()
    layer = DEQFixedPoint(module, **TIGHT)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    shapes = set()

    def own(r):
        shapes.add(r.shape)
        return 0.9 * r

    z = layer(x, adjoint=Implicit(picard, preconditioner=own))
    assert not shapes
    found = grad(z.pow(3).sum(), x)
    assert shapes == {(2, 12)}
    torch.testing.assert_close(found, grad(layer(x).pow(3).sum(), x), rtol=1e-9, atol=1e-9)
