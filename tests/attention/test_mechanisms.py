"""What holds for every mechanism, and for each against its equations written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn import functional as F

from deep_implicit_attention.attention import (
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
)
from deep_implicit_attention.deq import DEQFixedPoint
from deep_implicit_attention.solvers import anderson, broyden, newton_krylov, picard

TIGHT = {
    "solver_fwd_tol": 1e-13,
    "solver_fwd_max_iter": 300,
    "solver_bwd_tol": 1e-13,
    "solver_bwd_max_iter": 300,
}


def network(weights, x):
    """The two-layer network of `FeedForward`, from its parameters."""
    hidden = F.gelu(x @ weights.expand.weight.T + weights.expand.bias)
    return hidden @ weights.contract.weight.T + weights.contract.bias


class Causal(DEQMeanFieldAttention):
    """Free couplings to earlier sites only."""

    def weight(self):
        return super().weight() * torch.ones(4, 4).tril()[:, :, None, None].to(self._weight)


@pytest.mark.parametrize("steps", [None, 3])
def test_couplings_are_those_that_weight_says(x, steps):
    torch.manual_seed(0)
    module = Causal(4, 6).double()
    layer = DEQFixedPoint(module, steps=steps, **TIGHT)
    later = x.clone()
    later[:, 2:] += 1
    z = layer(x)
    torch.testing.assert_close(layer(later)[:, :2], z[:, :2], rtol=0, atol=1e-10)
    (by_weight,) = grad(z.square().sum(), module._weight)
    apart = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    assert bool((by_weight[~apart] == 0).all())
    assert bool((by_weight[apart] != 0).all())


def test_replicas_of_data_parallel_modules(case, x):
    """As `nn.DataParallel` makes them: attributes in the place of parameters."""
    replica = case.module._replicate_for_data_parallel()
    for name, child in case.module.named_modules():
        if name:
            parent, _, last = name.rpartition(".")
            copied = child._replicate_for_data_parallel()
            replica.get_submodule(parent)._modules[last] = copied
    for original, copied in zip(case.module.modules(), replica.modules(), strict=True):
        for name, parameter in original._parameters.items():
            setattr(copied, name, None if parameter is None else parameter.view_as(parameter))
    found = DEQFixedPoint(replica, **TIGHT)(x, *case.inputs)
    expected = DEQFixedPoint(case.module, **TIGHT)(x, *case.inputs)
    torch.testing.assert_close(found, expected)
    weights = [p for p in case.module.parameters() if p.requires_grad]
    torch.testing.assert_close(
        grad(found.square().sum(), weights), grad(expected.square().sum(), weights)
    )


class TestEquations:
    """One update against the equation of the docstring, site by site."""

    def test_mean_field(self, x):
        torch.manual_seed(0)
        module = DEQMeanFieldAttention(4, 6).double()
        z = torch.randn_like(x)
        weight = module._weight
        expected = torch.zeros_like(x)
        for i in range(4):
            for j in range(4):
                if i != j:
                    expected[:, i] += z[:, j] @ weight[i, j].T
            expected[:, i] += x[:, i] - network(module.correction, z[:, i])
        torch.testing.assert_close(module.update(z, module.prepare(x)), expected)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_softmax(self, x, causal, masked):
        torch.manual_seed(0)
        module = DEQVanillaSoftmaxAttention(4, 6, heads=2, dim_head=5, causal=causal).double()
        mask = torch.ones(3, 4, dtype=torch.bool)
        if masked:
            mask[0, 0] = mask[1, 3] = mask[2, 1] = False
        z = torch.randn_like(x)
        expected = torch.zeros_like(x)
        for b in range(3):
            for i in range(4):
                if not mask[b, i]:
                    continue
                heads = []
                for h in range(2):
                    rows = slice(5 * h, 5 * h + 5)
                    q = module.to_q.weight[rows] @ x[b, i]
                    keys = [j for j in range(4) if mask[b, j] and (j <= i or not causal)]
                    logits = torch.stack(
                        [q @ (module.to_k.weight[rows] @ x[b, j]) / math.sqrt(5) for j in keys]
                    )
                    part = z[b, :, 3 * h : 3 * h + 3]
                    heads.append(logits.softmax(0) @ part[keys])
                field = module.to_out.weight @ torch.cat(heads) + module.to_out.bias
                expected[b, i] = field + x[b, i] - network(module.correction, z[b, i])
        hidden = module.sources(x, mask)
        torch.testing.assert_close(module.update(z, module.prepare(hidden, mask)), expected)

    def test_mixer(self, x):
        torch.manual_seed(0)
        module = DEQMLPMixerAttention(4, 6).double()
        z = torch.randn_like(x)
        expected = torch.zeros_like(x)
        for a in range(6):
            expected[:, :, a] = network(module.sum_over_couplings, z[:, :, a]) + x[:, :, a]
        expected = expected - network(module.correction, z)
        torch.testing.assert_close(module.update(z, module.prepare(x)), expected)

    def test_vector_spin(self, x):
        torch.manual_seed(0)
        module = DEQVectorSpinAttention(6, 2, beta=1.7).double()
        z = torch.randn_like(x)
        couplings = module.couplings(x)
        fields = x + network(module.source, x)
        expected = torch.zeros_like(x)
        radius2 = 3 / 2 - 1
        for i in range(4):
            for h in range(2):
                part = slice(3 * h, 3 * h + 3)
                field = fields[:, i, part] + sum(
                    couplings[:, h, i, j, None] * z[:, j, part] for j in range(4)
                )
                field = 1.7 * field
                length2 = (field**2).sum(dim=1, keepdim=True)
                expected[:, i, part] = field / (1 + torch.sqrt(1 + length2 / radius2))
        torch.testing.assert_close(module.update(z, module.prepare(x)), expected)

    def test_lin_response_false_drops_the_correction(self, x):
        for make in (
            lambda: DEQMeanFieldAttention(4, 6, lin_response=False),
            lambda: DEQVanillaSoftmaxAttention(4, 6, lin_response=False),
            lambda: DEQMLPMixerAttention(4, 6, lin_response=False),
        ):
            torch.manual_seed(0)
            module = make().double()
            assert not any("correction" in name for name, _ in module.named_parameters())
            z = torch.randn_like(x)
            step = module.update(z, module.prepare(x)) - module.update(0 * z, module.prepare(x))
            assert step.norm() > 0.1  # the couplings act


def assert_third_order(layer, x, inputs=(), **options):
    x = x.requires_grad_()
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)

    def second(t):
        """∂²/∂t² of a loss along `direction`, with its graph."""
        loss = layer(x.detach() + t * direction, *inputs, **options).pow(4).sum()
        (first,) = grad(loss, t, create_graph=True)
        return grad(first, t, create_graph=True)[0]

    t = torch.zeros((), dtype=x.dtype, requires_grad=True)
    (third,) = grad(second(t), t)
    h = 1e-4
    ends = [second(torch.tensor(s, dtype=x.dtype, requires_grad=True)) for s in (h, -h)]
    difference = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(third, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [DEQVanillaSoftmaxAttention, DEQVectorSpinAttention])
@pytest.mark.parametrize("steps", [None, 2])
def test_third_order_of_normalised_layers(kind, steps, x):
    """Where torch's own layer norm would be wrong."""
    torch.manual_seed(0)
    sites = (4,) if kind is DEQVanillaSoftmaxAttention else ()
    layer = DEQFixedPoint(kind(*sites, 6, 2, normalize=True).double(), anderson, **TIGHT)
    assert_third_order(layer, x, steps=steps)


