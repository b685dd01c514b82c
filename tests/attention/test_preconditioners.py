"""What preconditioners of mechanisms invert, and that they cost no solutions."""

import pytest
import torch

from deep_implicit_attention.attention import DEQMeanFieldAttention, DEQVanillaSoftmaxAttention
from deep_implicit_attention.deq import DEQFixedPoint


def jacobian(f, z):
    """∂f/∂z of one sample, as a matrix."""
    size = z.numel()
    return torch.autograd.functional.jacobian(lambda v: f(v.view_as(z)).flatten(), z).view(
        size, size
    )


def _mean_field(couplings):
    module = DEQMeanFieldAttention(32, 8)
    module._weight.mul_(couplings)
    return module


def _softmax(couplings):
    module = DEQVanillaSoftmaxAttention(32, 16, heads=4)
    for layer in (module.to_q, module.to_k):
        layer.weight.mul_(couplings)
    return module


@pytest.mark.parametrize(
    ("make", "couplings", "correction", "more"),
    [
        (_mean_field, 2.5, 1.0, 1.5),
        (_mean_field, 2.0, 1.5, 1.04),
        (_mean_field, 1.0, 2.0, 0.9),
        (_softmax, 2.0, 2.0, 0.8),
    ],
)
def test_a_preconditioner_does_not_cost_solutions(make, couplings, correction, more):
    """Where couplings or corrections are so strong that solves often fail.

    At least `more` times as many samples as without it converge (33, 49, 32 and 20 of 64).
    """
    found = plain = 0
    for seed in range(8):
        torch.manual_seed(seed)
        with torch.no_grad():
            module = make(couplings)
            for parameter in module.correction.parameters():
                parameter.mul_(correction)
            x = torch.randn(8, 32, module.dim) / module.dim**0.5
            layer = DEQFixedPoint(module, on_failure="ignore", solver_fwd_max_iter=60)
            found += int(layer(x, return_solution=True).converged.sum())
            without = layer(x, return_solution=True, solver_fwd_preconditioner=None)
            plain += int(without.converged.sum())
    assert 10 < plain < 60
    assert found >= more * plain


@pytest.mark.parametrize("strength", [0.3, 0.9, 1.2, 3.0])
def test_the_preconditioner_of_few_sites_inverts_all_but_what_the_correction_bends(strength):
    """With f linear at its bias, (1 − ∂F/∂z)⁻¹ where z is zero and so are the biases.

    Exact where couplings are strong, else by four or eight terms, with a known remainder.
    """
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(4, 3).double()
    torch.nn.init.zeros_(module.correction.expand.bias)
    with torch.no_grad():
        module._weight.mul_(strength)
    context = module.prepare(torch.randn(1, 4, 3).double())
    z = torch.zeros(1, 4, 3).double()
    inverted = torch.eye(12).double() - jacobian(lambda v: module.update(v, context), z)
    r = torch.randn(12).double()
    found = module.preconditioner(context)(r.view(1, 4, 3)).flatten()
    fourth = torch.linalg.matrix_power(torch.eye(12).double() - inverted, 4)
    exact = torch.linalg.solve(inverted, r)
    size = torch.linalg.matrix_norm(fourth)
    left_out = {0.3: fourth, 0.9: fourth, 1.2: fourth @ fourth, 3.0: 0 * fourth}[strength]
    assert {0.3: size < 0.25, 0.9: size < 0.25, 1.2: 0.25 < size < 0.5, 3.0: size > 0.5}[strength]
    torch.testing.assert_close(found, exact - left_out @ exact)


def test_some_rows_tell_whether_the_series_is_good_enough():
    """For 20 sites of 8 components, from 16 of 160 rows: four terms, eight, or the inverse."""
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(20, 8, lin_response=False).double()
    weight = module._weight.detach().clone()
    fourth = torch.linalg.matrix_power(module.coupling_matrix(), 4)
    r = torch.randn(160).double()
    for size in (0.15, 0.35, 0.7):
        scale = (size / torch.linalg.matrix_norm(fourth)) ** 0.25
        with torch.no_grad():
            module._weight.copy_(weight * scale)
        context = module.prepare(torch.zeros(1, 20, 8).double())
        found = module.preconditioner(context)(r.view(1, 20, 8)).flatten()
        exact = torch.linalg.solve(torch.eye(160).double() - module.coupling_matrix(), r)
        scaled = scale**4 * fourth
        left_out = {0.15: scaled, 0.35: scaled @ scaled, 0.7: 0 * scaled}[size]
        torch.testing.assert_close(found, exact - left_out @ exact)
