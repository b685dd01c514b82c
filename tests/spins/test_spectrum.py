"""Self-averaging TAP at size: one eigendecomposition for each system, and the memory it takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.autograd import grad

from deep_implicit_attention.spins import (
    IsingPrior,
    SelfAveragingTAP,
    SpinSystem,
    sherrington_kirkpatrick,
)

TIGHT = SelfAveragingTAP(tol=1e-12)


@pytest.fixture
def decompositions(monkeypatch) -> list[str]:
    """Grows by a name at every decomposition."""
    calls: list[str] = []

    def counted(name: str) -> None:
        original = getattr(torch.linalg, name)

        def call(*args, **options):
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(torch.linalg, name, call)

    for name in ("eigvalsh", "eigh", "eig", "svd", "svdvals"):
        counted(name)
    return calls


def test_one_decomposition_serves_everything(decompositions):
    couplings, x = sherrington_kirkpatrick(8, 0.5, 0.3)
    system = SpinSystem(couplings, IsingPrior())
    for scale in (1.0, 2.0):
        fields = (scale * x).requires_grad_()
        response = TIGHT(system, fields)
        grad(response.log_partition, fields, create_graph=True)
        assert response.covariance.shape == response.susceptibility.shape == (8, 8)
    with torch.no_grad():
        TIGHT(system, x)
    assert decompositions == ["eigvalsh"]


def test_changed_couplings_are_decomposed_again(decompositions):
    couplings, x = sherrington_kirkpatrick(8, 0.5, 0.3)
    system = SpinSystem(couplings, IsingPrior())
    TIGHT(system, x)
    couplings *= 1.3
    changed = TIGHT(system, x)
    fresh = TIGHT(SpinSystem(couplings.clone(), IsingPrior()), x)
    assert torch.equal(changed.log_partition, fresh.log_partition)
    system.couplings = couplings / 2
    replaced = TIGHT(system, x)
    fresh = TIGHT(SpinSystem(couplings / 2, IsingPrior()), x)
    assert torch.equal(replaced.log_partition, fresh.log_partition)
    assert len(decompositions) == 5


def test_derivatives_by_couplings_need_no_further_one(decompositions):
    couplings, x = sherrington_kirkpatrick(8, 0.5, 0.3)
    couplings.requires_grad_()
    system = SpinSystem(couplings, IsingPrior())
    first = grad(TIGHT(system, x).log_partition, couplings)[0]
    with torch.no_grad():
        TIGHT(system, x)
    again = grad(TIGHT(system, x).log_partition, couplings)[0]
    assert torch.equal(first, again)
    assert decompositions == ["eigvalsh"]
    with torch.no_grad():
        couplings -= 0.1 * (first + first.mT)  # a step of training
        couplings.fill_diagonal_(0)
    trained = grad(TIGHT(system, x).log_partition, couplings)[0]
    assert decompositions == ["eigvalsh"] * 2
    fresh = couplings.detach().clone().requires_grad_()
    expected = grad(TIGHT(SpinSystem(fresh, IsingPrior()), x).log_partition, fresh)[0]
    assert torch.equal(trained, expected)


def test_a_spectrum_kept_in_inference_mode_serves_gradients():
    couplings, x = sherrington_kirkpatrick(8, 0.5, 0.3)
    system = SpinSystem(couplings, IsingPrior())
    with torch.inference_mode():
        quiet = TIGHT(system, x).log_partition.item()
        made_inside = TIGHT(SpinSystem(couplings + 0, IsingPrior()), x).log_partition.item()
    x.requires_grad_()
    response = TIGHT(system, x)
    gradient = grad(response.log_partition, x)[0]
    torch.testing.assert_close(gradient, response.magnetization, rtol=0, atol=1e-9)
    assert quiet == made_inside == response.log_partition.item()


MEASURE = """
import resource, sys
import torch
from deep_implicit_attention.spins import IsingPrior, SelfAveragingTAP, SpinSystem, ferromagnet

torch.set_num_threads(1)
SelfAveragingTAP()(SpinSystem(ferromagnet(9), IsingPrior()), torch.ones(9).double())  # libraries
n = int(sys.argv[1])
J = torch.zeros(n, n, dtype=torch.float64)
generator = torch.Generator().manual_seed(0)
for i in range(n):
    J[i, :i] = 0.5 / n**0.5 * torch.randn(i, generator=generator, dtype=torch.float64)
    J[:i, i] = J[i, :i]
x = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
response = SelfAveragingTAP()(SpinSystem(J, IsingPrior()), x)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert bool(response.solution.converged)
print((after - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB")
@pytest.mark.parametrize("n", [1500, pytest.param(5000, marks=pytest.mark.slow)])
def test_memory_is_two_arrays_beside_the_couplings(n):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(n)], capture_output=True, text=True, check=True
    )
    array, change = 8 * n * n, 4 * 2**20
    assert int(run.stdout) <= 2 * array + change
