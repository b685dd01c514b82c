"""Products by oneDNN, each held against torch's own in double precision."""

import copy
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deep_implicit_attention.attention import (
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
    _products,
)
from deep_implicit_attention.attention._pooling import couple
from deep_implicit_attention.attention._products import gelu_linear, linear, linear_term
from deep_implicit_attention.deq import DEQFixedPoint

fast = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch without oneDNN",
)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Products go to oneDNN on any processor."""
    monkeypatch.setattr(_products, "_WIDE", True)
    monkeypatch.setattr(_products, "_OWN", False)
    monkeypatch.setattr(_products, "_SMALL", 1 << 17)


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was asked."""
    seen = []
    plain = _products._product

    def counted(*args):
        seen.append(args)
        return plain(*args)

    monkeypatch.setattr(_products, "_product", counted)
    return seen


def shapes():
    """Rows as they come: many, few, in sites, not contiguous, spread, none; and weights."""
    torch.manual_seed(0)
    wide, tall = torch.randn(256, 64), torch.randn(64, 256)
    return {
        "rows": (torch.randn(500, 64), wide),
        "one vector": (torch.randn(1024), torch.randn(1024, 1024)),
        "one row": (torch.randn(1, 1024), torch.randn(1024, 1024)),
        "sites": (torch.randn(3, 50, 64), wide),
        "transposed": (torch.randn(64, 500).mT, wide),
        "sliced": (torch.randn(500, 128)[:, ::2], wide),
        "spread": (torch.randn(1, 64).expand(500, 64), wide),
        "weight transposed": (torch.randn(500, 64), tall.mT),
        "weight sliced": (torch.randn(500, 64), torch.randn(256, 96)[:, :64]),
        "narrow": (torch.randn(2000, 16), torch.randn(16, 16)),
        "small": (torch.randn(2, 64), wide),
        "no rows": (torch.randn(0, 64), wide),
    }


@pytest.mark.parametrize("name", shapes())
@pytest.mark.parametrize("biased", [True, False])
def test_products_and_their_gradients_are_those_of_torch(name, biased):
    x, weight = shapes()[name]
    bias = torch.randn(len(weight)) if biased else None
    inputs = [x, weight] + ([bias] if biased else [])
    fast = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found, expected = linear(*fast), F.linear(*exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    g = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, fast, g),
        torch.autograd.grad(expected, exact, g.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-3)
    if biased:
        with torch.no_grad():
            found = gelu_linear(x, weight, bias)
        torch.testing.assert_close(found.double(), F.gelu(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wide", [True, False])
def test_many_hidden_units_without_a_gradient(wide, monkeypatch):
    """In place of their inputs, or in one pass; with a gradient neither."""
    monkeypatch.setattr(_products, "_WIDE", wide)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2000, 64), torch.randn(256, 64), torch.randn(256)
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    torch.testing.assert_close(
        gelu_linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-4
    )
    learned = weight.clone().requires_grad_()
    (found,) = torch.autograd.grad(gelu_linear(x, learned, bias).sum(), learned)
    slope = torch.autograd.functional.jacobian(lambda h: F.gelu(h).sum(), x @ weight.mT + bias)
    torch.testing.assert_close(found, slope.mT @ x, rtol=1e-4, atol=1e-2)


SLIM = {
    "rows": lambda: torch.randn(600, 40),
    "sites": lambda: torch.randn(60, 17, 40),
    "transposed": lambda: torch.randn(40, 600).mT,
    "spread": lambda: torch.randn(1, 40).expand(600, 40),
    "few": lambda: torch.randn(3, 17, 40),
}


@pytest.mark.parametrize("name", SLIM)
@pytest.mark.parametrize("width", [1, 10, 11])
@pytest.mark.parametrize("biased", [True, False])
def test_few_numbers_a_row(name, width, biased, monkeypatch):
    """Their product lies transposed in memory; numbers and gradients are those of torch."""
    monkeypatch.setattr(_products, "_WIDE", False)
    torch.manual_seed(0)
    inputs = [SLIM[name](), torch.randn(width, 40), *([torch.randn(width)] if biased else [])]
    inputs = [t.double().requires_grad_() for t in inputs]
    found, expected = linear_term(*inputs), F.linear(*inputs)
    if width > 1:
        assert (found.stride(-1) == 1) == (name == "few")
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, g), torch.autograd.grad(expected, inputs, g)
    )


