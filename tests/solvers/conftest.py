"""Maps with known fixed points, and the solvers and precisions every test runs over."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.solvers import (
    _anderson,
    _books,
    _gmres,
    _iterate,
    _scale,
    anderson,
    broyden,
    newton_krylov,
    picard,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For arrays this small a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def leave_the_host(monkeypatch):
    """A function after whose call solves on the host run as on an accelerator."""

    def leave():
        for part in (_iterate, _books, _anderson, _gmres, _scale):
            monkeypatch.setattr(part, "is_host", lambda z: False)

    return leave


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
    """The map s φ(W z/s + c) with its fixed point `solution`; φ is tanh or the identity."""

    matrices: Tensor
    source: Tensor
    scale: Tensor
    solution: Tensor
    nonlinear: bool

    def f(self, z: Tensor) -> Tensor:
        field = apply(self.matrices, z / self.scale) + self.source
        return self.scale * (torch.tanh(field) if self.nonlinear else field)

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.solution)

    def __getitem__(self, rows: slice) -> "Problem":
        parts = (self.matrices, self.source, self.scale, self.solution)
        return Problem(*(part[rows] for part in parts), self.nonlinear)


@pytest.fixture
def make_problem():
    """`make(...)`: random maps whose W has the spectral norm `norm`, and solutions up to `scale`.

    Both are numbers or one number a sample. With norm < 1 the fixed point is unique.
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
        source = (torch.atanh(solution) if nonlinear else solution) - apply(matrices, solution)
        parts = (matrices, source, scale, scale * solution)
        return Problem(*(part.to(dtype) for part in parts), nonlinear)

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
