"""What a machine keeps of its fit, and what may change it: only a fit that succeeds."""

from __future__ import annotations

import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch

from deep_implicit_attention.boltzmann import (
    BoltzmannMachine,
    EstimateWarning,
    FitWarning,
    _likelihood,
)
from deep_implicit_attention.boltzmann._parameters import pack


def many(n: int, rows: int = 300) -> np.ndarray:
    return np.where(np.random.default_rng(0).normal(size=(rows, n)) > 0, 1.0, -1.0)


# --- fits that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "change"),
    [
        (6, lambda X: X * 3),
        (12, lambda X: np.where(np.arange(12) == 11, 0.5, X)),
        (12, lambda X: np.where(np.arange(12) == 11, np.nan, X)),
        (25, lambda X: X),  # read without complaint; too many for the exact method
    ],
)
def test_a_fit_that_fails_leaves_the_machine_as_it_was(width: int, change, X: np.ndarray) -> None:
    machine = BoltzmannMachine("exact").fit(X)
    before = pickle.dumps(machine)
    with pytest.raises(ValueError, match=r"X must hold|no entry in column|up to 20 spins"):
        machine.fit(change(many(width)))
    assert pickle.dumps(machine) == before
    more = machine.partial_fit(X[:100])
    whole = BoltzmannMachine("exact").fit(np.concatenate([X, X[:100]]))
    assert more.couplings_ == pytest.approx(whole.couplings_, abs=1e-6)


def test_a_batch_that_fails_leaves_the_machine_as_it_was(X: np.ndarray) -> None:
    machine = BoltzmannMachine()
    with pytest.raises(ValueError, match="X must hold spins"):
        machine.partial_fit(X * 3)
    assert not hasattr(machine, "n_features_in_")
    machine.partial_fit(X)
    before = pickle.dumps(machine)
    X[0, 0] = np.nan
    with pytest.raises(ValueError, match="complete rows"):
        machine.partial_fit(X)
    assert pickle.dumps(machine) == before


def test_names_of_columns_are_those_of_the_last_fit(X: np.ndarray) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcdef"))
    machine = BoltzmannMachine().fit(frame)
    assert list(machine.feature_names_in_) == list("abcdef")
    with pytest.raises(ValueError, match="feature names"):
        machine.score(frame[list("bacdef")])
    assert not hasattr(machine.fit(X), "feature_names_in_")


@pytest.mark.parametrize("form", [float, np.float32, np.int64, bool])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("gaps", [False, True])
def test_data_are_left_as_they_are(form: type, order: str, gaps: bool, X: np.ndarray) -> None:
    data = np.array((X + 1) / 2, dtype=form, order=order)  # type: ignore[call-overload]
    if gaps and data.dtype.kind == "f":
        data[::7, 2] = np.nan
    before = data.copy()
    machine = BoltzmannMachine().fit(data)
    machine.score(data)
    machine.complete(data)
    machine.complete(data, np.ones(6, dtype=bool) & ~np.isnan(data.astype(float)))
    assert np.array_equal(data, before, equal_nan=True)


@pytest.mark.parametrize("coding", ["spins", "binary"])
def test_data_that_must_not_be_written_to_are_read_in_silence(coding: str, X: np.ndarray) -> None:
    """torch warns of such memory, once a process unless it is told to do so always."""
    data = X if coding == "spins" else (X + 1) / 2
    expected = BoltzmannMachine().fit(data).couplings_
    data.flags.writeable = False
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            machine = BoltzmannMachine().fit(data)
    finally:
        torch.set_warn_always(before)
    assert (machine.couplings_ == expected).all()


# --- parameters that are changed after a fit ------------------------------------------------------


@pytest.mark.parametrize("change", [{"num_hidden": 2}, {"method": "bogus"}, {"method": "exact"}])
def test_answers_are_those_of_the_fit(change: dict[str, object], X: np.ndarray) -> None:
    machine = BoltzmannMachine("naive").fit(X)
    observed = np.arange(6) < 3
    before = machine.complete(X, observed).probability, machine.score_samples(X), machine.sample(5)
    machine.set_params(**change)
    assert (machine.complete(X, observed).probability == before[0]).all()
    assert (machine.score_samples(X) == before[1]).all()
    assert (machine.sample(5) == before[2]).all()


