"""Solves among other code: inference mode, buffers that training updates, checkpoints, pickles."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from deep_implicit_attention.deq import (
    ConvergenceError,
    ConvergenceWarning,
    DEQFixedPoint,
    DEQModule,
    fixed_point,
)
from deep_implicit_attention.solvers import anderson, broyden, newton_krylov, picard

TIGHT = {
    "solver_fwd_tol": 1e-12, "solver_fwd_max_iter": 200,
    "solver_bwd_tol": 1e-12, "solver_bwd_max_iter": 200,
}  # fmt: skip


class Normed(DEQModule):
    """z = tanh(A z + norm(x)) with a batch normalisation, whose statistics training updates."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.weight = nn.Parameter(0.2 * torch.randn(4, 4))

    def prepare(self, x):
        return self.norm(x), self.weight

    def update(self, z, context):
        field, weight = context
        return torch.tanh(z @ weight.T + field)


class Spectral(DEQModule):
    """z = ½ tanh(W z) + x with the weight's norm one by power iteration, in the update."""

    def __init__(self):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(4, 4))

    def update(self, z, x):
        return 0.5 * torch.tanh(self.linear(z)) + x


class Checkpointed(DEQModule):
    """z = 0.3 tanh(W z) + x, the nonlinear part computed again in backward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def _inner(self, z):
        return torch.tanh(self.linear(z))

    def forward(self, z, x):
        inner = checkpoint(self._inner, z, use_reentrant=False) if self.training else self._inner(z)
        return 0.3 * inner + x

    def update(self, z, x):
        return self(z, x)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(8, 4, dtype=torch.float64, requires_grad=True)


def make(kind):
    torch.manual_seed(0)
    return kind().double()


@pytest.mark.parametrize("kind", [Normed, Spectral])
def test_two_forwards_before_one_backward_while_training_updates_buffers(kind, x):
    layer = DEQFixedPoint(make(kind), **TIGHT)
    same = copy.deepcopy(layer)
    parameters = list(layer.parameters())
    found = grad(layer(x).square().sum() + layer(2 * x).square().sum(), parameters)
    apart = [grad(same(scale * x).square().sum(), list(same.parameters())) for scale in (1, 2)]
    for together, one, two in zip(found, *apart, strict=True):
        torch.testing.assert_close(together, one + two)


class Averaging(nn.Module):
    """z = ½ tanh(W z) + x, which keeps the means of all z that it sees in training."""

    def __init__(self):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(4, 4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, z, x):
        if self.training:
            self.mean.lerp_(z.detach().mean(dim=0), 0.1)
        return 0.5 * torch.tanh(self.linear(z)) + x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_of_narrow_modules_are_updated_like_those_of_others(dtype, x):
    torch.manual_seed(0)
    narrow = Averaging().to(dtype)
    wide, x = copy.deepcopy(narrow).float(), x.detach().to(dtype)
    for module in (narrow, wide):
        for given in (x, -x):
            fixed_point(module, torch.zeros_like(x), (given,)).value.sum().backward()
    assert narrow.mean.norm() > 0.1
    before = wide.state_dict()
    for name, buffer in narrow.named_buffers():
        assert buffer.dtype == dtype
        torch.testing.assert_close(buffer.float(), before[name], rtol=0.02, atol=0.02)
    narrow.eval()
    kept = narrow.mean.clone()
    fixed_point(narrow, torch.zeros_like(x), (x,)).value.sum().backward()
    assert torch.equal(narrow.mean, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_buffers_that_backward_updates_do_not_stop_a_second_one(dtype, x):
    torch.manual_seed(0)
    module, x = Averaging().to(dtype), x.detach().to(dtype)
    z = fixed_point(module, torch.zeros_like(x), (x,)).value
    weight = module.linear.parametrizations.weight.original
    once, again = (grad(z.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("steps", [None, 4])
def test_an_update_may_be_checkpointed(steps, x):
    layer = DEQFixedPoint(make(Checkpointed), steps=steps, **TIGHT)
    parameters = list(layer.parameters())
    found = grad(layer(x).square().sum(), [x, *parameters])
    layer.eval()
    expected = grad(layer(x).square().sum(), [x, *parameters])
    torch.testing.assert_close(found, expected)


def test_a_module_as_map_may_be_checkpointed(x):
    module, start = make(Checkpointed), torch.zeros(8, 4).double()
    found = grad(fixed_point(module, start, (x,)).value.sum(), list(module.parameters()))
    module.eval()
    expected = grad(fixed_point(module, start, (x,)).value.sum(), list(module.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("solver", [picard, anderson, broyden, newton_krylov])
def test_inference_mode_notices_a_map_that_works_in_place(solver, x):
    with torch.inference_mode():
        for start in (torch.zeros(1, 2), x.detach()):
            with pytest.raises(RuntimeError, match="must not change its state in place"):
                fixed_point(lambda z: z.mul_(0.5).add_(1), start, solver=solver)


@pytest.mark.parametrize("steps", [None, 3])
def test_inference_mode_gives_what_no_grad_gives(steps, x):
    layer = DEQFixedPoint(make(Normed).eval(), steps=steps)
    with torch.no_grad():
        expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x.clone()), expected)


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_bounded_response_hides_no_input_that_is_not_finite(bad, steps, x):
    class Bounded(DEQModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.2 * torch.randn(4, 4))

        def update(self, z, x):
            return torch.tanh(z @ self.weight.T + torch.nan_to_num(x, nan=0.0))

    layer = DEQFixedPoint(make(Bounded), steps=steps)
    whole = x.detach().clone()
    whole[2, 1] = bad
    with pytest.warns(ConvergenceWarning, match="nonfinite: 1"):
        z = layer(whole)
    assert z[2].isnan().all()
    others = torch.arange(8) != 2
    weight = layer.fun.weight
    alone = layer(whole[others])
    torch.testing.assert_close(z[others], alone)
    torch.testing.assert_close(grad(z[others].sum(), weight), grad(alone.sum(), weight))


def test_the_error_keeps_its_evidence_in_pickles_and_copies(x):
    layer = DEQFixedPoint(make(Normed), solver_fwd_max_iter=1, on_failure="raise")
    with pytest.raises(ConvergenceError) as caught:
        layer(x)
    error = caught.value
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(again) == str(error)
        assert torch.equal(again.solution.residual, error.solution.residual)


def test_a_module_has_the_same_solution_with_and_without_gradients(x):
    """Also where products pick a kernel by whether a gradient is wanted."""

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, z, x):
            return 0.3 * torch.tanh(self.linear(z.mT).mT) + x

    torch.manual_seed(0)
    module, x = Transposed(), torch.randn(3, 5, 7)
    for _ in range(5):
        x = torch.randn(3, 5, 7)
        with torch.no_grad():
            without = fixed_point(module, torch.zeros_like(x), (x,)).value
        assert torch.equal(fixed_point(module, torch.zeros_like(x), (x,)).value, without)


@pytest.mark.parametrize("solver", [picard, anderson, broyden, newton_krylov])
def test_a_solution_is_not_what_the_map_was_given(solver, x):
    x = x.detach()
    with torch.no_grad():
        value = fixed_point(lambda z, x: x, torch.zeros_like(x), (x,), solver=solver).value
    before = x.clone()
    value.add_(1)
    assert torch.equal(x, before)


class TestTransformations:
    @pytest.mark.parametrize(
        "transform",
        [
            lambda f: torch.func.grad(lambda x: f(x).sum()),
            lambda f: lambda x: torch.func.vmap(f)(x[None]),
            torch.func.jacrev,
        ],
    )
    def test_torch_func_is_refused_with_what_to_do(self, transform, x):
        with pytest.raises(RuntimeError, match=r"torch.autograd, or .* steps=K"):
            transform(DEQFixedPoint(make(Spectral).eval()))(x.detach())

    def test_forward_mode_is_refused_with_what_to_do(self, x):
        with pytest.raises(RuntimeError, match="use reverse mode"):
            torch.func.jvp(DEQFixedPoint(make(Spectral).eval()), (x.detach(),), (x.detach(),))

    def test_many_vectors_at_once_are_refused_with_what_to_do(self, x):
        layer = DEQFixedPoint(make(Spectral).eval())
        with pytest.raises(RuntimeError, match="one vector at a time"):
            torch.autograd.functional.jacobian(layer, x.detach(), vectorize=True)
        loss = layer(x).sum(dim=1)
        with pytest.raises(RuntimeError, match="one vector at a time"):
            torch.func.vmap(lambda v: grad(loss, x, v))(torch.eye(len(loss), dtype=loss.dtype))

    def test_scripted_modules_are_refused(self, x):
        scripted = torch.jit.script(nn.Linear(4, 4).double())
        with pytest.raises(TypeError, match="must not hold a scripted module"):
            fixed_point(scripted, torch.zeros_like(x))


def test_weights_cached_by_another_thread_are_not_kept_for_ever(x):
    """One thread solves inside `parametrize.cached()` while another enters and leaves it."""
    inside, entered, solved = (threading.Event() for _ in range(3))

    class Waiting(Spectral):
        def update(self, z, x):
            if not inside.is_set():
                inside.set()
                assert entered.wait(30)
            return super().update(z, x)

    def other():
        assert inside.wait(30)
        with parametrize.cached():
            entered.set()
            assert solved.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    layer = DEQFixedPoint(make(Waiting).eval())
    with parametrize.cached():
        layer(x)
    solved.set()
    thread.join()
    linear = layer.fun.linear
    before = linear.weight.clone()
    with torch.no_grad():
        linear.parametrizations.weight.original.add_(torch.randn(4, 4))
    assert not torch.equal(linear.weight, before)
