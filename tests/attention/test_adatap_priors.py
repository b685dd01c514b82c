"""Adaptive TAP attention with priors: against the spin systems behind it."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from deep_implicit_attention.attention import DEQAdaTAPMeanFieldAttention
from deep_implicit_attention.deq import ConvergenceWarning, DEQFixedPoint
from deep_implicit_attention.solvers import anderson, picard
from deep_implicit_attention.spins import (
    AdaptiveTAP,
    Exact,
    ExpectationPropagation,
    GaussianPrior,
    IsingPrior,
    NaiveMeanField,
    PottsPrior,
    SphericalPrior,
    SpinSystem,
)
from deep_implicit_attention.spins._prior import Prior

SITES, DIM = 4, 3


def gaussian() -> GaussianPrior:
    root = torch.tensor([[0.9, 0, 0], [0.2, 0.8, 0], [-0.1, 0.3, 1.0]], dtype=torch.float64)
    return GaussianPrior(torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64), root @ root.T)


PRIORS = {
    "gaussian": gaussian,
    "ising": IsingPrior,
    "potts": lambda: PottsPrior(DIM),
    "sphere": lambda: SphericalPrior(DIM, 1.2),
}
ITERATED = [name for name in PRIORS if name != "gaussian"]


def make(name: str, std: float | None = None, **options) -> DEQAdaTAPMeanFieldAttention:
    torch.manual_seed(0)
    prior = PRIORS[name]()
    if name == "gaussian" and std is not None and std < 1:
        std *= 0.4  # so that P − J is positive definite
    return DEQAdaTAPMeanFieldAttention(SITES, DIM, std, prior=prior, **options).double()


def behind(module: DEQAdaTAPMeanFieldAttention, x: torch.Tensor):
    """The spin system, its fields, and a function to bring an answer in the layer's shape."""
    weight = module.weight()
    if isinstance(module.prior, IsingPrior):
        couplings = weight.permute(0, 2, 1, 3).reshape(SITES * DIM, SITES * DIM)
        return SpinSystem(couplings, IsingPrior()), x.flatten(1)
    return SpinSystem(weight, module.prior), x


@pytest.fixture
def fields():
    torch.manual_seed(1)
    return torch.randn(3, SITES, DIM, dtype=torch.float64) / DIM**0.5


@pytest.mark.parametrize("name", PRIORS)
def test_the_layer_returns_the_response_of_the_system(name, fields):
    module = make(name, 0.4)
    layer = DEQFixedPoint(
        module, output_elements=(0, 1), solver_fwd_tol=1e-12, solver_fwd_max_iter=200
    )
    z, cavity = layer(fields)
    system, x = behind(module, fields)
    response = AdaptiveTAP(tol=1e-13)(system, x)
    torch.testing.assert_close(z, response.magnetization.view_as(z), rtol=0, atol=1e-10)
    V = response.cavity_variance
    if name == "ising":
        V = torch.diag_embed(V.view_as(z))
    torch.testing.assert_close(cavity, V, rtol=0, atol=1e-10)
    samples_differ = (cavity[0] - cavity[1]).abs().max().item() > 1e-6
    assert samples_differ == (name != "gaussian")