# --- log Z --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::deep_implicit_attention.boltzmann.EstimateWarning")
def test_an_estimate_of_log_z_has_the_numbers_it_was_asked_for() -> None:
    X = many(26) * np.where(np.random.default_rng(1).random((300, 1)) < 0.5, 1, -1)
    X[:, 1:9] = np.where(np.random.default_rng(2).random((300, 8)) < 0.2, -X[:, :1], X[:, :1])
    machine = BoltzmannMachine("naive", l2=0.01).fit(X)
    other = machine.log_partition(particles=20, steps=10)
    score = machine.score(X)
    assert BoltzmannMachine("naive", l2=0.01).fit(X).score(X) == score
    plain = machine.log_partition()
    assert plain == machine.log_partition(particles=500, steps=1000)
    assert plain.value != other.value
    assert machine.log_partition(particles=20, steps=10) == other
    assert machine.score(X) == score
    kept = machine.log_partition(particles=20, steps=10, keep=True)
    assert kept == machine.log_partition() == other
    assert machine.score(X) == pytest.approx(score + plain.value - other.value)
    assert machine.log_partition(particles=500, steps=1000) == plain
    with pytest.raises(ValueError, match="steps must be at least 1"):
        machine.log_partition(steps=0)
    with pytest.raises(ValueError, match="particles must be at least 2, got 1"):
        machine.log_partition(particles=1)


