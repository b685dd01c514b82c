"""What a machine refuses: data, masks, weights and parameters that are none."""

from __future__ import annotations

import numpy as np
import pytest

from deep_implicit_attention.boltzmann import BoltzmannMachine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X: X * 2, r"X\[0, 0\] is"),
        (lambda X: X * (np.arange(6) > 2), r"X\[0, 0\] is"),
        (lambda X: np.where(np.arange(6) == 2, np.inf, X), "inf"),
        (lambda X: X[0], "1D array"),
        (lambda X: X[:0], "0 sample"),
    ],
)
def test_data_that_are_no_spins(change, message: str, X: np.ndarray) -> None:
    with pytest.raises(ValueError, match=message):
        BoltzmannMachine().fit(change(X))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "tapp"}, ValueError),
        ({"num_hidden": -1}, ValueError),
        ({"num_hidden": 1.5}, TypeError),
        ({"l2": -0.1}, ValueError),
        ({"pseudocount": float("nan")}, ValueError),
        ({"shrinkage": 1.5}, ValueError),
        ({"max_iter": 0}, ValueError),
        ({"num_updates": 0}, ValueError),
        ({"num_chains": "many"}, TypeError),
        ({"batch_size": 0}, ValueError),
        ({"method": "pseudolikelihood", "num_hidden": 2}, ValueError),
        ({"method": "independent", "num_hidden": 2}, ValueError),
    ],
)
def test_parameters_out_of_range(options, error: type, X: np.ndarray) -> None:
    with pytest.raises(error, match=list(options)[-1]):
        BoltzmannMachine(**options).fit(X)


def test_weights_that_are_none(X: np.ndarray) -> None:
    mixed = np.r_[np.ones(499), -1.0]
    infinite = np.r_[np.ones(499), np.inf]
    overflowing = np.full(500, 1e307)
    nothing = np.zeros(500), np.full(500, np.nan)
    for bad in (np.ones(3), -np.ones(500), mixed, infinite, overflowing, *nothing):
        with pytest.raises(ValueError, match="sample_weight"):
            BoltzmannMachine().fit(X, sample_weight=bad)


def test_masks_that_do_not_fit(X: np.ndarray) -> None:
    machine = BoltzmannMachine().fit(X)
    with pytest.raises(ValueError, match=r"observed must have shape \(500, 6\) or \(6,\)"):
        machine.complete(X, np.ones((6, 500), dtype=bool))
    with pytest.raises(TypeError, match="observed must be boolean"):
        machine.complete(X, np.ones(6))
    X[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"X\[3, 1\] is nan"):
        machine.complete(X, np.ones(6, dtype=bool))


def test_other_data_than_were_learned(X: np.ndarray) -> None:
    machine = BoltzmannMachine().fit(X)
    with pytest.raises(ValueError, match=r"X holds \{0, 1\}"):
        machine.score((X + 1) / 2)
    with pytest.raises(ValueError, match="boolean"):
        machine.score(X > 0)
    with pytest.raises(ValueError, match="features"):
        machine.score(X[:, :5])


def test_what_has_to_be_fitted_as_a_whole(X: np.ndarray) -> None:
    with pytest.raises(ValueError, match="need all rows"):
        BoltzmannMachine("pseudolikelihood").partial_fit(X)
    with pytest.raises(ValueError, match="need all rows"):
        BoltzmannMachine("pcd", num_hidden=2).partial_fit(X)
    X[0, 0] = np.nan
    with pytest.raises(ValueError, match="missing entries"):
        BoltzmannMachine().partial_fit(X)


def test_too_many_spins_to_enumerate() -> None:
    X = np.where(np.random.default_rng(0).normal(size=(60, 21)) > 0, 1, -1)
    with pytest.raises(ValueError, match="up to 20 spins"):
        BoltzmannMachine("exact").fit(X)