@pytest.mark.quick("gaussian")
@pytest.mark.parametrize(
    "name", ["gaussian", "ising", "potts", pytest.param("sphere", marks=pytest.mark.slow)]
)
def test_explicit_steps_are_exported_and_mapped_over_samples(name, fields):
    layer = DEQFixedPoint(make(name, 0.4), steps=3)
    expected = layer(fields)
    exported = torch.export.export(layer, (fields,)).module()
    torch.testing.assert_close(exported(fields), expected)
    one_by_one = torch.func.vmap(lambda x: layer(x[None])[0])(fields)
    torch.testing.assert_close(one_by_one, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gaussian", "ising", *(pytest.param(n, marks=pytest.mark.slow) for n in ITERATED[1:])]
)
def test_explicit_steps_compile_as_one_graph(name, fields):
    torch._dynamo.reset()
    module = make(name, 0.4)
    layer = DEQFixedPoint(module, steps=2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = compiled(fields), layer(fields)
    torch.testing.assert_close(found, expected)
    weights = list(module.parameters())
    by_weights = grad(found.square().sum(), weights)
    torch.testing.assert_close(by_weights, grad(expected.square().sum(), weights))


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("name", PRIORS)
def test_empty_batches(name, steps, fields):
    layer = DEQFixedPoint(make(name), steps=steps)
    x = fields[:0].requires_grad_()
    z = layer(x)
    z.sum().backward()
    assert z.shape == (0, SITES, DIM)


@pytest.mark.parametrize("name", ITERATED)
def test_naive_mean_field_without_the_response(name, fields):
    module = make(name, 0.4, lin_response=False)
    z, cavity = DEQFixedPoint(module, picard, output_elements=(0, 1), solver_fwd_tol=1e-12,
                              solver_fwd_max_iter=200)(fields)  # fmt: skip
    system, x = behind(module, fields)
    expected = NaiveMeanField(tol=1e-13)(system, x).magnetization.view_as(z)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-10)
    assert not bool(cavity.any())


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize(("name", "size"), [("ising", 30), ("potts", 60), ("sphere", 1e20)])
def test_saturated_spins_have_no_derivative_and_spoil_none(name, size, steps, fields):
    module, fields = make(name, 0.1).float(), fields.float()
    layer = DEQFixedPoint(module, steps=steps)
    fields[1] = size * torch.tensor([1.0, 0.0, -1.0] if name == "potts" else [1.0, 1.0, 1.0])
    x = fields.requires_grad_()
    found = grad(layer(x).square().sum(), (x, module._weight))
    others = x.detach()[[0, 2]].requires_grad_()
    expected = grad(layer(others).square().sum(), (others, module._weight))
    torch.testing.assert_close(found[0][[0, 2]], expected[0])
    assert found[0][1].abs().max() < 1e-10
    free = grad(module.free_energy(x)[[0, 2]].sum(), module._weight)[0]
    torch.testing.assert_close(free, grad(module.free_energy(others).sum(), module._weight)[0])
    if name == "sphere":  # its direction stays free, and couplings turn it
        assert bool(found[1].isfinite().all())
    else:
        torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-4)


