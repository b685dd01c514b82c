"""The fast paths of the mechanisms, each held against the plain way to the same thing."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
    _pooling,
    _products,
)
from deep_implicit_attention.attention._linear import factorise
from deep_implicit_attention.attention._site_couplings import respond
from deep_implicit_attention.deq import DEQFixedPoint


def check_by_context(module, x, inputs=(), without=()):
    """Hold (∂F/∂θ)ᵀ v for what a context is made of against autograd, all but `without`."""

    def alone(t):
        return t.detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t

    context = pytree.tree_map(alone, module.prepare(x, *inputs))
    fixed = {name: getattr(context, name) for name in without}
    context = context._replace(**pytree.tree_map_only(torch.Tensor, torch.detach, fixed))
    parts, tree = pytree.tree_flatten(context)
    needed = [t.requires_grad if isinstance(t, torch.Tensor) else t for t in parts]
    leaves = [t for t in parts if isinstance(t, torch.Tensor) and t.requires_grad]
    z, v = torch.randn_like(x), torch.randn_like(x)
    expected = torch.autograd.grad(module.update(z, context), leaves, v, allow_unused=True)
    with torch.no_grad():
        found = module.vjp(z, context).by_context(v, pytree.tree_unflatten(needed, tree))
    derivatives, same = pytree.tree_flatten(found)
    assert same == tree
    expected = dict(zip(map(id, leaves), expected, strict=True))
    for part, derivative in zip(parts, derivatives, strict=True):
        if expected.get(id(part)) is None:
            assert not isinstance(derivative, torch.Tensor)
        else:
            torch.testing.assert_close(derivative, expected[id(part)], rtol=1e-11, atol=1e-12)


class TestContext:
    """What a mechanism says of its own map."""

    def test_first_step_is_the_update_of_zeros(self, case, x):
        module = case.module
        if not hasattr(module, "first_step"):
            pytest.skip("has none")
        context = module.prepare(module.sources(x, *case.inputs), *case.inputs)
        expected = module.update(torch.zeros_like(x), context)
        torch.testing.assert_close(module.first_step(context), expected, rtol=1e-12, atol=1e-12)

    def test_vjp_is_that_of_autograd(self, case, x):
        module = case.module
        if not hasattr(module, "vjp"):
            pytest.skip("has none")
        context = module.prepare(module.sources(x, *case.inputs), *case.inputs)
        z = torch.randn_like(x, requires_grad=True)
        v = torch.randn_like(x)
        (expected,) = torch.autograd.grad(module.update(z, context), z, v)
        found = module.vjp(z.detach(), context)(v)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("without", [(), ("x",), ("couplings",), ("correction",)])
    def test_derivatives_by_the_context_are_those_of_autograd(self, case, x, without):
        module = case.module
        if not hasattr(module, "vjp"):
            pytest.skip("has none")
        x = module.sources(x.requires_grad_(), *case.inputs)
        check_by_context(module, x, case.inputs, without)

    def test_preconditioner_is_linear_and_knows_its_transpose(self, case, x):
        module = case.module
        if not hasattr(module, "preconditioner"):
            pytest.skip("has none")
        context = module.prepare(module.sources(x, *case.inputs), *case.inputs)
        p = module.preconditioner(context)
        a, b = torch.randn_like(x), torch.randn_like(x)
        if case.inputs:  # residuals of hidden sites are zero
            hidden = ~case.inputs[0][:, :, None]
            a, b = a.masked_fill(hidden, 0), b.masked_fill(hidden, 0)
        torch.testing.assert_close(p(2 * a + b), 2 * p(a) + p(b))
        torch.testing.assert_close((p(a) * b).sum(), (a * p.transposed(b)).sum())

    def test_remainder_is_the_update_without_its_linear_part(self, case, x):
        """What is left out is linear, and all that is linear at zero is left out."""
        module = case.module
        x = module.sources(x, *case.inputs)
        with torch.no_grad():
            context = module.prepare(x, *case.inputs)
            p = module.preconditioner(context) if hasattr(module, "preconditioner") else None
        if p is None or p.remainder is None:
            pytest.skip("has none")
        a, b = torch.randn_like(x), torch.randn_like(x)
        if case.inputs:
            hidden = ~case.inputs[0][:, :, None]
            a, b = a.masked_fill(hidden, 0), b.masked_fill(hidden, 0)

        def linear(z):
            return module.update(z, context) - p.remainder(z)

        torch.testing.assert_close(linear(2 * a + b), 2 * linear(a) + linear(b))
        zero = torch.zeros_like(x).requires_grad_()
        (slope,) = torch.autograd.grad(p.remainder(zero), zero, b)
        torch.testing.assert_close(slope, torch.zeros_like(x))
        z = a.clone().requires_grad_()
        (expected,) = torch.autograd.grad(p.remainder(z), z, b)
        found = module.vjp(a, context).remainder(b)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)

    def test_preconditioned_and_plain_solves_agree(self, case, x):
        tight = {"solver_fwd_tol": 1e-12, "solver_fwd_max_iter": 500, "on_failure": "ignore"}
        layer = DEQFixedPoint(case.module, **tight)
        if not hasattr(case.module, "preconditioner"):
            pytest.skip("has none")
        found = layer(x, *case.inputs, return_solution=True)
        plain = layer(x, *case.inputs, solver_fwd_preconditioner=None, return_solution=True)
        assert bool(found.converged.all())
        # One is lost where it turns out not to help.
        assert found.steps.max() <= plain.steps.max() + 1
        torch.testing.assert_close(found.value, plain.value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["plain", "normalized", "dropout", "appended"])
def test_derivatives_by_the_context_of_softmax_layers(kind, fused, monkeypatch):
    if fused:
        monkeypatch.setattr(_pooling, "_FUSED", 1)
        monkeypatch.setattr(_pooling, "_LONG", 1)
    torch.manual_seed(0)
    module = DEQVanillaSoftmaxAttention(
        5, 6, heads=3, causal=True, normalize=kind == "normalized",
        dropout=0.3 if kind == "dropout" else 0.0,
    ).double()  # fmt: skip
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    if kind != "appended":
        torch.manual_seed(1)
        check_by_context(module, x)
        return
    context = module.append(module.prepare(x), torch.randn_like(x), x[:, :1])
    monkeypatch.setattr(module, "prepare", lambda x: context)
    check_by_context(module, x[:, :1])


def test_gradients_of_a_layer_are_those_of_its_update(case, x):
    """Derivatives by the context reach the parameters as they do through a graph of the update."""
    if not hasattr(case.module, "vjp"):
        pytest.skip("has none")
    layer = DEQFixedPoint(
        case.module, solver_fwd_tol=1e-13, solver_fwd_max_iter=300,
        solver_bwd_tol=1e-13, solver_bwd_max_iter=300,
    )  # fmt: skip
    weights = [x.requires_grad_(), *case.module.parameters()]

    def gradients(layer):
        return torch.autograd.grad(layer(x, *case.inputs).pow(3).sum(), weights)

    found, kind = gradients(layer), type(case.module)
    by_state = type("ByState", (kind,), {"vjp": lambda self, z, c: kind.vjp(self, z, c).by_state})
    case.module.__class__ = by_state
    torch.testing.assert_close(found, gradients(layer), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 4])
def test_softmax_layers_at_the_start_need_few_evaluations(heads):
    torch.manual_seed(0)
    module = DEQVanillaSoftmaxAttention(64, 16, heads)
    x = torch.randn(8, 64, 16) / 4
    layer = DEQFixedPoint(module)
    few = layer(x, return_solution=True).steps.max()
    many = layer(x, return_solution=True, solver_fwd_preconditioner=None).steps.max()
    assert 2 * few < many


class TestFused:
    """Fused attention of many sites, first and second derivatives, against the matrix."""

    @pytest.fixture(params=["softmax", "causal", "vector-spin"])
    def module(self, request):
        torch.manual_seed(0)
        if request.param == "vector-spin":
            return DEQVectorSpinAttention(8, 2).double()
        causal = request.param == "causal"
        return DEQVanillaSoftmaxAttention(6, 4, heads=2, causal=causal).double()

    def respond(self, module, x):
        tight = {"solver_fwd_tol": 1e-13, "solver_bwd_tol": 1e-13, "on_failure": "ignore"}
        layer = DEQFixedPoint(module, solver_fwd_max_iter=200, solver_bwd_max_iter=200, **tight)
        x = x.clone().requires_grad_()
        z = layer(x)
        weights = [x, *module.parameters()]
        first = torch.autograd.grad(z.pow(3).sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
        with torch.no_grad():
            plain = layer(x)
        return [z, plain, *first, *second]

    @pytest.mark.parametrize("long", [100, 1])
    def test_equals_the_matrix(self, module, long, monkeypatch):
        x = 0.5 * torch.randn(2, 6, module.dim).double()
        expected = self.respond(module, x)
        monkeypatch.setattr(_pooling, "_FUSED", 1)
        monkeypatch.setattr(_pooling, "_LONG", long)
        assert (module.prepare(x).couplings.matrix is None) == (long == 1)
        torch.testing.assert_close(self.respond(module, x), expected, rtol=1e-8, atol=1e-9)

    def test_a_gradient_that_does_not_go_to_the_couplings(self, monkeypatch):
        """Neither sources nor queries nor keys have one: what is left is that of W_O."""
        torch.manual_seed(0)
        module = DEQVanillaSoftmaxAttention(6, 4, heads=2).double().requires_grad_(False)
        weight = module.to_out.weight.requires_grad_()
        layer, x = DEQFixedPoint(module), 0.5 * torch.randn(2, 6, 4).double()
        (expected,) = torch.autograd.grad(layer(x).pow(3).sum(), weight)
        monkeypatch.setattr(_pooling, "_FUSED", 1)
        assert module.prepare(x).couplings.fused
        (found,) = torch.autograd.grad(layer(x).pow(3).sum(), weight)
        torch.testing.assert_close(found, expected)

    def test_one_update_in_float32(self, module, monkeypatch):
        module.float()
        x, z = torch.randn(2, 300, module.dim), torch.randn(2, 300, module.dim)
        fused = module.update(z, module.prepare(x))
        monkeypatch.setattr(_pooling, "_FUSED", 1000)
        expected = module.update(z, module.prepare(x))
        torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("scale", [0.0, -1.5])
    def test_logits_multiplied_by_zero_or_turned_round(self, scale, monkeypatch):
        torch.manual_seed(0)
        module = DEQVanillaSoftmaxAttention(6, 4, heads=2, scale=scale, causal=True).double()
        x = 0.5 * torch.randn(2, 6, 4).double()
        expected = self.respond(module, x)
        for long in (100, 1):
            monkeypatch.setattr(_pooling, "_FUSED", 1)
            monkeypatch.setattr(_pooling, "_LONG", long)
            torch.testing.assert_close(self.respond(module, x), expected, rtol=1e-8, atol=1e-9)

    def test_no_matrix_is_made_of_many_sites(self):
        module = DEQVanillaSoftmaxAttention(8, 4, heads=2)
        context = module.prepare(torch.randn(1, 2048, 4, requires_grad=True))
        assert context.couplings.matrix is None
        assert context.couplings.queries is not None


@pytest.mark.parametrize("sites", [1, 3])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("internal", [True, False])
@pytest.mark.parametrize("mirrored", [True, False])
def test_coupling_matrix_is_the_weight_in_another_order(sites, dim, internal, mirrored):
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(
        sites, dim, weight_sym_internal=internal, weight_sym_sites=mirrored
    ).double()
    raw = module._weight.detach().clone()
    size = sites * dim
    expected = module.weight().permute(0, 2, 1, 3).reshape(size, size)
    torch.testing.assert_close(module.coupling_matrix(), expected)
    torch.testing.assert_close(module._weight.detach(), raw, rtol=0, atol=0)

    def matrix(weight):
        return torch.func.functional_call(_Matrix(module), {"module._weight": weight}, ())

    assert gradcheck(matrix, module._weight)
    assert gradgradcheck(matrix, module._weight)


def test_a_weight_set_on_the_instance_is_the_one_that_counts(monkeypatch):
    module = DEQMeanFieldAttention(3, 2)
    precision = torch.eye(2).repeat(3, 1, 1)
    monkeypatch.setattr(module, "weight", lambda: torch.zeros(3, 3, 2, 2))
    assert torch.equal(module.coupling_matrix(), torch.zeros(6, 6))
    assert torch.equal(module.coupling_operator(precision), torch.eye(6))


def test_the_derivative_by_couplings_is_not_copied_into_another_order():
    """Couplings may be most of the memory there is."""
    module = DEQMeanFieldAttention(5, 4)
    couplings = module.prepare(torch.randn(2, 5, 4)).couplings
    assert couplings.shape == (5, 4, 5, 4)
    assert type(couplings.grad_fn).__name__ == "_MatrixBackward"
    layer = DEQFixedPoint(module)
    seen = []
    prepare = module.prepare

    def prepared(x):
        context = prepare(x)
        context.couplings.register_hook(seen.append)
        return context

    module.prepare = prepared
    layer(torch.randn(2, 5, 4)).sum().backward()
    (g,) = seen
    assert g.transpose(1, 2).is_contiguous()  # in the order of the raw couplings


class _Matrix(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self):
        return self.module.coupling_matrix()


class _Operator(_Matrix):
    def forward(self, precision):
        return self.module.coupling_operator(precision)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("symmetries", [(True, True), (True, False), (False, True), (False, False)])
def test_the_operator_of_a_gaussian_prior(dim, symmetries):
    """blockdiag P − J of raw couplings and P, and its derivatives."""
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(3, dim, None, True, *symmetries).double()
    precision = torch.randn(3, dim, dim, dtype=torch.float64, requires_grad=True)
    expected = torch.block_diag(*precision) - module.coupling_matrix()
    torch.testing.assert_close(module.coupling_operator(precision), expected)

    def operator(weight, precision):
        replaced = {"module._weight": weight}
        return torch.func.functional_call(_Operator(module), replaced, (precision,))

    assert gradcheck(operator, (module._weight, precision))
    assert gradgradcheck(operator, (module._weight, precision))


class _Response(_Matrix):
    def forward(self, root, b):
        precision = root + root.mT
        operator = self.module.coupling_operator(precision)
        symmetric = self.module.weight_sym_internal and self.module.weight_sym_sites
        return respond(operator, b, factorise(operator, symmetric))


@pytest.mark.quick("symmetries[03]-*")
@pytest.mark.parametrize("scale", [0.2, 4.0])  # positive definite or not
@pytest.mark.parametrize("symmetries", [(True, True), (True, False), (False, True), (False, False)])
def test_the_response_of_a_gaussian_prior(scale, symmetries):
    """(blockdiag P − J)⁻¹ b, and its derivatives by the raw couplings, P and b in one piece."""
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(3, 2, scale, True, *symmetries).double()
    root = torch.eye(2, dtype=torch.float64) + 0.1 * torch.randn(3, 2, 2, dtype=torch.float64)
    b = torch.randn(2, 6, dtype=torch.float64).mT
    operator = torch.block_diag(*(root + root.mT)) - module.coupling_matrix()

    def response(weight, root, b):
        replaced = {"module._weight": weight}
        return torch.func.functional_call(_Response(module), replaced, (root, b))

    at = module._weight, root.requires_grad_(), b.requires_grad_()
    found = response(*at)
    assert found.grad_fn.name() == "_ResponseBackward"
    torch.testing.assert_close(found, torch.linalg.solve(operator, b))
    assert gradcheck(response, at)
    assert gradgradcheck(response, at)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 7, 8])
def test_few_rows_of_a_large_operator(batch, symmetric, monkeypatch):
    """Products with it as columns, in plain and frozen solves, in the place of rows."""
    module = DEQAdaTAPMeanFieldAttention(
        6, 4, weight_sym_internal=symmetric, weight_sym_sites=symmetric
    ).double()
    layer, found = DEQFixedPoint(module), []
    for least in (10**9, 24):  # as rows, then as columns
        monkeypatch.setattr(_products, "_TALL", least)
        torch.manual_seed(1)
        x = torch.randn(batch, 6, 4, dtype=torch.float64, requires_grad=True)
        plain = layer(x, return_solution=True)
        with module.frozen():
            frozen = layer(x, return_solution=True)
        for solution in (plain, frozen):
            by_x = torch.autograd.grad(solution.value.sin().sum(), x)[0]
            found += [solution.value, by_x]
            assert solution.all_converged()
            assert solution.value.is_contiguous()
            assert solution.residual.max() < 1e-14
    for value in found[2:]:
        expected = found[0] if value.requires_grad else found[1]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_adaptive_tap_with_many_components_is_as_exact_as_with_few():
    """The padded factorisation, at a size that is a multiple of 512."""
    torch.manual_seed(0)
    module = DEQAdaTAPMeanFieldAttention(64, 8).double()
    x = torch.randn(2, 64, 8).double()
    z = DEQFixedPoint(module)(x)
    operator = torch.eye(512).double() - module.coupling_matrix()
    expected = torch.linalg.solve(operator, x.flatten(1).mT).mT.view_as(x)
    torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-12)