@fast
@pytest.mark.parametrize(("wide", "own", "asked"), [(1, 0, 5), (1, 1, 2), (0, 0, 2)])
def test_which_products_go_to_onednn(wide, own, asked, monkeypatch, calls):
    """All but small ones; large ones with weights in rows; those with very many weights."""
    monkeypatch.setattr(_products, "_WIDE", bool(wide))
    monkeypatch.setattr(_products, "_OWN", bool(own))
    monkeypatch.setattr(_products, "_SMALL", 1 << (23 if own else 17))
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2048, 64), torch.randn(256, 64), torch.randn(256)
    for rows in (x, x[:64], x[:4]):
        found = gelu_linear(rows, weight, bias)
        torch.testing.assert_close(found, F.gelu(F.linear(rows, weight, bias)))
    columns = torch.randn(64, 256).mT
    torch.testing.assert_close(linear(x, columns), F.linear(x, columns))
    big = torch.randn(2048, 2048)
    for many in (big, big.mT):
        expected = F.linear(big[:2], many)
        torch.testing.assert_close(linear(big[:2], many), expected, rtol=1e-4, atol=1e-3)
    assert len(calls) == asked


BIASES = {
    "strided": lambda: torch.randn(512)[::2],
    "one number": lambda: torch.randn(1).expand(256),
    "a column": lambda: torch.randn(256, 2)[:, 0],
}


@fast
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_may_lie_anywhere_in_memory(name, calls):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(500, 64), torch.randn(256, 64), BIASES[name]()
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-4)
    found = gelu_linear(x, weight, bias).double()
    torch.testing.assert_close(found, F.gelu(expected), rtol=1e-5, atol=1e-4)
    assert len(calls) == 2


@fast
def test_weights_with_gaps_are_not_for_onednn(calls):
    """It would take a thousand times as long."""
    x = torch.randn(500, 64)
    wide, tall = torch.randn(256, 128), torch.randn(64, 512)
    for weight in (
        wide[:, :64],
        wide[:, ::2],
        tall[:, ::2].mT,
        torch.randn(256, 1).expand(256, 64),
    ):
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert not calls
    g = torch.randn(500, 128)[:, ::2]
    given = torch.randn(500, 64), torch.randn(64, 64).requires_grad_()
    torch.autograd.grad(linear(*given), given[1], g)
    linear(x, torch.randn(256, 64)[::2])
    assert all(_products._dense(args[1]) for args in calls)


@fast
def test_gradients_can_be_differentiated_again(calls):
    torch.manual_seed(0)
    inputs = [torch.randn(40, 64), torch.randn(96, 64), torch.randn(96)]

    def second(product, dtype):
        given = [t.to(dtype).requires_grad_() for t in inputs]
        first = torch.autograd.grad(product(*given).pow(3).mean(), given, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), given)

    for ours, theirs in zip(
        second(linear, torch.float32), second(F.linear, torch.float64), strict=True
    ):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=0, atol=1e-5)
    assert calls


