"""Settings of the recipe `ising`: the system drawn or loaded, and the methods to compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..solvers._validate import check_seed
from ..spins import (
    TAP,
    AdaptiveTAP,
    ExpectationPropagation,
    GibbsSampler,
    IsingPrior,
    NaiveMeanField,
    Response,
    SelfAveragingTAP,
    SpinSystem,
    ferromagnet,
    hopfield,
    lattice,
    sherrington_kirkpatrick,
)
from ._flags import check_threads, refuse

Method = Callable[[SpinSystem, Tensor], Response]
Ensemble = Literal["sk", "ferromagnet", "hopfield", "lattice"]

METHODS: dict[str, Callable[[Ising], Method]] = {
    "naive": lambda recipe: NaiveMeanField(**recipe.solver()),
    "tap": lambda recipe: TAP(**recipe.solver()),
    "adaptive-tap": lambda recipe: AdaptiveTAP(**recipe.solver()),
    "self-averaging-tap": lambda recipe: SelfAveragingTAP(**recipe.solver()),
    "expectation-propagation": lambda recipe: ExpectationPropagation(**recipe.solver()),
    "gibbs": lambda recipe: GibbsSampler(num_samples=recipe.samples, seed=recipe.seed),
}

# Couplings and covariances take N² numbers each, 200 MB at this size.
MAX_SPINS = 5000


@dataclass(frozen=True)
class Ising:
    """The system p(S) ~ exp(1/2 sum_ij J_ij S_i S_j + sum_i x_i S_i) of spins S_i = +1 or -1 is
    loaded, dia ising --couplings J.npy --fields x.npy, or drawn from an ensemble:

    - sk: Sherrington-Kirkpatrick, J_ij ~ N(0, beta^2/N).
    - ferromagnet: J_ij = beta/N between all spins.
    - hopfield: J_ij = beta/N times the overlap of i and j in random patterns.
    - lattice: J_ij = beta between neighbours, periodic; a chain or, with several sides, a grid.

    The table shows the mean error of the magnetizations m, that of the covariances C of different
    spins, and the error of log Z (with weight 1/2 for each value of a spin: N log 2 below the sum
    over states). Beyond 24 spins, too many to enumerate, errors are measured against a
    Gibbs sampler, whose own standard errors are shown.
    """

    couplings: Path | None = None
    """.npy file of couplings (N, N), symmetric with zero diagonal; needs --fields"""
    fields: Path | None = None
    """.npy file of fields (N,); needs --couplings"""
    ensemble: Ensemble = "sk"
    """ensemble to draw couplings from, where no files are given"""
    num_spins: tuple[int, ...] = (12,)
    """spins to draw; several numbers are the sides of a lattice, as in --num-spins 3 4"""
    patterns: int = 2
    """random patterns, for hopfield"""
    field: float = 0.3
    """standard deviation of the fields drawn, x_i ~ N(0, field^2)"""
    seed: int = 0
    """random seed; the same seed gives the same system everywhere"""
    beta: float = 1.0
    """inverse temperature: multiplies drawn couplings but not fields, and both from files"""
    betas: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """further inverse temperatures, for the figure's error against beta"""
    methods: tuple[str, ...] = tuple(name for name in METHODS if name != "gibbs")
    """naive, tap, adaptive-tap, self-averaging-tap, expectation-propagation, gibbs (a sampler)"""
    samples: int = 2000
    """draws of each of the 16 chains of the Gibbs sampler"""
    tol: float = 1e-10
    """relative residual at which a method's equations count as solved"""
    max_iter: int = 2000
    """solver steps at most, for each of the two solvers of expectation-propagation"""
    run_dir: Path = Path("runs/ising")
    """folder for metrics, answers and figure: new, empty, or an earlier run's to overwrite"""
    threads: int = 1
    """CPU threads (0 leaves it to PyTorch)"""

    def check(self) -> None:
        """Raise `ValueError` for settings out of range, or that have no part in this system."""
        if (self.couplings is None) != (self.fields is None):
            raise ValueError("--couplings and --fields are one system: give both files or neither")
        if self.ensemble not in get_args(Ensemble):
            known = ", ".join(get_args(Ensemble))
            raise ValueError(f"ensemble must be one of {known}, got {self.ensemble!r}")
        drawn = ("ensemble", "num_spins", "patterns", "field")
        if self.couplings is not None:
            refuse(self, "a system from files", *drawn)
        elif self.ensemble != "hopfield":
            refuse(self, f"ensemble {self.ensemble}", "patterns")
        sides = self.num_spins
        if not sides or min(sides) < 1 or (len(sides) > 1 and self.ensemble != "lattice"):
            raise ValueError(
                "num_spins must be one positive number (several, the sides, for a lattice), got "
                f"{' '.join(map(str, sides)) or 'none'}"
            )
        if math.prod(sides) > MAX_SPINS:
            raise ValueError(f"num_spins must be at most {MAX_SPINS}, got {math.prod(sides)}")
        if self.patterns < 1:
            raise ValueError(f"patterns must be at least 1, got {self.patterns}")
        if not 0 <= self.field < math.inf:
            raise ValueError(f"field must be at least 0 and finite, got {self.field}")
        check_seed(self.seed)
        for name, values in (("beta", (self.beta,)), ("betas", self.betas)):
            for value in values:
                if not 0 < value < math.inf:
                    raise ValueError(f"{name} must be above 0 and finite, got {value}")
        if not self.tol > 0:
            raise ValueError(f"tol must be above 0, got {self.tol}")
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
        if not self.methods:
            raise ValueError(f"methods must name at least one of {', '.join(METHODS)}")
        if set(self.methods) == {"gibbs"}:
            refuse(self, "gibbs, which is not iterated", "tol", "max_iter")
        if self.samples < 4:
            raise ValueError(f"samples must be at least 4, got {self.samples}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must differ, got {' '.join(self.methods)}")
        check_threads(self.threads)

    def solver(self) -> dict[str, Any]:
        """The options that all iterated methods share."""
        return {"tol": self.tol, "max_iter": self.max_iter}

    def build(self) -> dict[str, Method]:
        """The methods, by name."""
        return {name: METHODS[name](self) for name in self.methods}

    def draws(self) -> bool:
        """Whether anything of the system is drawn at random."""
        return self.couplings is None and (self.ensemble in ("sk", "hopfield") or self.field > 0)

    def load(self) -> tuple[Tensor, Tensor]:
        """Couplings `(N, N)` and fields `(N,)` at β = 1, float64."""
        if self.couplings is not None and self.fields is not None:
            return _load(self.couplings, self.fields)
        n = math.prod(self.num_spins)
        if self.ensemble == "sk":
            return sherrington_kirkpatrick(n, 1.0, self.field, self.seed)
        rng = np.random.default_rng(self.seed)
        if self.ensemble == "hopfield":
            couplings = hopfield(torch.from_numpy(rng.choice([-1.0, 1.0], size=(self.patterns, n))))
        elif self.ensemble == "ferromagnet":
            couplings = ferromagnet(n)
        else:
            couplings = lattice(self.num_spins)
        return couplings, torch.from_numpy(self.field * rng.normal(size=n))

    def describe(self, n: int) -> str:
        """The system in words."""
        if self.couplings is not None:
            return f"{self.couplings}, {self.fields}: {n} spins, beta {self.beta:g}"
        size = " x ".join(map(str, self.num_spins))
        return (
            f"{self.ensemble}: {size} spins, beta {self.beta:g}, fields of standard deviation "
            f"{self.field:g}, seed {self.seed}"
        )


def _load(couplings_file: Path, fields_file: Path) -> tuple[Tensor, Tensor]:
    couplings, x = _read(couplings_file), _read(fields_file)
    n = len(couplings) if couplings.dim() else 0
    if couplings.shape != (n, n) or n == 0:
        raise ValueError(
            f"{couplings_file}: couplings must have shape (N, N), got {tuple(couplings.shape)}"
        )
    if x.shape != (n,):
        raise ValueError(
            f"{fields_file}: fields must have shape ({n},) for {n} x {n} couplings, got "
            f"{tuple(x.shape)}"
        )
    try:
        SpinSystem(couplings, IsingPrior())
    except ValueError as error:
        raise ValueError(f"{couplings_file}: {error}") from error
    broken = (~torch.isfinite(x)).nonzero()
    if len(broken):
        raise ValueError(f"{fields_file}: fields must be finite, x[{int(broken[0])}] is not")
    return couplings, x


def _read(path: Path) -> Tensor:
    """The numbers of an .npy file, float64; nothing in it is ever executed."""
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header makes numpy's parser raise all sorts
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not an .npy file of numbers: {reason}") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path}: must hold real numbers, got dtype {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64).reshape(array.shape))
