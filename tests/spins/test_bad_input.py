"""What systems and methods refuse at the door, and what they say."""

from __future__ import annotations

import copy

import pytest
import torch

from deep_implicit_attention.deq import ConvergenceError, ConvergenceWarning
from deep_implicit_attention.solvers import Status
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    BlockGibbs,
    Exact,
    ExpectationPropagation,
    GaussianPrior,
    GibbsSampler,
    IsingPrior,
    NaiveMeanField,
    PottsPrior,
    SelfAveragingTAP,
    SphericalPrior,
    SpinSystem,
    ferromagnet,
    sherrington_kirkpatrick,
)
from deep_implicit_attention.spins._prior import Prior

METHODS = [
    NaiveMeanField(),
    TAP(),
    AdaptiveTAP(),
    SelfAveragingTAP(),
    ExpectationPropagation(),
    Exact(),
    GibbsSampler(num_samples=20, burn_in=8, on_failure="ignore"),
]


def full(sites: int = 4) -> torch.Tensor:
    """Couplings `(N, N, 2, 2)` that are as they should be."""
    block = torch.tensor([[0.1, 0.2], [-0.1, 0.0]], dtype=torch.float64)
    upper = torch.ones(sites, sites, dtype=torch.float64).triu(1)[:, :, None, None] * block
    return upper + upper.permute(1, 0, 3, 2)


def changed(couplings: torch.Tensor, *index: int) -> torch.Tensor:
    couplings = couplings.clone()
    couplings[index] += 0.5
    return couplings


