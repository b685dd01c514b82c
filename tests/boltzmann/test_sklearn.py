"""scikit-learn's own checks, and its tools around a machine.

Most checks make normal numbers. They run twice: on a machine that binarises its input first, where
all must pass, and on the machine itself, where those that fail must do so with its message.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Binarizer
from sklearn.utils.estimator_checks import check_estimator

from deep_implicit_attention.boltzmann import BoltzmannMachine


class OnNumbers(BoltzmannMachine):
    """A machine of the signs of its input, which takes the data of the checks."""

    def _spins(self, array, coding, boolean):
        missing = np.isnan(array.astype(float))
        signs = np.where(array > 0.1, 1.0, -1.0)
        return super()._spins(np.where(missing, np.nan, signs), coding, boolean)


def outcomes(machine: BoltzmannMachine) -> dict[str, Exception]:
    """The checks that fail."""
    results = check_estimator(machine, on_fail=None, on_skip=None)
    assert sum(result["status"] == "passed" for result in results) > 10
    return {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}


@pytest.mark.filterwarnings("ignore")
def test_all_checks_pass_on_signs() -> None:
    assert outcomes(OnNumbers(pseudocount=1.0)) == {}


@pytest.mark.filterwarnings("ignore")
def test_checks_fail_for_their_data_only() -> None:
    for name, error in outcomes(BoltzmannMachine(pseudocount=1.0)).items():
        text = f"{error!r} {error.__cause__!r} {error.__context__!r}"
        assert "X must hold spins" in text or "X holds {" in text, name


def test_clone_pickle_and_parameters(X: np.ndarray) -> None:
    machine = BoltzmannMachine("tap", l2=0.3)
    copy = clone(machine)
    assert copy.get_params() == machine.get_params()
    copy.set_params(method="exact", num_hidden=1)
    assert copy.num_hidden == 1
    machine.fit(X)
    again = pickle.loads(pickle.dumps(machine))
    assert (again.sample(5) == machine.sample(5)).all()
    assert machine.n_features_in_ == 6


def test_before_the_fit(X: np.ndarray) -> None:
    for call in ("score_samples", "score", "complete"):
        with pytest.raises(NotFittedError):
            getattr(BoltzmannMachine(), call)(X)
    for call in ("sample", "log_partition", "binary_parameters"):
        with pytest.raises(NotFittedError):
            getattr(BoltzmannMachine(), call)()


def test_a_grid_over_methods_and_penalties(X: np.ndarray) -> None:
    grid = {"method": ["independent", "naive", "adaptive_tap", "exact"], "l2": [1e-3, 0.1]}
    search = GridSearchCV(BoltzmannMachine(), grid, cv=3).fit(X)
    assert search.best_params_["method"] in ("adaptive_tap", "exact")
    by_hand = BoltzmannMachine(**search.best_params_).fit(X)
    assert (search.best_estimator_.couplings_ == by_hand.couplings_).all()


def test_the_end_of_a_pipeline(X: np.ndarray) -> None:
    numbers = X + 0.1 * np.random.default_rng(0).normal(size=X.shape)
    pipeline = make_pipeline(PCA(whiten=False), Binarizer(), BoltzmannMachine("exact")).fit(numbers)
    assert np.isfinite(pipeline.score(numbers))
    plain = make_pipeline(Binarizer(), BoltzmannMachine("exact")).fit(numbers)
    assert plain.score(numbers) == BoltzmannMachine("exact").fit(X).score(X)
    assert plain[-1].coding_ == "binary"
