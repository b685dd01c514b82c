"""The evidence of a fixed number of steps: a residual after each."""

import pytest
import torch

from deep_implicit_attention.attention import DEQMeanFieldAttention
from deep_implicit_attention.deq import DEQFixedPoint
from deep_implicit_attention.deq._relax import relax
from deep_implicit_attention.solvers import Status


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_fixed_steps_have_a_residual_each(steps, capsys):
    torch.manual_seed(0)
    layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4)).double()
    fields = torch.randn(3, 5, 4, dtype=torch.float64) / 2
    solution = layer(fields, steps=steps, debug=True, return_solution=True)
    f, z, rows = layer.map(fields), torch.zeros_like(fields), []
    for _ in range(steps):
        z = f(z)
        change, image = ((t.flatten(1).norm(dim=1)) for t in (f(z) - z, f(z)))
        rows.append(change / image)
    torch.testing.assert_close(solution.trace, torch.stack(rows).detach())
    assert torch.equal(solution.residual, solution.trace[-1])
    torch.testing.assert_close(solution.residual_norm, change.detach())
    first, last = rows[0].max().item(), rows[-1].max().item()
    expected = f"residual: {first:.3e} -> {last:.3e} in {steps} steps\n"
    assert capsys.readouterr().out == expected
    unmeasured = layer(fields, steps=steps, return_solution=True, measure=False)
    assert unmeasured.trace.shape == (steps, 3)
    assert bool(unmeasured.trace.isnan().all())


def test_residuals_before_a_state_overflows_are_kept():
    start = torch.tensor([[1.0], [0.0]])
    solution = relax(lambda z: 1e15 * z, start, 3, 1e-4, True)
    assert solution.status == (Status.NONFINITE, Status.CONVERGED)
    assert solution.trace[:, 0].tolist() == [1.0, torch.inf, torch.inf]
    assert solution.residual[0] == solution.residual_norm[0] == torch.inf
