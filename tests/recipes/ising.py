"""Independent answers to what `dia ising` is asked, and what it said, for tests of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deep_implicit_attention import spins
from deep_implicit_attention.recipes import _ising

Command = Callable[..., Any]
CLASSES = {
    "naive": spins.NaiveMeanField,
    "tap": spins.TAP,
    "adaptive-tap": spins.AdaptiveTAP,
    "self-averaging-tap": spins.SelfAveragingTAP,
    "expectation-propagation": spins.ExpectationPropagation,
}


def reference_system(n: int, beta: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The systems of the theory page's tables, drawn here as they are described there."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.normal(size=(n, n)), 1)
    return beta / np.sqrt(n) * (upper + upper.T), 0.3 * rng.normal(size=n)


def enumerated(J: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """m, C and log Z by summation over all states, each spin value with weight ½."""
    states = np.array(list(itertools.product((-1.0, 1.0), repeat=len(x))))
    weight = np.exp(0.5 * np.einsum("ki,ij,kj->k", states, J, states) + states @ x)
    p = weight / weight.sum()
    m = p @ states
    return m, (states.T * p) @ states - np.outer(m, m), np.log(weight.mean())


def weiss(J: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Naive mean field: m, (1/(1 − m²) − J)⁻¹ and the variational bound."""
    m = np.tanh(x)
    for _ in range(5000):
        m = 0.5 * m + 0.5 * np.tanh(x + J @ m)
    chance = np.stack([(1 + m) / 2, (1 - m) / 2])
    entropy = -(chance * np.log(chance)).sum() - len(x) * np.log(2)
    return m, np.linalg.inv(np.diag(1 / (1 - m**2)) - J), entropy + 0.5 * m @ J @ m + x @ m


def library(name: str, J: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    system = spins.SpinSystem(torch.tensor(J), spins.IsingPrior())
    response = CLASSES[name]()(system, torch.tensor(x))
    covariance = response.covariance.detach().numpy()
    return response.magnetization.numpy(), covariance, response.log_partition.item()


def errors(answer: Any, exact: Any) -> tuple[float, float, float]:
    n = len(exact[0])
    m = sum(abs(answer[0] - exact[0])) / n
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    covariance = sum(abs(answer[1][p] - exact[1][p]) for p in pairs) / len(pairs)
    return m, covariance, abs(answer[2] - exact[2])


def three(record: dict[str, Any]) -> tuple[float, float, float]:
    return tuple(
        record[f"{name}_error"] for name in ("magnetization", "covariance", "log_partition")
    )  # type: ignore


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows(out: str) -> dict[str, list[str]]:
    """The lines of the table, by method."""
    lines = [line.split() for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if line and line[0] in _ising.METHODS}
