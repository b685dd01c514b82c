"""The response to clamped spins: what holds them, and what stands where the first try fails."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from deep_implicit_attention.boltzmann import _clamped, _enumeration, _learn
from deep_implicit_attention.boltzmann._clamped import (
    Means,
    clamp,
    clamped_phase,
    means,
)
from deep_implicit_attention.boltzmann._data import Data
from deep_implicit_attention.boltzmann._learn import _Response
from deep_implicit_attention.boltzmann._parameters import pack
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    Exact,
    IsingPrior,
    NaiveMeanField,
    SpinSystem,
    sherrington_kirkpatrick,
)


def test_a_clamped_spin_stays_however_many_others_pull() -> None:
    """One up among 49 of a ferromagnet that are down; every row has gaps of its own."""
    J = 1 - torch.eye(50).double()
    spins = -torch.ones(16, 50).double()
    spins[:, 30] = 1
    free = torch.zeros(16, 50, dtype=torch.bool)
    free[range(16), range(16)] = True
    ((rows, sites, response),) = clamp("naive", pack(J, torch.zeros(50).double()), spins, free)
    assert len(rows) == 16
    assert len(sites) == 50
    assert (response.m[:, 30] == 1).all()
    assert (response.m[:, 31:] == -1).all()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("exact", Exact()),
        ("naive", NaiveMeanField(tol=1e-12)),
        ("tap", TAP(tol=1e-12)),
        ("adaptive_tap", AdaptiveTAP(tol=1e-12)),
    ],
)
def test_covariances_are_those_of_the_inference_method(kind: Any, method: Any) -> None:
    """Which finds them by derivatives, or by a Cholesky factor."""
    J, x = sherrington_kirkpatrick(6, 0.5, 0.3, seed=0)
    fields = torch.stack([x, -2 * x])
    covariance = means(kind, J, fields).covariance
    assert covariance is not None
    expected = method(SpinSystem(J, IsingPrior()), fields).covariance
    torch.testing.assert_close(covariance(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("strong", [1.0, 1e3])
def test_rows_with_gaps_are_averaged_over_what_they_may_be(
    strong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all states together or by those of the gaps, also of rows that are next to impossible."""
    monkeypatch.setattr(_enumeration, "_CHUNK", 100)
    generator = torch.Generator().manual_seed(0)
    J, h = sherrington_kirkpatrick(5, strong, strong, seed=1)
    rows = torch.randint(-1, 2, (9, 4), generator=generator).double()  # 0 is a gap
    rows[0] = 1.0
    weights = torch.rand(9, generator=generator).double()
    data, theta = Data(rows, rows != 0, weights), pack(J, h)
    expected = torch.zeros(6, 6).double()
    for row, weight in zip(rows.tolist(), weights / weights.sum(), strict=True):
        choices = [(s,) if s else (-1.0, 1.0) for s in [*row, 0.0]]
        states = torch.tensor(list(product([1.0], *choices))).double()
        p = (0.5 * (states @ theta * states).sum(dim=1)).softmax(dim=0)
        expected += weight * (states.mT * p) @ states
    asked = []
    monkeypatch.setattr(_clamped, "clamp", lambda *given: asked.append(1) or clamp(*given))
    for states, apart in ((2**16, 0), (1, 1)):  # few rows for their patterns, and too many
        monkeypatch.setattr(_clamped, "_STATES", states)
        second = clamped_phase("exact", data, 5)(theta, data)
        torch.testing.assert_close(second, expected, rtol=1e-12, atol=1e-12)
        assert len(asked) == apart


@pytest.mark.parametrize("kind", ["tap", "adaptive_tap"])
def test_a_second_try_replaces_all_of_the_first(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variances of its cavity fields too, from which the covariance is made."""
    J, x = sherrington_kirkpatrick(6, 0.5, 0.3, seed=0)
    fields = torch.stack([x, -2 * x])
    expected = means(kind, J, fields)
    method, tried = _clamped._METHODS[kind], []

    def shorter(**options: Any) -> Any:
        tried.append("solver" in options)
        return method(**options if tried[-1] else options | {"max_iter": 1})

    monkeypatch.setitem(_clamped._METHODS, kind, shorter)
    found = means(kind, J, fields)
    assert tried == [False, True]
    assert found.failed == 0
    torch.testing.assert_close(found.m, expected.m, rtol=0, atol=1e-7)
    assert found.covariance is not None
    assert expected.covariance is not None
    torch.testing.assert_close(found.covariance(), expected.covariance(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("failed", [0, 1])
def test_a_free_phase_that_did_not_converge_is_none(
    failed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not its covariance is positive definite."""
    m, chi = torch.zeros(1, 3).double(), torch.eye(3)[None].double()
    monkeypatch.setattr(_learn, "means", lambda *_: Means(m, lambda: chi, failed))
    second = _Response("tap")(torch.zeros(4, 4).double())
    assert (second is None) == bool(failed)


def test_responses_are_means_of_spins() -> None:
    """Also where couplings are so strong that the steps that came nearest are not."""
    for seed in range(3):
        J, x = sherrington_kirkpatrick(8, 30.0, 0.3, seed=seed)
        response = means("tap", J, torch.stack([x, 2 * x, -3 * x]))
        assert response.m.abs().max() <= 1
