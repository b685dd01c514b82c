"""Learning from data beside the exact answer, and beside the linear algebra it cannot do without.

    python -m benchmarks.boltzmann

First from exact moments: all states are the rows, weighted by their probabilities. Then inverse
Ising: Sherrington-Kirkpatrick systems (`sherrington_kirkpatrick(N, 1.0, 0.3, seed)`), 10,000
independent draws from all states, KL of the true distribution from the learned one by enumeration.
The same of seven spins, 5,000 rows, with a fifth of the entries missing completely at random.
Then N = 100: time of a fit over that of one covariance matrix and one inverse. One thread; the
tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from deep_implicit_attention.boltzmann import BoltzmannMachine
from deep_implicit_attention.spins import (
    BlockGibbs,
    Exact,
    IsingPrior,
    SpinSystem,
    sherrington_kirkpatrick,
)

METHODS = ("independent", "naive", "tap", "adaptive_tap", "pseudolikelihood", "pcd", "exact")
ROWS, TURNS, SEEDS = 10_000, 15, range(5)
# Time of the adaptive TAP fit over one covariance matrix and one inverse, at most.
BAR = 5.0


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def states(n: int) -> np.ndarray:
    bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    return 2.0 * bits - 1


def log_probabilities(J: np.ndarray, h: np.ndarray, S: np.ndarray) -> np.ndarray:
    exponent = 0.5 * ((S @ J) * S).sum(axis=1) + S @ h
    return exponent - np.logaddexp.reduce(exponent)


def exact_moments() -> None:
    """Median KL of ten systems of ten spins, seeds 0 to 9, learned from exact moments."""
    S = states(10)
    methods = ("independent", "naive", "adaptive_tap", "tap")
    print(f"| beta | {' | '.join(methods)} |\n|---{'|---' * len(methods)}|")
    for beta in (0.25, 0.5, 0.75, 1.0):
        found = {method: [] for method in methods}
        for seed in range(10):
            couplings, fields = sherrington_kirkpatrick(10, beta, 0.3, seed)
            log_p = log_probabilities(couplings.numpy(), fields.numpy(), S)
            p = np.exp(log_p)
            for method in methods:
                machine = BoltzmannMachine(method).fit(S, sample_weight=p)
                learned = log_probabilities(machine.couplings_, machine.fields_, S)
                found[method].append(p @ (log_p - learned))
        medians = " | ".join(f"{np.median(kl):.2e}" for kl in found.values())
        print(f"| {beta:.2f} | {medians} |", flush=True)
    print()


def inverse_ising(n: int) -> None:
    """Mean and standard deviation over seeds, of the systems and of the draws."""
    S = states(n)
    found = {method: [] for method in METHODS}
    for seed in SEEDS:
        couplings, fields = sherrington_kirkpatrick(n, 1.0, 0.3, seed)
        log_p = log_probabilities(couplings.numpy(), fields.numpy(), S)
        p = np.exp(log_p)
        X = S[np.random.default_rng(seed).choice(len(S), size=ROWS, p=p / p.sum())]
        for method in METHODS:
            machine = BoltzmannMachine(method)
            taken = seconds(lambda machine=machine, X=X: machine.fit(X))
            learned = log_probabilities(machine.couplings_, machine.fields_, S)
            system = SpinSystem(torch.from_numpy(machine.couplings_), IsingPrior())
            answer = Exact()(system, torch.from_numpy(machine.fields_))
            m = answer.magnetization.numpy()
            second = answer.covariance.numpy() + np.outer(m, m)
            gap = max(np.abs(m - X.mean(axis=0)).max(), np.abs(second - X.T @ X / ROWS).max())
            found[method].append((taken, p @ (log_p - learned), gap))
    print(f"| N = {n} | seconds | KL | largest error of a moment of the data |\n|---|---|---|---|")
    for method, rows in found.items():
        taken, kl, gap = np.array(rows).T
        spread = f"{kl.mean():.2e} ± {kl.std(ddof=1):.1e}"
        print(f"| {method} | {np.median(taken):.3f} | {spread} | {gap.max():.1e} |", flush=True)
    print()


def gaps() -> None:
    """Mean KL of three systems of seven spins, seeds 0 to 2, from complete rows and with gaps."""
    S, methods = states(7), ("naive", "tap", "adaptive_tap")
    found = {method: [] for method in methods}
    for seed in range(3):
        couplings, fields = sherrington_kirkpatrick(7, 1.0, 0.3, seed)
        log_p = log_probabilities(couplings.numpy(), fields.numpy(), S)
        p = np.exp(log_p)
        rng = np.random.default_rng(seed)
        X = S[rng.choice(len(S), size=5000, p=p / p.sum())]
        holes = np.where(rng.random(X.shape) < 0.2, np.nan, X)
        for method in methods:
            machines = [BoltzmannMachine(method).fit(data) for data in (X, holes)]
            learned = [log_probabilities(one.couplings_, one.fields_, S) for one in machines]
            found[method].append([p @ (log_p - one) for one in learned])
    print("| N = 7 | KL, complete | KL, a fifth missing |\n|---|---|---|")
    for method, divergences in found.items():
        complete, missing = np.mean(divergences, axis=0)
        print(f"| {method} | {complete:.3f} | {missing:.3f} |", flush=True)
    print()


def hundred_spins() -> float:
    couplings, fields = sherrington_kirkpatrick(100, 0.5, 0.3, 0)
    generator = torch.Generator().manual_seed(0)
    prior = IsingPrior()
    start = prior.sample(torch.zeros(ROWS, 100, dtype=torch.float64), generator)
    sweeps = BlockGibbs(SpinSystem(couplings, prior))
    X = np.ascontiguousarray(sweeps(start, fields, sweeps=30, generator=generator).numpy())

    def unit() -> np.ndarray:
        return np.linalg.inv(np.cov(X, rowvar=False))

    def ratio(method: str, turns: int) -> tuple[float, float]:
        machine = BoltzmannMachine(method)
        times = [(seconds(lambda: machine.fit(X)), seconds(unit)) for _ in range(turns)]
        fit, one = (statistics.median(column) for column in zip(*times, strict=True))
        return fit, fit / one

    unit()
    print("| N = 100 | seconds | over one covariance and inverse |\n|---|---|---|")
    ratios = {}
    for method, turns in (("adaptive_tap", TURNS), ("tap", TURNS), ("pseudolikelihood", 3)):
        fit, ratios[method] = ratio(method, turns)
        print(f"| {method} | {fit:.4f} | {ratios[method]:.1f} |", flush=True)
    return ratios["adaptive_tap"]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    exact_moments()
    for n in (9, 15):
        inverse_ising(n)
    gaps()
    if hundred_spins() > BAR:
        raise SystemExit(f"a fit takes more than {BAR} times its linear algebra")


if __name__ == "__main__":
    main()