class TestSystems:
    def test_asymmetric_couplings(self):
        message = r"symmetric, J_ij = J_jiᵀ: J\[{}\] differs from its partner by 0.5"
        with pytest.raises(ValueError, match=message.format(r"(1, 3|3, 1)")):
            SpinSystem(changed(sherrington_kirkpatrick(5)[0], 3, 1), IsingPrior())
        with pytest.raises(ValueError, match=message.format(r"(0, 2, 1, 0|2, 0, 0, 1)")):
            SpinSystem(changed(full(), 2, 0, 0, 1), PottsPrior(2))
        # Blocks that are symmetric but not each other's transposes.
        block = torch.tensor([[0.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
        pair = (1 - torch.eye(2, dtype=torch.float64))[:, :, None, None] * block
        with pytest.raises(ValueError, match=message.format(r"0, 1, 0, 1")):
            SpinSystem(pair, PottsPrior(2))

    def test_sparse_couplings(self):
        with pytest.raises(TypeError, match=r"must be a dense tensor, got torch\.sparse"):
            SpinSystem(ferromagnet(3).to_sparse(), IsingPrior())

    def test_asymmetry_far_down(self):
        """Rows are looked at in portions."""
        couplings = ferromagnet(600)
        SpinSystem(couplings, IsingPrior())
        with pytest.raises(ValueError, match=r"J\[(599, 598|598, 599)\] differs.* by 0.5"):
            SpinSystem(changed(couplings, 599, 598), IsingPrior())

    def test_self_coupling(self):
        with pytest.raises(ValueError, match=r"no self-coupling.*i = 3"):
            SpinSystem(changed(sherrington_kirkpatrick(5)[0], 3, 3), IsingPrior())
        with pytest.raises(ValueError, match=r"no self-coupling.*i = 2"):
            SpinSystem(changed(full(), 2, 2, 1, 1), PottsPrior(2))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_couplings_that_are_not_finite(self, value):
        couplings = sherrington_kirkpatrick(5)[0]
        couplings[2, 4] = couplings[4, 2] = value
        with pytest.raises(ValueError, match=r"finite, J\[2, 4\] is not"):
            SpinSystem(couplings, IsingPrior())

    def test_shapes_and_dtypes(self):
        with pytest.raises(ValueError, match=r"at least one spin, got shape \(0, 0\)"):
            SpinSystem(torch.zeros(0, 0), IsingPrior())
        with pytest.raises(ValueError, match=r"shape \(N, N\), got \(4, 4, 2, 2\)"):
            SpinSystem(full(), IsingPrior())
        with pytest.raises(ValueError, match=r"\(N, N\) or \(N, N, 3, 3\), got \(4, 4, 2, 2\)"):
            SpinSystem(full(), SphericalPrior(3))
        for dtype in (torch.long, torch.half, torch.bfloat16, torch.complex64):
            with pytest.raises(TypeError, match=f"couplings must be float32 or.* got {dtype}"):
                SpinSystem(torch.zeros(3, 3, dtype=dtype), IsingPrior())

    def test_couplings_and_priors_that_are_none(self):
        couplings = ferromagnet(3)
        with pytest.raises(TypeError, match="couplings must be a tensor, got ndarray"):
            SpinSystem(couplings.numpy(), IsingPrior())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"prior.*IsingPrior\(\), got NoneType"):
            SpinSystem(couplings, None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"prior.*got the class IsingPrior"):
            SpinSystem(couplings, IsingPrior)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
class TestFields:
    system = SpinSystem(ferromagnet(5), PottsPrior(3))

    def test_shape(self, method):
        for shape in ((5,), (3, 5), (2, 4, 3)):
            with pytest.raises(ValueError, match=r"fields must have shape \(\*batch, 5, 3\), got"):
                method(self.system, torch.zeros(shape, dtype=torch.float64))

    def test_dtype(self, method):
        with pytest.raises(TypeError, match=r"fields are torch\.float32.*couplings torch\.float64"):
            method(self.system, torch.zeros(5, 3))

    def test_no_tensor(self, method):
        with pytest.raises(TypeError, match="fields must be a tensor, got ndarray"):
            method(self.system, torch.zeros(5, 3).numpy())

    def test_not_finite(self, method):
        x = torch.zeros(5, 3, dtype=torch.float64)
        x[1, 2] = torch.nan
        with pytest.raises(ValueError, match="fields must be finite"):
            method(self.system, x)


@pytest.mark.parametrize(
    "ask",
    [
        *(lambda J, x, m=m: m(J, x) for m in METHODS),
        lambda J, x: BlockGibbs(J),
    ],
)
def test_couplings_in_place_of_a_system(ask):
    with pytest.raises(TypeError, match="system must be a SpinSystem, got Tensor"):
        ask(ferromagnet(3), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "method", [NaiveMeanField(), TAP(), AdaptiveTAP(), ExpectationPropagation(), Exact()]
)
def test_gaussian_spins_without_a_distribution(method):
    """P = 1 and J = 0.5 between all of four spins: eigenvalues of P − J are 1.5 and −0.5."""
    prior = GaussianPrior(torch.zeros(1).double(), torch.eye(1, dtype=torch.float64))
    system = SpinSystem(ferromagnet(4, 2.0), prior)
    with pytest.raises(ValueError, match=r"P − J must be.*smallest eigenvalue is -0\.5$"):
        method(system, torch.zeros(4, 1, dtype=torch.float64))


def test_tap_without_a_distribution_of_single_spins():
    """P = 1, J = 0.95: the second step has C = 1/(1 − 0.95²), so P − V < 0; J = 0.3 is harmless."""
    prior = GaussianPrior(torch.zeros(1).double(), torch.eye(1, dtype=torch.float64))
    fields = torch.ones(3, 2, 1, dtype=torch.float64)
    strong = SpinSystem(0.95 * (1 - torch.eye(2, dtype=torch.float64)), prior)
    response = TAP(on_failure="ignore")(strong, fields)
    assert response.solution.status == (Status.NONFINITE,) * 3
    with pytest.warns(ConvergenceWarning, match="3 of 3 samples did not converge.*nonfinite: 3"):
        TAP()(strong, fields)
    with pytest.raises(ConvergenceError, match="nonfinite"):
        TAP(on_failure="raise")(strong, fields)


def test_tap_contains_a_spin_without_a_distribution():
    """V is too large in the second sample only, of a state given by hand."""
    prior = GaussianPrior(torch.zeros(1).double(), torch.eye(1, dtype=torch.float64))
    V = torch.tensor([0.5, 1.5], dtype=torch.float64)[:, None, None, None]
    allowed = prior.admissible(V)
    assert allowed[0].item() == 0.5
    assert bool(torch.isnan(allowed[1]).all())
    field = torch.ones(2, 1, 1, dtype=torch.float64)
    # (P − V)⁻¹ (h + Pμ) = 1 / 0.5
    torch.testing.assert_close(
        prior.mean(field, allowed).flatten(), field.new_tensor([2.0, torch.nan]), equal_nan=True
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_empty_batch(method):
    gaussian = GaussianPrior(torch.zeros(2).double(), torch.eye(2, dtype=torch.float64))
    for prior in (PottsPrior(2), gaussian):
        if isinstance(method, SelfAveragingTAP) and prior is gaussian:
            continue
        fields = torch.zeros(0, 4, 2, dtype=torch.float64)
        response = method(SpinSystem(ferromagnet(4, 0.5), prior), fields)
        assert response.magnetization.shape == (0, 4, 2)
        assert response.log_partition.shape == (0,)
        assert response.covariance.shape == (0, 4, 2, 4, 2)


@pytest.mark.parametrize("method", [NaiveMeanField(), TAP(), AdaptiveTAP(), Exact()])
def test_gaussian_prior_in_single_precision(method):
    """Σ = L Lᵀ, log L_aa and P are exact in float32: the answer is that of a prior in float64."""
    mean, covariance = torch.tensor([0.5, -0.25]), torch.tensor([[1.0, 0.5], [0.5, 1.25]])
    fields = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    narrow = GaussianPrior(mean, covariance)
    with torch.no_grad():
        narrow.below_diagonal[1, 0] = 0.5  # some processors round in an exact factorisation, too
    wide = copy.deepcopy(narrow).double()
    one, two = (method(SpinSystem(ferromagnet(4, 0.2), prior), fields) for prior in (narrow, wide))
    for name in ("magnetization", "log_partition", "energy", "covariance"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=1e-14)


def test_more_states_than_can_be_enumerated():
    x = torch.zeros(13, 3, dtype=torch.float64)
    system = SpinSystem(ferromagnet(13), PottsPrior(3))
    with pytest.raises(ValueError, match=r"1.59e\+06 states are more than max_states = 1000"):
        Exact(max_states=1000)(system, x)


class Unknown(Prior):
    event_shape = torch.Size((2,))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (AdaptiveTAP(), "AdaptiveTAP has no equations for Unknown"),
        (SelfAveragingTAP(), "SelfAveragingTAP has no equations for Unknown"),
        (ExpectationPropagation(), "ExpectationPropagation has no equations for Unknown"),
        (Exact(), "Exact has no answer for Unknown"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_priors_without_equations(method, message):
    scalar = ferromagnet(3)
    blocks = scalar[:, :, None, None] * torch.eye(2, dtype=torch.float64)
    for couplings in (scalar, blocks):
        with pytest.raises(TypeError, match=message):
            method(SpinSystem(couplings, Unknown()), torch.zeros(3, 2, dtype=torch.float64))


def test_tap_on_the_sphere():
    system = SpinSystem(ferromagnet(3), SphericalPrior(3))
    with pytest.raises(TypeError, match="TAP has no closed form on the sphere"):
        TAP()(system, torch.zeros(3, 3, dtype=torch.float64))


def test_options():
    with pytest.raises(TypeError, match="solver must be callable, got str"):
        AdaptiveTAP(solver="anderson")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unknown option 'window'"):
        NaiveMeanField(window=3)


@pytest.mark.parametrize(
    "prior",
    [PottsPrior(2), SphericalPrior(2), GaussianPrior(torch.zeros(2), torch.eye(2))],
    ids=lambda prior: type(prior).__name__,
)
def test_fields_that_no_mean_fits(prior):
    """Results are in the dtype of the field: as integers means on the sphere were zeros."""
    for ask in (prior.mean, prior.covariance, prior.log_partition, prior.sample):
        with pytest.raises(TypeError, match="field must be of a floating-point dtype, got"):
            ask(torch.tensor([1, 0]))
        with pytest.raises(TypeError, match="field must be a tensor, got ndarray"):
            ask(torch.zeros(2).numpy())
