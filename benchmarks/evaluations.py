"""Evaluations of f that solvers need on the update maps of the attention modules.

    python -m benchmarks.evaluations

Ours beside TorchDEQ's, under one stopping rule for all: the count is that of the first evaluation
at which every sample of the batch has relative residual ‖f(z) − z‖ / ‖f(z)‖ ≤ 1e-4. The rule is
applied by the counter around f, not by the solvers, so each solver's own bookkeeping is paid for
and none is stopped early. Evaluations do not depend on the machine; there is no timing here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdeq.solver import get_solver

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
)
from deep_implicit_attention.deq import DEQModule
from deep_implicit_attention.deq._state import Layout
from deep_implicit_attention.solvers import anderson, broyden, picard

from .page import parse_out, provenance, write_results, write_section

TOLERANCE = 1e-4
LIMIT = 100
SEEDS = range(5)


@dataclass(frozen=True)
class Workload:
    """A mechanism and its batch; `strength` multiplies the initial weights."""

    name: str
    make: Callable[[], DEQModule]
    batch: int
    sites: int
    dim: int
    strength: float = 1.0


def _mean_field(sites: int, dim: int) -> Callable[[], DEQModule]:
    return lambda: DEQMeanFieldAttention(sites, dim)


def _softmax(sites: int, dim: int, causal: bool = False) -> Callable[[], DEQModule]:
    return lambda: DEQVanillaSoftmaxAttention(sites, dim, heads=4, causal=causal)


def _vector_spin(beta: float) -> Callable[[], DEQModule]:
    return lambda: DEQVectorSpinAttention(64, 4, beta)


WORKLOADS = [
    Workload("mean-field", _mean_field(64, 16), 32, 64, 16),
    Workload("mean-field", _mean_field(128, 32), 4, 128, 32),
    Workload("mean-field", _mean_field(17, 10), 60, 17, 10),
    Workload("mean-field, weights × 1.4", _mean_field(64, 16), 32, 64, 16, 1.4),
    Workload("mean-field, weights × 1.4", _mean_field(17, 10), 60, 17, 10, 1.4),
    Workload("softmax, 4 heads", _softmax(64, 16), 32, 64, 16),
    Workload("softmax, 4 heads", _softmax(64, 64), 32, 64, 64),
    Workload("softmax, 4 heads, causal", _softmax(64, 64, True), 32, 64, 64),
    Workload("softmax, 4 heads, weights × 1.2", _softmax(64, 64), 32, 64, 64, 1.2),
    Workload("MLP-mixer", lambda: DEQMLPMixerAttention(64, 16), 32, 64, 16),
    Workload("MLP-mixer, weights × 1.25", lambda: DEQMLPMixerAttention(64, 16), 32, 64, 16, 1.25),
    Workload("adaptive TAP (iterated)", lambda: DEQAdaTAPMeanFieldAttention(16, 6), 4, 16, 6),
    Workload("vector spin, 4 heads, β = 1", _vector_spin(1.0), 32, 64, 64),
    Workload("vector spin, 4 heads, β = 1.9", _vector_spin(1.9), 32, 64, 64),
]  # fmt: skip

OURS = {"anderson": anderson, "broyden": broyden, "picard": picard}
PEERS = {
    f"TorchDEQ {name}": get_solver(name) for name in ("anderson", "broyden", "fixed_point_iter")
}


class Solved(Exception):
    """Raised through a solver when the stopping rule holds."""


class Counter:
    """f, counting its evaluations; ends the solve when the stopping rule holds."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f = f
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        image = self.f(z)
        self.calls += 1
        residual = (image - z).norm(dim=1) / image.norm(dim=1)
        if bool((residual <= TOLERANCE).all()):
            raise Solved
        return image

    def until_solved(self, solve: Callable[[], object]) -> int | None:
        """Evaluations that `solve` needs, or None if it gives up before."""
        try:
            solve()
        except Solved:
            return self.calls
        return None


@torch.no_grad()
def count(workload: Workload, seed: int) -> dict[str, int | None]:
    """Evaluations needed by each solver on one draw of weights and sources."""
    torch.manual_seed(seed)
    module = workload.make()
    for parameter in module.parameters():
        parameter.mul_(workload.strength)
    x = torch.randn(workload.batch, workload.sites, workload.dim) / workload.dim**0.5
    context = module.prepare(x)
    start = module.initial_state(x)
    layout = Layout.of(start)
    flat = layout.pack(start)

    def f(z: Tensor) -> Tensor:
        return layout.pack(module.update(layout.unpack(z), context))

    # tol=0: the counter ends the solve, by the same rule for all.
    solvers: dict[str, Callable[[Counter], object]] = {
        name: lambda f, solver=solver: solver(f, flat, tol=0.0, max_iter=LIMIT)
        for name, solver in OURS.items()
    }
    for name, peer in PEERS.items():
        solvers[name] = lambda f, peer=peer: peer(f, flat, max_iter=LIMIT, tol=0.0, stop_mode="rel")
    needed: dict[str, int | None] = {}
    for name, solve in solvers.items():
        counter = Counter(f)
        needed[name] = counter.until_solved(lambda: solve(counter))  # noqa: B023
    return needed


def mean(counts: list[int | None]) -> float:
    """Mean over seeds, infinite if a seed was not solved within the limit."""
    solved = [c for c in counts if c is not None]
    return statistics.fmean(solved) if len(solved) == len(counts) else float("inf")


def table() -> tuple[str, list[dict[str, object]], bool]:
    """The results as a Markdown table, themselves, and whether they are as good as they should."""
    names = [*OURS, *PEERS]
    lines = [
        "| map | B, N, d | " + " | ".join(names) + " | ours / best peer |",
        "|" + "---|" * (len(names) + 3),
    ]
    good, results = True, []
    for workload in WORKLOADS:
        counts = [count(workload, seed) for seed in SEEDS]
        means = {name: mean([c[name] for c in counts]) for name in names}
        best = min(means[name] for name in PEERS)
        ratio = means["anderson"] / best
        good &= means["anderson"] < means["TorchDEQ anderson"] and ratio <= 1.15
        size = f"{workload.batch}, {workload.sites}, {workload.dim}"
        cells = ["> 100" if value == float("inf") else f"{value:.1f}" for value in means.values()]
        line = f"| {workload.name} | {size} | " + " | ".join(cells) + f" | {ratio:.2f} |"
        print(line, flush=True)
        lines.append(line)
        results.append({"name": workload.name, "size": size, "evaluations": counts})
    return "\n".join(lines), results, good


def main() -> None:
    page = parse_out(__doc__)
    body, results, good = table()
    write_section(
        page,
        "Evaluations of f",
        f"{provenance('make bench-full')}, float32.\n\n"
        "Evaluations until every sample of the batch has relative residual ≤ 1e-4, mean over "
        f"weights and sources of seeds 0 to {SEEDS[-1]}; all solvers with their default options, "
        "from zeros. The stopping rule is applied outside the solvers, in the same way to all. "
        "The last column is our `anderson` over the best of TorchDEQ's three.\n\n"
        f"{body}",
    )
    write_results(page, "Evaluations of f", results, "make bench-full")
    if not good:
        raise SystemExit("anderson needs more evaluations than it should on some map")


if __name__ == "__main__":
    main()
