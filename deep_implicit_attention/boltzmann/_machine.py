"""`BoltzmannMachine`: a model of ±1 data with scikit-learn's habits."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ..solvers._validate import check_count
from ._clamped import filled
from ._data import (
    Coding,
    Completion,
    Data,
    holds_booleans,
    read_observed,
    read_spins,
    read_weights,
    write_spins,
)
from ._fit import fit_columns
from ._learn import RESPONSES
from ._likelihood import LogPartition, log_partition, log_weights
from ._moments import Sums
from ._parameters import pack, unpack
from ._sampling import draw
from ._settings import Method, Settings
from ._warnings import EstimateWarning, warn

# What scikit-learn notes of the columns.
_COLUMNS = ("n_features_in_", "feature_names_in_")


class _Read(NamedTuple):
    """Rows that were read: spins, their coding, the mask given, what is noted of the columns."""

    data: Data
    coding: Coding | None
    mask: np.ndarray | None
    columns: dict[str, Any]


class BoltzmannMachine(DensityMixin, BaseEstimator):
    """The distribution of N spins S_i = ±1 learned from rows of data (inverse Ising problem),

        P(S) = exp( ½ Σ_ij S_i J_ij S_j + Σ_i h_i S_i ) / Z,   J_ij = J_ji,   J_ii = 0

    Entries of X are −1 and 1; or 0 and 1, or boolean, which are mapped to −1 and 1 (`coding_` says
    which it was, and `sample` and `complete` answer in it; J and h are always those of ±1). nan is
    a missing entry: rounds of expectation and maximisation replace it by the clamped response (the
    linear one in naive, tap and adaptive_tap) until it settles; pseudolikelihood and pcd draw it by
    clamped Gibbs chains.

    Methods (M rows):

    - ``"exact"``: maximum likelihood over all 2^N states, N ≤ 20 (hidden units counted).
    - ``"independent"``: J = 0.
    - ``"naive"``: naive mean field and linear response (Kappen, Rodríguez 1998). O(N³).
    - ``"tap"``: TAP and linear response (Tanaka 1998; Kappen, Rodríguez 1998). O(N³).
    - ``"adaptive_tap"``: adaptive TAP, which is naive mean field with diagonal weights
      (Kappen, Rodríguez 1998; Opper, Winther 2001). O(N³).
    - ``"pseudolikelihood"``: joint maximum pseudolikelihood (Besag 1975). O(M N²) a step.
    - ``"pcd"``: persistent contrastive divergence (Tieleman 2008), Gibbs chains.

    From complete rows, and without hidden units, all but pseudolikelihood need means and
    covariances only, which cost O(M N²) once.

    With `num_hidden` units, coupled to the visible spins and not to each other, every method but
    ``"independent"`` and ``"pseudolikelihood"`` ascends the likelihood, with its responses (or
    chains) in place of the averages. Hidden units are the last rows of `couplings_` and `fields_`.
    Responses can lead away from likely parameters: naive, tap and adaptive_tap return the likeliest
    on the way.

    Args:
        method: see above.
        num_hidden: hidden units.
        l2: penalty (l2/2) Σ_{i<j} J_ij² on the log-likelihood per row; naive, tap and adaptive_tap
            penalise V as well (`inverse_covariance`); pseudolikelihood counts it twice, as it does
            each coupling. Nothing for independent, which has no couplings.
        pseudocount: weight of further rows in which all states are equally frequent, in units of
            `sample_weight`. Beyond 10 columns pseudolikelihood and hidden units, which see more of
            the rows than means and covariances, get a few rows that match all states in these only:
            they have higher correlations of their own, so that what is learned depends, somewhat,
            on the order of the columns and on which state is called up.
        shrinkage: ρ of (1 − ρ) C + ρ diag C for naive, tap and adaptive_tap; None takes 0 where C
            has an inverse, and the estimate of Schäfer and Strimmer (2005) where it has not, or
            where entries are missing and pairs of spins are observed fewer than 2N times. Not used
            for hidden units, which are learned from rows.
        tol: largest difference of moments (exact) or gradient (pseudolikelihood) that may be left;
            without hidden units.
        max_iter: Newton steps of these two, and rounds of filling in missing entries; without
            hidden units.
        num_updates: steps of gradient ascent (pcd and hidden units).
        learning_rate: of these.
        num_chains: of pcd.
        batch_size: rows in a step of gradient ascent with hidden units or, for pcd, missing
            entries, drawn in proportion to their weights; None for all.
        random_state: seed of all randomness; equal ones give equal results, bit for bit.
        device: where torch computes, in float64.

    Attributes:
        couplings_: J, `(N, N)`, of visible then hidden spins.
        fields_: h, `(N,)`.
        coding_: ``"spins"`` (±1), ``"binary"`` (0, 1) or ``"boolean"``; None while all are 1.
        constant_columns_: columns that never change, `(n_features,)`.
        shrinkage_: ρ that was used.
        n_iter_: steps or rounds; 1 for a formula.
        residual_: largest remaining difference between the two sides of the method's equation. For
            gradient ascent it is that at the parameters returned (before the last update, if they
            are the last), noise of the chains included.
    """

    # Set by a fit.
    n_features_in_: int
    coding_: Coding | None
    _sums: Sums | None
    _base: Tensor
    _log_partition: tuple[Tensor, LogPartition] | None  # with the parameters it belongs to
    _fitted_method: Method

    def __init__(
        self,
        method: Method = "adaptive_tap",
        *,
        num_hidden: int = 0,
        l2: float = 0.0,
        pseudocount: float = 0.0,
        shrinkage: float | None = None,
        tol: float = 1e-9,
        max_iter: int = 100,
        num_updates: int = 2000,
        learning_rate: float = 0.01,
        num_chains: int = 500,
        batch_size: int | None = None,
        random_state: Any = 0,
        device: str = "cpu",
    ) -> None:
        self.method = method
        self.num_hidden = num_hidden
        self.l2 = l2
        self.pseudocount = pseudocount
        self.shrinkage = shrinkage
        self.tol = tol
        self.max_iter = max_iter
        self.num_updates = num_updates
        self.learning_rate = learning_rate
        self.num_chains = num_chains
        self.batch_size = batch_size
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> BoltzmannMachine:
        """Learn from rows `(M, N)`; a weight counts a row as often as it says. `y` is ignored.

        Raises:
            ValueError: for entries that are no spins, columns without an entry, weights that are
                negative, parameters out of range, more spins than the method can enumerate, and
                (naive, tap, adaptive_tap) gaps that would take the mean of a column to ±1.
        """
        settings = Settings.of(self, self._seed())
        read = self._read(X, None, sample_weight, reset=True)
        if read.data.observed is None and not settings.needs_rows:
            return self._learn(settings, Sums.of(read.data), None, read)
        return self._learn(settings, None, read.data, read)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> BoltzmannMachine:
        """Learn from all batches so far, those of an earlier `fit` included.

        Only their sums are kept, so data need not fit in memory.

        For methods that learn from means and covariances, complete rows and no hidden units. The
        result is that of `fit` on all rows, up to rounding.

        Raises:
            ValueError: for other methods, hidden units and missing entries, besides those of `fit`.
        """
        settings = Settings.of(self, self._seed())
        if settings.needs_rows:
            raise ValueError(
                "partial_fit keeps sums of the data, but method='pseudolikelihood' and hidden "
                "units need all rows: use fit, or another method"
            )
        before = getattr(self, "_sums", None)
        first = before is None
        if first and hasattr(self, "couplings_"):
            raise ValueError(
                "partial_fit cannot go on from a fit that needed all rows, of which no sums are "
                "kept: begin with a clone of the machine"
            )
        read = self._read(X, None if first else self.coding_, sample_weight, reset=first)
        if read.data.observed is not None:
            raise ValueError("partial_fit takes complete rows; missing entries (nan) need fit")
        sums = Sums.of(read.data) if before is None else before + Sums.of(read.data)
        return self._learn(settings, sums, None, read)

    def score_samples(self, X: Any) -> np.ndarray:
        """log P of each row in nats, `(M,)`; of what is observed of it, if entries are missing.

        Exact up to 24 spins. Beyond, log Z is an estimate (`log_partition`), the same for all rows,
        and an `EstimateWarning` says so with its standard error.
        """
        data = self._given(X)[0]
        log_weight = log_weights(self._theta(), data)
        log_z = self.log_partition()
        if not log_z.exact:
            few = (
                ", of few effective particles: log_partition(steps=..., keep=True) takes more steps"
            )
            doubt = few * (log_z.effective_size < 20)
            warn(
                f"log Z of {len(self.fields_)} spins is an estimate by {log_z.method}, standard "
                f"error {log_z.standard_error:.2g}{doubt}; log-likelihoods share its error",
                EstimateWarning,
            )
        return (log_weight - log_z.value).cpu().numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-likelihood of the rows in nats; see `score_samples`. `y` is ignored."""
        return float(self.score_samples(X).mean())

    def log_partition(
        self, *, particles: int | None = None, steps: int | None = None, keep: bool = False
    ) -> LogPartition:
        """log Z with its standard error and the method it comes from.

        Enumeration up to 24 spins; beyond, annealed importance sampling from the model of
        independent spins with `particles` (500, at least 2) and `steps` (1000). Without either it
        is the estimate that `score_samples` uses, made once for its parameters; with one of them, a
        new estimate, which scores use only with `keep`.
        """
        check_is_fitted(self)
        asked = {"particles": particles, "steps": steps}
        asked = {name: value for name, value in asked.items() if value is not None}
        for name, value in asked.items():
            # One particle has no standard error.
            check_count(name, value, minimum=2 if name == "particles" else 1)
        theta, kept = self._theta(), self._log_partition
        # Parameters may have been set by hand since.
        if kept is not None and torch.equal(kept[0], theta) and (kept[1].exact or not asked):
            return kept[1]
        options = {"particles": 500, "steps": 1000} | asked
        found = log_partition(theta, self._base, seed=self._seed(), **options)
        if keep or not asked or found.exact:
            self._log_partition = theta, found
        return found

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draws of the visible spins, `(n_samples, n_features)`, in the coding of the data.

        Independent up to 20 spins; beyond, from Markov chains with parallel tempering, and a
        `ConvergenceWarning` if those do not agree. `random_state` None takes the machine's.
        """
        check_is_fitted(self)
        check_count("n_samples", n_samples)
        states = draw(self._theta(), n_samples, self._seed(random_state))
        return write_spins(states[:, : self.n_features_in_], self._coding)

    def complete(self, X: Any, observed: Any = None) -> Completion:
        """Fill in missing spins by their conditional magnetizations given the others.

        The machine's own mean-field response to the observed spins as fields (TAP for
        pseudolikelihood and pcd, enumeration for exact) gives m_i = ⟨S_i⟩, so the probability
        (1 + m_i)/2 and the likelier value of each spin. Rows whose equations are not solved are
        reported by a `ConvergenceWarning`.

        Args:
            X: rows `(M, n_features)`; what stands in entries that are not observed has no effect.
            observed: True where a spin is known, `(M, n_features)` or `(n_features,)` for all rows
                alike; None for all entries that are not nan.
        """
        data, mask = self._given(X, observed)
        hidden = len(self.fields_) - self.n_features_in_
        spins = torch.nn.functional.pad(data.spins * mask, (0, hidden))
        known = torch.nn.functional.pad(mask, (0, hidden), value=False)
        m = filled(RESPONSES[self._fitted_method], self._theta(), Data(spins, known, None))
        m = m[:, : self.n_features_in_]
        return Completion(write_spins(m, self._coding), ((1 + m) / 2).cpu().numpy())

    def binary_parameters(self) -> tuple[np.ndarray, np.ndarray]:
        """W `(N, N)` and b `(N,)` of the same distribution over x = (1 + S)/2 in {0, 1}:

        P(x) ∝ exp( ½ Σ_ij x_i W_ij x_j + Σ_i b_i x_i ),  W = 4 J,  b_i = 2 h_i − 2 Σ_j J_ij
        """
        check_is_fitted(self)
        return 4 * self.couplings_, 2 * self.fields_ - 2 * self.couplings_.sum(axis=1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    @property
    def _coding(self) -> Coding:
        """The coding of answers: ±1 if all entries so far were 1, which says nothing."""
        return self.coding_ or "spins"

    def _theta(self) -> Tensor:
        # Copies: set by hand they may be of any type, and loaded from a file not writable.
        arrays = (np.array(array, dtype=np.float64) for array in (self.couplings_, self.fields_))
        return pack(*(torch.from_numpy(array).to(self.device) for array in arrays))

    def _seed(self, random_state: Any = None) -> int:
        chosen = self.random_state if random_state is None else random_state
        return int(check_random_state(chosen).randint(2**31 - 1))

    def _read(
        self,
        X: Any,
        coding: Coding | None,
        sample_weight: Any = None,
        *,
        observed: Any = None,
        reset: bool = False,
    ) -> _Read:
        """X as spins, its columns compared with those of the fit, or noted with `reset`.

        Nothing of the machine changes: what is noted is set when the fit has succeeded.
        """
        noted = type(self)(**self.get_params(deep=False)) if reset else self
        finite = "allow-nan" if observed is None else False  # what is not observed may be anything
        array: Any = validate_data(noted, X, reset=reset, ensure_all_finite=finite)
        mask = None
        if observed is not None:
            mask = read_observed(observed, array)
            array = np.where(mask, array, array.dtype.type(1))
        weights = read_weights(sample_weight, len(array))
        spins, known, coding = self._spins(array, coding, holds_booleans(X))
        tensors = (None if t is None else t.to(self.device) for t in (spins, known, weights))
        columns = {name: vars(noted)[name] for name in _COLUMNS if name in vars(noted)}
        return _Read(Data(*tensors), coding, mask, columns)  # type: ignore[arg-type]

    def _spins(
        self, array: np.ndarray, coding: Coding | None, boolean: bool
    ) -> tuple[Tensor, Tensor | None, Coding | None]:
        """`read_spins`; what a machine of other data would replace."""
        return read_spins(array, coding, boolean)

    def _given(self, X: Any, observed: Any = None) -> tuple[Data, Tensor]:
        """Rows for a fitted machine, and the mask of what is known of them."""
        check_is_fitted(self)
        data, _, mask, _ = self._read(X, self.coding_, observed=observed)
        if mask is not None:
            return data, torch.from_numpy(mask.copy()).to(self.device)
        everything = torch.ones_like(data.spins, dtype=torch.bool)
        return data, everything if data.observed is None else data.observed

    def _learn(
        self, settings: Settings, sums: Sums | None, data: Data | None, read: _Read
    ) -> BoltzmannMachine:
        names = read.columns.get("feature_names_in_", range(read.columns["n_features_in_"]))
        fitted = fit_columns(settings, sums, data, [str(name) for name in names])
        for name in _COLUMNS:
            vars(self).pop(name, None)
        vars(self).update(read.columns)
        self.coding_, self._fitted_method = read.coding, settings.method
        couplings, fields = unpack(fitted.learned.theta)
        self.couplings_ = couplings.cpu().numpy().copy()
        self.fields_ = fields.cpu().numpy().copy()
        self.constant_columns_ = fitted.constant.cpu().numpy()
        self.shrinkage_ = fitted.learned.shrinkage
        self.n_iter_ = fitted.learned.steps
        self.residual_ = fitted.learned.residual
        self._sums, self._base, self._log_partition = sums, fitted.base, None
        return self