class TestGradients:
    def run(self, case, x, *parameters):
        layer = DEQFixedPoint(case.module, anderson, **TIGHT)
        names = [f"fun.{name}" for name, _ in case.module.named_parameters()]
        state = dict(zip(names, parameters, strict=True))
        return functional_call(layer, state, (x, *case.inputs))

    def tensors(self, case, x):
        parameters = [p.detach().clone().requires_grad_() for p in case.module.parameters()]
        return (x.requires_grad_(), *parameters)

    @pytest.mark.quick("*-True", "mean-field-False")
    @pytest.mark.parametrize("training", [True, False])
    def test_first_order(self, case, x, training):
        case.module.train(training)
        function = lambda x, *p: self.run(case, x, *p)  # noqa: E731
        assert gradcheck(function, self.tensors(case, x), eps=1e-6, atol=1e-6, fast_mode=True)

    @pytest.mark.quick("mean-field*", "softmax-causal", "adatap*")
    def test_second_order(self, case, x):
        case.module.eval()
        function = lambda x, *p: self.run(case, x[None], *p)  # noqa: E731
        case.inputs = tuple(mask[:1] for mask in case.inputs)
        assert gradgradcheck(
            function, self.tensors(case, x[0]), eps=1e-6, atol=1e-6, fast_mode=True
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("training", [True, False])
    def test_both_orders_entry_by_entry(self, case, x, training):
        case.module.train(training)
        function = lambda x, *p: self.run(case, x, *p)  # noqa: E731
        assert gradcheck(function, self.tensors(case, x), eps=1e-6, atol=1e-6)
        assert gradgradcheck(function, self.tensors(case, x), eps=1e-6, atol=1e-6)

    @pytest.mark.quick(
        "softmax-causal", "vector-spin-causal", "mixer", "mean-field*", "adatap-free"
    )
    def test_implicit_is_backpropagation_through_500_steps(self, case, x):
        layer = DEQFixedPoint(case.module, anderson, **TIGHT)
        tensors = self.tensors(case, x)
        weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
        context = case.module.prepare(case.module.sources(x, *case.inputs), *case.inputs)
        z = case.module.initial_state(x)
        for _ in range(500):
            z = case.module.update(z, context)
        z = z if isinstance(z, torch.Tensor) else z[0]
        inside = [tensors[0], *case.module.parameters()]
        expected = grad((weights * z).sum(), inside)
        for solver in (anderson, picard, broyden, newton_krylov):
            layer = DEQFixedPoint(case.module, solver, **TIGHT)
            mine = grad((weights * layer(x, *case.inputs)).sum(), inside)
            for a, b in zip(mine, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    @pytest.mark.quick("mean-field", "softmax-causal", "mixer", "vector-spin", "adatap")
    def test_third_order(self, case, x):
        assert_third_order(DEQFixedPoint(case.module, anderson, **TIGHT), x, case.inputs)

    def test_every_parameter_learns(self, case, x):
        layer = DEQFixedPoint(case.module)
        layer(x, *case.inputs).square().sum().backward()
        for name, parameter in case.module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 0, name
            assert bool(parameter.grad.isfinite().all()), name

    @pytest.mark.quick("mean-field", "softmax-masked", "mixer", "adatap", "vector-spin")
    def test_bytes_saved_do_not_depend_on_steps(self, case, x):
        def saved(steps):
            total = 0

            def pack(t):
                nonlocal total
                total += t.numel() * t.element_size()
                return t

            layer = DEQFixedPoint(
                case.module, on_failure="ignore", solver_fwd_tol=0.0, solver_fwd_max_iter=steps
            )
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                layer(x, *case.inputs)
            return total

        assert 0 < saved(5) == saved(500)


class TestBatch:
    @pytest.mark.quick("*-anderson", "mean-field-[!s]*", "softmax-causal-*1e-10-*")
    @pytest.mark.parametrize("solver", [picard, anderson, broyden, newton_krylov])
    @pytest.mark.parametrize(
        ("dtype", "tol", "close"),
        [
            (torch.float64, 1e-4, 1e-10),
            (torch.float64, 1e-10, 1e-10),
            (torch.float32, 1e-4, 1e-5),
            (torch.float32, 1e-6, 1e-5),
        ],
    )
    def test_a_sample_alone_and_in_a_batch_of_64(self, case, solver, dtype, tol, close):
        case.module.to(dtype)
        torch.manual_seed(2)
        scales = torch.logspace(-2, 1, 64, dtype=torch.float64)[:, None, None]
        fields = (scales * torch.randn(64, 4, 6, dtype=torch.float64)).to(dtype)
        inputs = tuple(mask[torch.arange(64) % len(mask)] for mask in case.inputs)
        layer = DEQFixedPoint(
            case.module, solver, solver_fwd_tol=tol, solver_fwd_max_iter=200, on_failure="ignore"
        )
        with torch.no_grad():
            together = layer(fields, *inputs)
            for i in (0, 17, 40, 63):
                pick = slice(i, i + 1)
                alone = layer(fields[pick], *(mask[pick] for mask in inputs))
                gap = (alone - together[pick]).norm() / together[pick].norm()
                assert gap <= close

    def test_permuting_samples_permutes_answers(self, case, x):
        layer = DEQFixedPoint(case.module, **TIGHT)
        order = torch.tensor([2, 0, 1])
        there = layer(x[order], *(mask[order] for mask in case.inputs))
        torch.testing.assert_close(there, layer(x, *case.inputs)[order])

    def test_empty_batch(self, case):
        layer = DEQFixedPoint(case.module)
        x = torch.zeros(0, 4, 6, dtype=torch.float64, requires_grad=True)
        z = layer(x, *(mask[:0] for mask in case.inputs))
        z.sum().backward()
        assert z.shape == (0, 4, 6)

    def test_couplings_are_computed_once_a_solve(self, case, x, monkeypatch):
        calls = []
        prepare = type(case.module).prepare
        monkeypatch.setattr(type(case.module), "prepare", lambda *a: calls.append(1) or prepare(*a))
        DEQFixedPoint(case.module)(x, *case.inputs).sum().backward()
        assert len(calls) == 1


class TestCouplings:
    def test_shape_and_locality(self, case, x):
        couplings = case.module.couplings(x, *case.inputs)
        heads = getattr(case.module, "heads", 1)
        assert couplings.shape == (3, heads, 4, 4)
        assert bool((couplings >= 0).all())

    @pytest.mark.parametrize("sites", [False, True])
    @pytest.mark.parametrize("internal", [False, True])
    def test_site_couplings(self, internal, sites):
        torch.manual_seed(0)
        module = DEQMeanFieldAttention(4, 3, None, True, internal, sites)
        weight = module.weight()
        assert not bool(weight.diagonal(dim1=0, dim2=1).any())
        assert torch.equal(weight, weight.transpose(2, 3)) == internal
        assert torch.equal(weight, weight.transpose(0, 1)) == sites
        # Free parameters: the rank of the linear map from the raw parameter to the couplings.
        raw = torch.eye(4 * 4 * 3 * 3).view(-1, 4, 4, 3, 3)
        images = []
        for direction in raw:
            module._weight.data = direction
            images.append(module.weight().detach().flatten())
        assert torch.linalg.matrix_rank(torch.stack(images)) == module.count_params()

    def test_initialisation(self):
        torch.manual_seed(0)
        module = DEQMeanFieldAttention(20, 8)
        expected = 1 / math.sqrt(20 * 8**2)
        assert abs(module._weight.std().item() / expected - 1) < 0.02
        frozen = DEQMeanFieldAttention(4, 3, weight_init_std=0.5, weight_training=False)
        assert "_weight" in dict(frozen.named_buffers())
        assert 0.3 < frozen._weight.std() < 0.7

    def test_softmax_rows(self, x):
        torch.manual_seed(0)
        module = DEQVanillaSoftmaxAttention(4, 6, heads=2, causal=True).double()
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[0, :2] = False
        couplings = module.couplings(x, mask)
        sums = couplings.sum(dim=-1)
        expected = torch.ones_like(sums)
        expected[0, :, :2] = 0  # queries without any key
        torch.testing.assert_close(sums, expected)
        assert not bool(couplings.triu(1).any())
        assert not bool(couplings[0, :, :, :2].any())

    def test_mixer_couplings_are_its_jacobian(self, x):
        torch.manual_seed(0)
        module = DEQMLPMixerAttention(4, 6).double()
        g = lambda z: network(module.sum_over_couplings, z.T).T  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(g, x[0])  # (i, a, j, b)
        expected = torch.linalg.vector_norm(jacobian, dim=(1, 3))
        torch.testing.assert_close(module.couplings(x)[0, 0], expected)


@pytest.mark.parametrize("sites", [1, 7, 40])
def test_softmax_takes_any_length(sites):
    torch.manual_seed(0)
    layer = DEQFixedPoint(DEQVanillaSoftmaxAttention(4, 6, heads=2))
    assert layer(torch.randn(2, sites, 6) / 3).shape == (2, sites, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_zero_sources_converge(case, x, dtype):
    case.module.to(dtype)
    layer = DEQFixedPoint(case.module, on_failure="raise")
    solution = layer(torch.zeros_like(x, dtype=dtype), *case.inputs, return_solution=True)
    assert bool(solution.value.isfinite().all())


def test_couplings_of_the_mixer_have_gradients_of_all_they_depend_on():
    torch.manual_seed(0)
    module = DEQMLPMixerAttention(3, 2).double()
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    mixing = module.sum_over_couplings
    depends_on = (
        x.requires_grad_(),
        mixing.expand.weight,
        mixing.expand.bias,
        mixing.contract.weight,
    )
    assert gradcheck(lambda *_: module.couplings(x), depends_on)
    expected = module.couplings(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(module.couplings(x.detach().clone()), expected)
    by_sample = torch.func.vmap(lambda one: module.couplings(one[None])[0])(x.detach())
    torch.testing.assert_close(by_sample.detach(), expected)
