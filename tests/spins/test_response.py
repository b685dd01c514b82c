"""What a response computes when it is asked for: when, with which graph, and from what."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from deep_implicit_attention.deq import ConvergenceWarning
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    Exact,
    ExpectationPropagation,
    GaussianPrior,
    GibbsSampler,
    IsingPrior,
    NaiveMeanField,
    PottsPrior,
    Response,
    SelfAveragingTAP,
    SpinSystem,
    _exact,
    ferromagnet,
    sherrington_kirkpatrick,
)

METHODS = [NaiveMeanField, TAP, AdaptiveTAP, SelfAveragingTAP, ExpectationPropagation, Exact]
NAMES = ["covariance", "susceptibility"]
# Those that read couplings and fields when they are asked for.
LAZY = [(kind, name) for kind in METHODS for name in NAMES]
LAZY = [part for part in LAZY if part[1] == "susceptibility" or part[0] in (NaiveMeanField, TAP)]
LAZY += [(SelfAveragingTAP, "covariance"), (Exact, "covariance")]

each_method = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
each_name = pytest.mark.parametrize("name", NAMES)


def tensors() -> tuple[Tensor, Tensor]:
    couplings = sherrington_kirkpatrick(4, 0.5)[0]
    return couplings, torch.linspace(-0.5, 0.8, 4, dtype=torch.float64)


def attached(kind) -> tuple[Response, Tensor, Tensor]:
    couplings, x = (tensor.requires_grad_() for tensor in tensors())
    return kind()(SpinSystem(couplings, IsingPrior()), x), couplings, x


@pytest.mark.quick("*-covariance", "NaiveMeanField-*", "TAP-*", "AdaptiveTAP-*")
@each_name
@each_method
def test_a_look_without_gradients_leaves_gradients_as_they_are(kind, name):
    response, couplings, x = attached(kind)
    with torch.no_grad():
        look = getattr(response, name)
    assert not look.requires_grad
    value = getattr(response, name)
    torch.testing.assert_close(look, value)
    looked_at = grad(response.log_partition + value[0, 1], (couplings, x))
    response, couplings, x = attached(kind)
    value = getattr(response, name)
    untouched = grad(response.log_partition + value[0, 1], (couplings, x))
    torch.testing.assert_close(looked_at, untouched)


@each_name
@each_method
def test_what_is_computed_is_kept(kind, name):
    response, _, _ = attached(kind)
    value = getattr(response, name)
    torch.testing.assert_close(getattr(response, name), value, rtol=0, atol=0)
    with torch.no_grad():
        assert not getattr(response, name).requires_grad
    assert getattr(response, name).requires_grad


@each_method
def test_a_response_made_without_gradients_has_none(kind):
    """m would have none either, so a part of them would be wrong."""
    couplings, x = (tensor.requires_grad_() for tensor in tensors())
    with torch.no_grad():
        response = kind()(SpinSystem(couplings, IsingPrior()), x)
    assert not any(getattr(response, name).requires_grad for name in NAMES)


@each_method
def test_no_graph_where_nothing_carries_gradients(kind):
    couplings, x = tensors()
    response = kind()(SpinSystem(couplings, IsingPrior()), x)
    for name in NAMES:
        getattr(response, name).numpy()


@pytest.mark.parametrize(("kind", "name"), LAZY)
@pytest.mark.parametrize("which", ["couplings", "fields"])
def test_inputs_changed_in_place_are_refused(which, kind, name):
    couplings, x = tensors()
    response = kind()(SpinSystem(couplings, IsingPrior()), x)
    (couplings if which == "couplings" else x).mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place after the response"):
        getattr(response, name)


@each_method
def test_what_was_asked_before_the_change_stays(kind):
    couplings, x = tensors()
    response = kind()(SpinSystem(couplings, IsingPrior()), x)
    before = [getattr(response, name).clone() for name in NAMES]
    x.add_(1.0)
    for name, value in zip(NAMES, before, strict=True):
        torch.testing.assert_close(getattr(response, name), value, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
@each_method
def test_responses_can_be_pickled_and_copied(kind, copied):
    couplings, x = tensors()
    response = copied(kind()(SpinSystem(couplings, IsingPrior()), x))
    couplings.mul_(0.0)  # which the copy does not read
    couplings, x = tensors()
    again = kind()(SpinSystem(couplings, IsingPrior()), x)
    for name in ("magnetization", "log_partition", "energy", *NAMES):
        torch.testing.assert_close(getattr(response, name), getattr(again, name), rtol=0, atol=0)


@pytest.mark.parametrize("without_graph", [False, True])
def test_a_response_with_a_graph_can_be_pickled(without_graph):
    response = attached(TAP)[0]
    with torch.set_grad_enabled(not without_graph):
        loaded = pickle.loads(pickle.dumps(response))
    for name in NAMES:
        value = getattr(loaded, name).detach()
        torch.testing.assert_close(value, getattr(response, name).detach())


def test_known_covariances_can_be_pickled():
    prior = GaussianPrior(torch.zeros(2).double(), torch.eye(2).double())
    system = SpinSystem(tensors()[0] / 4, prior)
    x = torch.ones(4, 2, dtype=torch.float64)
    sampler = GibbsSampler(num_samples=4, burn_in=0, on_failure="ignore")
    for method in (Exact(), AdaptiveTAP(), sampler):
        response = method(system, x)
        loaded = pickle.loads(pickle.dumps(response))
        for name in NAMES:
            value = getattr(response, name).detach()
            torch.testing.assert_close(getattr(loaded, name).detach(), value, rtol=0, atol=0)


@pytest.mark.quick("True-ising-*", "True-potts-NaiveMeanField")
@each_method
@pytest.mark.parametrize("prior", [IsingPrior(), PottsPrior(3)], ids=["ising", "potts"])
@pytest.mark.parametrize("made_inside", [False, True])
def test_all_of_it_works_in_inference_mode(made_inside, prior, kind):
    def inputs() -> tuple[Tensor, Tensor]:
        couplings, x = tensors()
        return couplings, x if not prior.event_shape else x[:, None] * x[:3]

    couplings, x = inputs()
    expected = kind()(SpinSystem(couplings, prior), x)
    with torch.inference_mode():
        couplings, x = inputs() if made_inside else (couplings, x)
        response = kind()(SpinSystem(couplings, prior), x)
        for name in ("magnetization", "log_partition", *NAMES):
            torch.testing.assert_close(getattr(response, name), getattr(expected, name))
    for name in NAMES:  # after it, as constants in a graph
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        (weight * getattr(response, name)).sum().backward()


def test_nothing_is_checkpointed_without_gradients(monkeypatch):
    """The first checkpoint of a process takes seconds of imports."""
    monkeypatch.setattr(_exact, "checkpoint", None)
    couplings, x = tensors()
    system = SpinSystem(couplings, IsingPrior())
    response = Exact()(system, x)
    torch.testing.assert_close(response.covariance.diagonal(), 1 - response.magnetization.square())
    with torch.no_grad():
        Exact()(system, x.requires_grad_()).covariance.numpy()


@each_method
def test_derivatives_are_finite_beside_a_strong_field(kind):
    """A spin in a field of 400 is fixed: the others feel it as a field of their own."""
    couplings, x = tensors()
    x[0] = 400.0
    rest = kind()(SpinSystem(couplings[1:, 1:].clone(), IsingPrior()), x[1:] + couplings[1:, 0])
    response = kind()(SpinSystem(couplings.requires_grad_(), IsingPrior()), x.requires_grad_())
    first = grad(response.log_partition, (couplings, x), create_graph=True)
    second = torch.stack([grad(m, x, retain_graph=True)[0] for m in first[1]])
    if kind is not SelfAveragingTAP:  # there a fixed spin counts in the mean over sites
        torch.testing.assert_close(second[1:, 1:], rest.susceptibility, rtol=1e-6, atol=1e-8)
    assert max(second[0].abs().max(), second[:, 0].abs().max()) < 1e-15
    values = first[0].square(), response.covariance, response.susceptibility
    for value in (value.sum() for value in values):
        for derivative in grad(value, (couplings, x), retain_graph=True):
            assert bool(torch.isfinite(derivative).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("h", [18.0, 25.0, 40.0])
@pytest.mark.parametrize(
    "method", [NaiveMeanField, TAP, AdaptiveTAP, ExpectationPropagation], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("prior", [IsingPrior(), PottsPrior(3)], ids=["ising", "potts"])
def test_spins_that_are_almost_frozen_keep_the_digits_of_their_response(prior, method, h, dtype):
    """And are stable: there is no warning. Their interaction adds to the field and no more."""
    couplings = torch.tensor([[0.0, 0.1], [0.1, 0.0]], dtype=dtype)
    x = torch.zeros(2, *prior.event_shape, dtype=dtype)
    x.view(2, -1)[:, 0] = h
    response = method(tol=1e-5)(SpinSystem(couplings, prior), x)
    e = math.exp(-h - 0.1)
    expected = [2 * e, e] if prior.event_shape else [4 * e**2]
    for chi in (response.covariance, response.susceptibility):
        own = chi.view(2, len(x[0].view(-1)), 2, -1)[0, :, 0].diagonal()
        assert own.tolist()[: len(expected)] == pytest.approx(expected, rel=1e-3, abs=0)


def test_a_prior_of_another_precision_leaves_that_of_the_fields():
    prior = GaussianPrior(torch.zeros(2).double(), 0.7 * torch.eye(2).double())
    couplings = 0.1 * (1 - torch.eye(3))
    for method in (AdaptiveTAP(tol=1e-5), ExpectationPropagation(tol=1e-5)):
        response = method(SpinSystem(couplings, prior), torch.randn(2, 3, 2))
        assert response.magnetization.dtype == torch.float32
        assert response.cavity_variance.dtype == torch.float32


def test_an_unstable_covariance_is_said_of_converged_samples_only():
    """Without fields m = 0 is a solution at once; with weak ones three steps do not reach any."""
    system = SpinSystem(ferromagnet(8, 2.0), IsingPrior())
    x = torch.zeros(2, 8, dtype=torch.float64)
    x[1] = 1e-3
    with pytest.warns(ConvergenceWarning, match="1 of 2"):
        response = NaiveMeanField(max_iter=3)(system, x)
    assert response.solution.converged.tolist() == [True, False]
    with pytest.warns(ConvergenceWarning, match="found for 1 of 1 converged samples"):
        chi = response.covariance
    assert (torch.linalg.eigvalsh(chi)[:, 0] < -0.1).all()  # of both