@pytest.mark.quick("gaussian", "potts")
@pytest.mark.parametrize(
    "name", ["gaussian", "ising", "potts", pytest.param("sphere", marks=pytest.mark.slow)]
)
def test_gradients_of_every_order(name, fields):
    module = make(name, 0.4)
    layer = DEQFixedPoint(
        module,
        solver_fwd_tol=1e-13, solver_fwd_max_iter=300,
        solver_bwd_tol=1e-13, solver_bwd_max_iter=300,
    )  # fmt: skip
    parameters = [p for p in module.parameters() if p.requires_grad]
    torch.manual_seed(2)
    direction = torch.randn(fields.shape, dtype=torch.float64)

    def loss(scale, shift):
        moved = {
            key: value + scale * torch.linspace(-1, 1, value.numel()).to(value).view_as(value)
            for key, value in module.named_parameters()
        }
        moved = {f"fun.{key}": value for key, value in moved.items()}
        z = torch.func.functional_call(layer, moved, (fields[:2] + shift * direction[:2],))
        return (z * direction[:2]).sum()

    assert parameters
    ends = [torch.tensor(0.01, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(loss, ends)
    assert gradgradcheck(loss, ends)


@pytest.mark.quick("gaussian", "ising", "potts")
@pytest.mark.parametrize("name", PRIORS)
def test_free_energy_and_its_derivatives(name, fields):
    module = make(name, 0.3)
    fields.requires_grad_()
    method = AdaptiveTAP(tol=1e-13)
    chosen = None if name == "gaussian" else method
    energy = module.free_energy(fields, chosen)
    system, x = behind(module, fields)
    torch.testing.assert_close(energy, -method(system, x).log_partition)
    by_field, by_weight = grad(energy.sum(), (fields, module._weight))
    z = DEQFixedPoint(module, solver_fwd_tol=1e-12, solver_fwd_max_iter=200)(fields)
    torch.testing.assert_close(by_field, -z, rtol=0, atol=1e-8)
    step = torch.randn_like(module._weight)
    ends = []
    for h in (1e-5, -1e-5):
        moved = copy.deepcopy(module)
        moved._weight.data += h * step
        ends.append(moved.free_energy(fields, chosen).sum())
    torch.testing.assert_close((by_weight * step).sum(), (ends[0] - ends[1]) / 2e-5)


def test_free_energy_of_the_default_prior_is_exact(fields):
    torch.manual_seed(0)
    module = DEQAdaTAPMeanFieldAttention(SITES, DIM).double()
    prior = GaussianPrior(torch.zeros(DIM).double(), torch.eye(DIM).double())
    expected = -Exact()(SpinSystem(module.weight(), prior), fields).log_partition
    torch.testing.assert_close(module.free_energy(fields), expected)
    # A prior that differs from site to site: log Z is additive where there are no couplings.
    module.spin_prior_inv_var[0] *= 4.0
    with torch.no_grad():
        module._weight.zero_()
    precision = torch.tensor([4.0, 1, 1, 1], dtype=torch.float64)[:, None]
    expected = -0.5 * (fields.square() / precision).sum(dim=(1, 2))
    torch.testing.assert_close(module.free_energy(fields), expected)


def test_another_method_may_give_the_free_energy(fields):
    module = make("ising", 1.0)
    system, x = behind(module, fields)
    method = ExpectationPropagation(schedule="double loop")
    torch.testing.assert_close(module.free_energy(fields, method), -method(system, x).log_partition)


class TestFrozen:
    @pytest.mark.quick("gaussian", "ising", "potts", "None")
    @pytest.mark.parametrize("name", [*PRIORS, None])
    def test_the_answers_are_the_same(self, name, fields):
        module = make(name, 0.3) if name else DEQAdaTAPMeanFieldAttention(SITES, DIM).double()
        layer = DEQFixedPoint(
            module, output_elements=(0, 1), solver_fwd_tol=1e-12, solver_fwd_max_iter=200
        )
        fields.requires_grad_()
        plain = layer(fields)
        method = AdaptiveTAP(tol=1e-13) if name in ITERATED else None
        energy = module.free_energy(fields, method)
        with module.frozen() as same:
            assert same is module
            frozen = layer(fields)
            frozen_energy = module.free_energy(fields, method)
        for mine, theirs in zip((*frozen, frozen_energy), (*plain, energy), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        loss, other = frozen[0].square().sum(), plain[0].square().sum()
        torch.testing.assert_close(
            grad(loss, fields, retain_graph=True)[0], grad(other, fields)[0], rtol=1e-3, atol=1e-3
        )
        assert grad(frozen[0].sum(), module._weight, allow_unused=True)[0] is None

    def test_without_symmetries(self, fields):
        torch.manual_seed(0)
        module = DEQAdaTAPMeanFieldAttention(SITES, DIM, 0.2, True, False, False).double()
        layer = DEQFixedPoint(module, output_elements=(0, 1))
        expected = layer(fields)
        with module.frozen():
            for mine, theirs in zip(layer(fields), expected, strict=True):
                torch.testing.assert_close(mine, theirs)

    @pytest.mark.parametrize("name", ["gaussian", "ising"])
    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m._weight.data.mul_(1.001),
            lambda m: m.load_state_dict({k: 0.5 * v for k, v in m.state_dict().items()}),
            lambda m: setattr(m._weight, "data", 1.5 * m._weight.data),
            lambda m: m.float(),
            lambda m: torch.optim.SGD([m._weight], 0.1).step(),
        ],
        ids=["data", "load", "replace", "dtype", "optimizer"],
    )
    def test_changing_a_weight_raises(self, name, change, fields):
        module = make(name, 0.3)
        layer = DEQFixedPoint(module, solver_fwd_max_iter=100)
        module._weight.grad = torch.ones_like(module._weight)
        with module.frozen():
            layer(fields)
            change(module)
            with pytest.raises(RuntimeError, match=r"weights changed inside `frozen\(\)`"):
                layer(fields.to(module._weight.dtype))
        layer(fields.to(module._weight.dtype))

    def test_changing_the_prior_raises(self, fields):
        module = make("gaussian", 0.3)
        with module.frozen(), torch.no_grad():
            module.prior.location += 1
            with pytest.raises(RuntimeError, match="weights changed"):
                module.prepare(fields)

    def test_it_may_be_nested_and_left_by_an_error(self, fields):
        module = make("gaussian", 0.3)
        with module.frozen():
            with pytest.raises(ZeroDivisionError), module.frozen():
                raise ZeroDivisionError
            assert module._frozen is not None
        assert module._frozen is None

    def test_repeated_calls_factor_once(self, fields, monkeypatch):
        module = make("gaussian", 0.3)
        layer = DEQFixedPoint(module)
        calls = []
        for name in ("cholesky_ex", "lu_factor_ex", "eigvalsh", "slogdet"):
            own = getattr(torch.linalg, name)
            monkeypatch.setattr(
                torch.linalg, name, lambda *a, own=own, **k: calls.append(len(a[0])) or own(*a, **k)
            )
        with module.frozen():
            assert calls.count(SITES * DIM) == 1
            for _ in range(3):
                layer(fields)
        assert calls.count(SITES * DIM) == 1


@pytest.mark.slow
class TestSpeed:
    """N · d = 1024, batch 4, one thread, medians of runs in turn."""

    @staticmethod
    def turns(functions, rounds=9):
        times = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                function()
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
        return {name: sorted(values)[rounds // 2] for name, values in times.items()}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_bars(self, dtype):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            prior = GaussianPrior(torch.zeros(16), torch.eye(16))
            module = DEQAdaTAPMeanFieldAttention(64, 16, prior=prior).to(dtype)
            layer = DEQFixedPoint(module)
            x = (torch.randn(4, 64, 16, dtype=dtype) / 4).requires_grad_()
            operator = module.prepare(x).operator.detach().requires_grad_()
            b = torch.randn(1024, 4, dtype=dtype, requires_grad=True)
            once = self.turns(
                {
                    "layer": lambda: layer(x).sum().backward(),
                    "solve": lambda: torch.linalg.solve(operator, b).sum().backward(),
                }
            )
            assert once["layer"] < 3 * once["solve"]
            with module.frozen():
                frozen = self.turns({"layer": lambda: layer(x).sum().backward()})
            assert frozen["layer"] < once["layer"] / 10
        finally:
            torch.set_num_threads(threads)


class TestRefusals:
    def test_priors(self):
        with pytest.raises(TypeError, match=r"GaussianPrior, IsingPrior.*got str"):
            DEQAdaTAPMeanFieldAttention(SITES, DIM, prior="ising")

        class Other(Prior):
            event_shape = torch.Size()

        with pytest.raises(TypeError, match="got Other"):
            DEQAdaTAPMeanFieldAttention(SITES, DIM, prior=Other())
        with pytest.raises(ValueError, match="3 components like the spins, PottsPrior has 5"):
            DEQAdaTAPMeanFieldAttention(SITES, DIM, prior=PottsPrior(5))

    @pytest.mark.parametrize("name", ITERATED)
    def test_symmetries(self, name):
        with pytest.raises(ValueError, match="needs weight_sym_internal and weight_sym_sites"):
            make(name, None, weight_sym_sites=False)

    def test_free_energy_without_a_distribution(self, fields):
        module = make("gaussian", None, weight_sym_internal=False)
        with pytest.raises(TypeError, match="no Boltzmann distribution"):
            module.free_energy(fields)
        strong = make("gaussian", 2.0)
        with pytest.raises(ValueError, match=r"positive definite.*smallest eigenvalue.* is -"):
            strong.free_energy(fields)

    def test_a_solve_that_fails_is_heard(self, fields):
        layer = DEQFixedPoint(make("ising", 3.0), anderson, solver_fwd_max_iter=5)
        with pytest.warns(ConvergenceWarning, match="3 of 3 samples"):
            layer(fields)

    def test_fields(self):
        module = make("potts")
        with pytest.raises(ValueError, match="x must have shape"):
            module.free_energy(torch.zeros(2, SITES, 5, dtype=torch.float64))
