"""Many rows that share what is missing: the same answers, in bounded memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deep_implicit_attention.boltzmann import BoltzmannMachine, _likelihood
from deep_implicit_attention.spins import (
    Exact,
    IsingPrior,
    PottsPrior,
    SpinSystem,
    _exact,
    sherrington_kirkpatrick,
)

ROOT = Path(__file__).parents[2]

PROGRAM = """
import resource
import numpy as np
from deep_implicit_attention.boltzmann import BoltzmannMachine

X = np.where(np.random.default_rng(0).normal(size=(2000, 20)) > 0.1, 1.0, -1.0)
machine = BoltzmannMachine("exact").fit(X)
with open("/proc/self/status") as status:
    size = next(int(line.split()[1]) for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + (1 << 30),) * 2)
known = np.arange(20) < 6
completed = machine.complete(X, known)
scores = machine.score_samples(np.where(known, X, np.nan))
print(completed.X.shape, np.isfinite(scores).all())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
@pytest.mark.slow
def test_many_rows_fit_into_a_gigabyte() -> None:
    """2,000 rows with 14 spins missing: their states and pairs would take nearly four."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[0] == "(2000, 20) True", done.stderr


def test_rows_in_parts_have_the_same_answers(
    X: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = BoltzmannMachine("exact").fit(X)
    observed = np.arange(6) < 2
    holes = np.where(observed, X, np.nan)
    whole = machine.complete(X, observed).probability, machine.score_samples(holes)
    monkeypatch.setattr(_exact, "_TABLE", 37)
    monkeypatch.setattr(_likelihood, "_ROWS", 7)
    assert machine.complete(X, observed).probability == pytest.approx(whole[0], abs=1e-12)
    assert machine.score_samples(holes) == pytest.approx(whole[1], abs=1e-12)


@pytest.mark.parametrize("table", [2**22, 50])
@pytest.mark.parametrize("batch", [1, 40])
def test_enumeration_of_many_fields_is_a_plain_sum(
    table: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_exact, "_TABLE", table)
    J, h = sherrington_kirkpatrick(5, 1.0, 0.3, 0)
    fields = h + torch.randn(batch, 5, generator=torch.Generator().manual_seed(0)).double()
    response = Exact()(SpinSystem(J, IsingPrior()), fields)
    S = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5))).double()
    own = 0.5 * ((S @ J) * S).sum(dim=1)
    p = torch.softmax(own + fields @ S.mT, dim=1)
    m = p @ S
    assert torch.allclose(response.magnetization, m)
    expected = torch.einsum("bk,ki,kj->bij", p, S, S) - m[:, :, None] * m[:, None, :]
    assert torch.allclose(response.covariance, expected)
    assert torch.allclose(response.energy, -(p @ own) - (fields * m).sum(dim=1))
    assert torch.allclose(response.entropy, -(p * (p * 32).log()).sum(dim=1))


@pytest.mark.parametrize(
    "prior", [IsingPrior(), pytest.param(PottsPrior(3), marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_enumeration_in_chunks_is_differentiable_twice(
    prior: IsingPrior | PottsPrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_exact, "_TABLE", 300 if prior.event_shape else 30)
    J, _ = sherrington_kirkpatrick(3, 0.5, 0.0, 1)
    fields = torch.randn(2, 3, *prior.event_shape, generator=torch.Generator().manual_seed(1))
    fields = fields.double().requires_grad_()
    weight = J.clone().requires_grad_()

    def answers(weight: torch.Tensor, fields: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sym = (weight + weight.mT) / 2 * (1 - torch.eye(3).double())
        response = Exact()(SpinSystem(sym, prior), fields)
        return response.covariance, response.energy, response.magnetization

    assert torch.autograd.gradcheck(answers, (weight, fields))
    if isinstance(prior, IsingPrior):
        assert torch.autograd.gradgradcheck(answers, (weight, fields))