def test_the_error_of_log_z_is_that_of_a_mean_over_particles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight weights of 1 and 3: 2 with an error of √(8/7) / √8, half of which that of log Z is."""
    log_weights = torch.tensor([1.0, 3.0] * 4).double().log()
    monkeypatch.setattr(_likelihood, "anneal", lambda *_, **__: log_weights)
    fields = torch.zeros(25).double()
    theta = pack(torch.zeros(25, 25).double(), fields)
    found = _likelihood.log_partition(theta, fields, particles=8, steps=1, seed=0)
    assert found.value == pytest.approx(np.log(2) + 25 * np.log(2))
    assert found.standard_error == pytest.approx(7**-0.5 / 2)
    assert found.effective_size == pytest.approx(16**2 / 40)


def test_an_estimate_that_is_kept_is_not_the_one_that_is_asked_for() -> None:
    machine = BoltzmannMachine("naive", l2=1.0).fit(many(25))
    kept = machine.log_partition(particles=2, steps=2, keep=True)
    assert machine.log_partition() is kept
    asked = machine.log_partition(particles=6, steps=3)
    assert asked != kept
    assert machine.log_partition(particles=6, steps=3) == asked
    assert machine.log_partition() is kept


def test_scores_are_those_of_parameters_set_by_hand(X: np.ndarray) -> None:
    """Probabilities of all states sum to one."""
    everything = np.array(list(itertools.product((-1.0, 1.0), repeat=6)))
    machine = BoltzmannMachine("naive").fit(X)
    fitted = machine.score_samples(everything)
    machine.couplings_ *= 0.5
    machine.fields_ = machine.fields_ + 0.3
    assert np.exp(machine.score_samples(everything)).sum() == pytest.approx(1)
    machine.fields_ = machine.fields_ - 0.3
    machine.couplings_ *= 2
    assert machine.score_samples(everything) == pytest.approx(fitted)


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_parameters_set_by_hand_may_be_of_any_type(kind: type, X: np.ndarray) -> None:
    """What the type holds to the bit has the answers that it has in float64."""
    broken = np.where(np.arange(6) == 0, np.nan, X)
    machine = BoltzmannMachine("exact").fit(X)
    machine.couplings_ = 2.0 * np.eye(6, k=1) + 2.0 * np.eye(6, k=-1)
    machine.fields_ = np.ones(6)

    def answers() -> list[np.ndarray]:
        return [machine.score_samples(X), machine.sample(5), machine.complete(broken).probability]

    expected = answers()
    machine.couplings_, machine.fields_ = machine.couplings_.astype(kind), np.ones(6, kind)
    machine.couplings_.flags.writeable = False  # as arrays are that lie in a file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(np.array_equal, answers(), expected))


def test_a_row_that_cannot_be_scored_costs_no_estimate() -> None:
    X = many(30)
    machine = BoltzmannMachine(l2=0.1).fit(X)
    X[0, 1:] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", EstimateWarning)
        with pytest.raises(ValueError, match="29 spins that are missing"):
            machine.score(X)


# --- what is not observed -------------------------------------------------------------------------


@pytest.mark.quick("binary")
@pytest.mark.parametrize("coding", ["spins", "binary", "boolean"])
def test_anything_may_stand_where_nothing_is_observed(coding: str, X: np.ndarray) -> None:
    data = {"spins": X, "binary": (X + 1) / 2, "boolean": X > 0}[coding]
    machine = BoltzmannMachine().fit(data)
    observed = np.random.default_rng(0).random(X.shape) < 0.5
    expected = machine.complete(data, observed)
    for filler in (0, 7, -1, np.inf, np.nan):
        found = machine.complete(np.where(observed, data, filler), observed)
        assert (found.probability == expected.probability).all()
        assert (found.X == expected.X).all()
        assert found.X.dtype == expected.X.dtype
    wrong = np.where(observed, data, 1.0)
    wrong[tuple(np.argwhere(observed)[0])] = np.inf
    with pytest.raises(ValueError, match="is inf"):
        machine.complete(wrong, observed)


# --- booleans -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("form", ["nullable", "objects", "array"])
def test_booleans_with_missing_entries_are_booleans(form: str, gaps: bool, X: np.ndarray) -> None:
    truth = (X > 0).astype(object)
    if gaps:
        truth[np.random.default_rng(0).random(X.shape) < 0.1] = np.nan
    data = truth
    if form != "array":
        pandas = pytest.importorskip("pandas")
        data = pandas.DataFrame(truth)
        data = data.astype("boolean") if form == "nullable" else data
    machine = BoltzmannMachine().fit(data)
    assert machine.coding_ == "boolean"
    same = BoltzmannMachine().fit(np.where(truth == truth, truth * 2.0 - 1, np.nan))
    assert (machine.couplings_ == same.couplings_).all()
    assert machine.score(X > 0) == same.score(X)
    assert machine.sample(3).dtype == bool
    assert machine.complete(data).X.dtype == bool
    with pytest.raises(ValueError, match="X is boolean, but the machine was fitted on"):
        same.score(data)


def test_frames_and_objects_of_numbers_are_not_booleans(X: np.ndarray) -> None:
    assert BoltzmannMachine().fit(((X + 1) / 2).astype(object)).coding_ == "binary"
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame((X + 1) / 2).astype("Int64")
    frame.iloc[0, 0] = pandas.NA
    assert BoltzmannMachine().fit(frame).coding_ == "binary"
    mixed = pandas.DataFrame((X + 1) / 2).astype({0: bool})
    assert BoltzmannMachine().fit(mixed).coding_ == "binary"


# --- columns that never change --------------------------------------------------------------------


@pytest.mark.parametrize("gaps", [False, True])
def test_the_field_of_a_constant_column_does_not_depend_on_the_unit_of_weights(
    gaps: bool, X: np.ndarray
) -> None:
    X[:, 2] = 1
    if gaps:
        X[::9, 0] = np.nan
    with pytest.warns(FitWarning, match="never change"):
        one = BoltzmannMachine().fit(X)
    with pytest.warns(FitWarning, match="never change"):
        share = BoltzmannMachine().fit(X, sample_weight=np.full(500, 1 / 500))
    assert one.fields_[2] == pytest.approx(np.arctanh(500 / 501))
    assert share.fields_ == pytest.approx(one.fields_)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_field_of_a_constant_column_has_all_its_digits(share: float, X: np.ndarray) -> None:
    X[:, 2] = 1.0
    with pytest.warns(FitWarning, match="never change"):
        machine = BoltzmannMachine("independent").fit(X, sample_weight=np.full(500, share))
    assert machine.fields_[2] == pytest.approx(np.arctanh(500 / 501), rel=1e-12)


def test_all_constant_columns_are_named(X: np.ndarray) -> None:
    data = np.concatenate([X, np.ones((500, 8))], axis=1)
    with pytest.warns(FitWarning) as caught:
        BoltzmannMachine().fit(data)
    message = str(caught[0].message)
    assert all(f"{column} (always up)" in message for column in range(6, 14))


def test_no_hidden_units_are_allowed_and_fewer_are_not(X: np.ndarray) -> None:
    with pytest.raises(ValueError, match="num_hidden must be at least 0, got -1"):
        BoltzmannMachine(num_hidden=-1).fit(X)