@fast
def test_the_plain_path_is_taken_where_somebody_looks(calls):
    x, weight = torch.randn(500, 64), torch.randn(256, 64)
    expected = F.linear(x, weight)
    linear(x, weight)
    assert len(calls) == 1
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 500 * 64 * 256
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(linear(x, weight), expected)
    rows = torch.func.vmap(linear, in_dims=(0, None))(x.view(5, 100, 64), weight)
    torch.testing.assert_close(rows.view_as(expected), expected)
    _, tangent = torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    torch.testing.assert_close(tangent, expected)
    linear(x.double(), weight.double())
    learned = weight.clone().requires_grad_()
    scaled = torch.func.vmap(lambda s: s * linear(x, learned))(torch.ones(2))
    torch.testing.assert_close(scaled[1], expected)
    bias = torch.randn(256)
    by_bias = torch.func.grad(lambda b: linear(x, learned, b).sum())(bias)
    torch.testing.assert_close(by_bias, torch.full((256,), 500.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: linear(x, weight), x, check_trace=False)
    torch.testing.assert_close(traced(x), expected)
    assert len(calls) == 1


@pytest.mark.skipif(not _products._has_bfloat16(), reason="no fast bfloat16")
class TestRough:
    """Normalised softmax layers begin in bfloat16 and end in float32."""

    def made(self, tol=1e-4):
        torch.manual_seed(0)
        module = DEQVanillaSoftmaxAttention(48, 64, heads=4, normalize=True, causal=True)
        with torch.no_grad():  # nearer to trained ones: slower to settle
            for layer in (module.to_out, module.correction.contract):
                layer.weight.mul_(1.6)
        return module, DEQFixedPoint(module, solver_fwd_tol=tol, solver_bwd_tol=tol)

    def test_answers_and_gradients_are_those_of_float32(self):
        module, layer = self.made()
        exact = DEQFixedPoint(
            copy.deepcopy(module).double(), solver_fwd_tol=1e-10, solver_bwd_tol=1e-10,
            solver_fwd_max_iter=200, solver_bwd_max_iter=200,
        )  # fmt: skip
        x = torch.randn(6, 48, 64)
        found = []
        for each, dtype in ((layer, torch.float32), (exact, torch.float64)):
            fields = x.detach().to(dtype).requires_grad_()
            z = each(fields)
            z.square().sum().backward()
            parameters = [p.grad.flatten() for p in each.parameters()]
            found.append([t.double() for t in (z, fields.grad, torch.cat(parameters))])
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm()

    def test_most_steps_are_narrow_and_the_last_ones_not(self, calls):
        module, layer = self.made()
        x = torch.randn(6, 48, 64)
        with torch.no_grad():
            solution = layer(x, return_solution=True)
            image = module.update(solution.value, module.prepare(x)).flatten(1)
        kinds = [args[1].dtype for args in calls]
        narrow = kinds.count(torch.bfloat16)
        assert narrow >= 3 * 3
        assert kinds[-9:].count(torch.bfloat16) == 0
        residual = (image - solution.value.flatten(1)).norm(dim=1) / image.norm(dim=1)
        torch.testing.assert_close(solution.residual, residual, rtol=1e-2, atol=1e-6)
        assert bool((residual <= 1e-4).all())

    def test_it_can_be_left_out_and_is_where_a_solve_starts_warm(self, calls):
        _, layer = self.made()
        x = torch.randn(6, 48, 64)
        with torch.no_grad():
            z = layer(x, solver_fwd_rough=None)
            layer(x, state=z)
        assert not any(args[1].dtype == torch.bfloat16 for args in calls)


def test_sums_over_fresh_results():
    """In place only where the result would be the same, and no graph needs the summand."""
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    with torch.no_grad():
        fresh = a.clone()
        found = _products.plus(fresh, b, alpha=-1)
        assert found is fresh
        assert torch.equal(found, a - b)
        for one, other in ((a[:1], b), (a, b[:, :1]), (a.bfloat16(), b)):
            kept = one.clone()
            assert torch.equal(_products.plus(one, other), one + other)
            assert torch.equal(one, kept)
    a.requires_grad_()
    assert _products.plus(a * 1, b).grad_fn is not None


@pytest.mark.parametrize(
    ("size", "rows", "dtype", "gaps"),
    [
        (1024, 32, torch.float64, True),
        (1024, 4, torch.float64, False),
        (1000, 32, torch.float64, False),
        (512, 32, torch.float64, False),
        pytest.param(1024, 32, torch.float32, False, marks=fast),  # oneDNN is slow at gaps
    ],
)
def test_rows_that_would_compete_in_the_cache_lie_apart(size, rows, dtype, gaps):
    weight = torch.randn(size, size, dtype=dtype)
    made = _products.for_transposed(weight, rows)
    assert torch.equal(made, weight)
    assert (made is not weight) == (made.stride() != weight.stride()) == gaps


def test_gradients_by_couplings_that_lie_apart():
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(64, 16).double()
    x, z, v = torch.randn(3, 8, 64, 16, dtype=torch.float64)
    context = module.prepare(x)
    (expected,) = torch.autograd.grad(module.update(z.requires_grad_(), context), z, v)
    with torch.no_grad():
        found = module.vjp(z, context)(v)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sites", [5, 127, 128])
@pytest.mark.parametrize("width", [1, 15, 16, 32])
def test_couplings_act_as_their_matrix_does(width, sites, dtype):
    """States are multiplied as rows or as they stand, as is faster; also for derivatives."""
    torch.manual_seed(0)
    q, k, z, g = torch.randn(4, 2, 3, sites, width, dtype=dtype)
    z = z.transpose(1, 2).contiguous().transpose(1, 2)  # as heads are split
    inputs = [t.requires_grad_() for t in (q, k, z)]
    coupled = couple(q, k, width, 0.3, None, True)
    hidden = torch.ones(sites, sites).triu(1).bool()
    matrix = (0.3 * q @ k.mT).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("bhij,bhjk->bhik", matrix, z)
    found = coupled.act(z)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(coupled.act(z), found)
        transposed = torch.einsum("bhij,bhik->bhjk", matrix, g)
        torch.testing.assert_close(coupled.transposed()(g), transposed)
    mine, theirs = (torch.autograd.grad(value, inputs, g) for value in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_narrow_products_of_a_gpu_are_sums_in_float32():
    """Without a GPU torch tells shapes and types only; `tests/other_device.py` has numbers."""

    def narrow(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda")

    with FakeTensorMode():
        x, weight = torch.empty(3, 5, 8, device="cuda"), narrow(6, 8)
        found = [
            _products.linear(x, weight),
            _products.linear(x, narrow(8, 6).mT),
            _products.linear_times(x, weight, narrow(3, 5, 6)),
            _products.sums(narrow(3, 5, 8), narrow(3, 6, 8).mT),
        ]
        for product in found:
            assert (product.shape, product.dtype) == ((3, 5, 6), torch.float32)
            assert product.is_cuda
        assert _products.gelu_linear(x, weight, narrow(6)).dtype == torch.bfloat16
