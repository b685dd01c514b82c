"""Maps with known fixed points, and the solvers and precisions every test runs over."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.solvers import anderson, broyden, newton_krylov, picard


@pytest.fixture(params=[picard, anderson, broyden, newton_krylov], ids=lambda s: s.__name__)
def solver(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(2)).squeeze(2)


@dataclass
class Problem:
    """z = f(z) for a batch, with W the Jacobian at the origin (up to the nonlinearity)."""

    f: Callable[[Tensor], Tensor]
    z0: Tensor
    solution: Tensor
    matrices: Tensor
    scale: Tensor
    nonlinear: bool

    def __getitem__(self, rows) -> "Problem":
        return _problem(
            self.matrices[rows], self.solution[rows], self.scale[rows], self.nonlinear
        )


def _problem(matrices: Tensor, solution: Tensor, scale: Tensor, nonlinear: bool) -> Problem:
    """The map s φ(W z/s + c), c such that `solution` is its fixed point; φ is tanh or identity."""
    inverse = torch.atanh if nonlinear else torch.clone
    source = inverse(solution / scale) - apply(matrices, solution / scale)

    def f(z: Tensor) -> Tensor:
        field = apply(matrices, z / scale) + source
        return scale * (torch.tanh(field) if nonlinear else field)

    return Problem(f, torch.zeros_like(solution), solution, matrices, scale, nonlinear)


@pytest.fixture
def make_problem():
    """`make(batch, n, norm, dtype, nonlinear, scale)`: random maps of spectral norm `norm`.

    `norm` and `scale` are numbers or one number a sample. With norm < 1 the fixed point is unique
    (tanh contracts), so it is *the* solution.
    """

    def make(
        batch=4, n=6, norm=0.8, dtype=torch.float64, nonlinear=True, scale=1.0, seed=0
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        matrices = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
        matrices /= torch.linalg.matrix_norm(matrices, 2)[:, None, None]
        matrices *= torch.as_tensor(norm, dtype=torch.float64).expand(batch)[:, None, None]
        scale = torch.as_tensor(scale, dtype=torch.float64).expand(batch)[:, None]
        solution = 1.6 * torch.rand(batch, n, generator=generator, dtype=torch.float64) - 0.8
        return _problem(
            matrices.to(dtype), (scale * solution).to(dtype), scale.to(dtype), nonlinear
        )

    return make


class Recorder:
    """Wraps a function of one or more arguments and keeps the first argument of every call."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.seen: list[Tensor] = []

    def __call__(self, *args: Tensor) -> Tensor:
        self.seen.append(args[0].clone())
        return self.function(*args)


@pytest.fixture
def record():
    return Recorder


@pytest.fixture
def residual_of():
    """Recomputes what `Solution.residual` promises."""

    def residual(f: Callable, z: Tensor, stop_mode: str = "rel") -> Tensor:
        fz = f(z)
        norm = torch.linalg.vector_norm(fz - z, dim=1)
        return norm if stop_mode == "abs" else norm / torch.linalg.vector_norm(fz, dim=1)

    return residual
