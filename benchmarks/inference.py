"""Time of inference methods beside the linear algebra that they cannot do without.

    python -m benchmarks.inference

Every figure is a ratio of times in one process with one thread. Method and linear algebra take
turns, and the median over the turns counts. Shared processors change their speed by half from one
second to the next, so the linear algebra is timed on both sides of the method, for about as long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from deep_implicit_attention.spins import (
    AdaptiveTAP,
    IsingPrior,
    SelfAveragingTAP,
    SpinSystem,
    sherrington_kirkpatrick,
)

from .page import parse_out, provenance, write_section

TURNS = 5
BETA, FIELD = 0.5, 0.3
# float32 rarely gets below 1e-6.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
# Total time of adaptive TAP over that of its factorisations and inverses, at most.
BAR = 1.5


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Time of one `run`, mean over `times`."""
    begin = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - begin) / times


def median_ratio(run: Callable[[], object], unit: Callable[[], object], times: int) -> float:
    """Time of `run` over that of `unit`, repeated `times` before it and `times` after it."""
    unit()
    ratios, before = [], seconds(unit, times)
    for _ in range(TURNS):
        between, after = seconds(run), seconds(unit, times)
        ratios.append(2 * between / (before + after))
        before = after
    return statistics.median(ratios)


def sk(num_spins: int, dtype: torch.dtype) -> tuple[SpinSystem, torch.Tensor]:
    """An SK system and its fields."""
    couplings, x = sherrington_kirkpatrick(num_spins, BETA, FIELD)
    return SpinSystem(couplings.to(dtype), IsingPrior()), x.to(dtype)


@torch.no_grad()
def adaptive_tap(num_spins: int, dtype: torch.dtype) -> tuple[int, float]:
    """Steps to the solution, and its time over steps × (Cholesky factorisation and inverse)."""
    system, x = sk(num_spins, dtype)
    method = AdaptiveTAP(tol=TOLERANCES[dtype])
    operator = 3 * torch.eye(num_spins, dtype=dtype) - system.couplings

    def factorise_and_invert() -> torch.Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(operator).L)

    solution = method(system, x).solution
    if solution is None or not bool(solution.converged):
        raise SystemExit(f"AdaptiveTAP did not converge: {solution!r}")
    steps = int(solution.steps)
    return steps, median_ratio(lambda: method(system, x), factorise_and_invert, 25) / steps


@torch.no_grad()
def self_averaging_tap(num_spins: int, dtype: torch.dtype) -> tuple[int, float, float]:
    """Steps, and time over one `eigvalsh` of J: for a new system, and for further fields."""
    system, x = sk(num_spins, dtype)
    couplings = system.couplings
    method = SelfAveragingTAP(tol=TOLERANCES[dtype])
    solution = method(system, x).solution
    if solution is None or not bool(solution.converged):
        raise SystemExit(f"SelfAveragingTAP did not converge: {solution!r}")

    def decompose() -> torch.Tensor:
        return torch.linalg.eigvalsh(couplings)

    def anew() -> object:
        return method(SpinSystem(couplings, IsingPrior()), x)

    first = median_ratio(anew, decompose, 1)
    return int(solution.steps), first, median_ratio(lambda: method(system, x), decompose, 1)


def main() -> None:
    page = parse_out(__doc__)
    torch.set_num_threads(1)
    lines = [
        "| N | dtype | steps | time / (steps × one factorisation and inverse) |",
        "|---|---|---|---|",
    ]
    good = True
    for dtype in TOLERANCES:
        steps, ratio = adaptive_tap(1000, dtype)
        good &= ratio <= BAR
        lines.append(f"| 1000 | {str(dtype)[6:]} | {steps} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "`SelfAveragingTAP`, which decomposes couplings once for all fields:",
        "",
        "| N | dtype | steps | new system, time / `eigvalsh` | further fields, time / `eigvalsh` |",
        "|---|---|---|---|---|",
    ]
    for dtype in TOLERANCES:
        steps, first, further = self_averaging_tap(2000, dtype)
        lines.append(f"| 2000 | {str(dtype)[6:]} | {steps} | {first:.2f} | {further:.2f} |")
        print(lines[-1], flush=True)
    tolerances = ", ".join(f"{tol:g} in {str(dtype)[6:]}" for dtype, tol in TOLERANCES.items())
    write_section(
        page,
        "Inference",
        f"{provenance('make bench-full')}, one thread.\n\n"
        f"Ising spins with SK couplings, β = {BETA}, to relative residual {tolerances}. Ratios of "
        f"times in one process, the linear algebra before and after the method, median of {TURNS}."
        "\n\n"
        "`AdaptiveTAP`, whose step is a Cholesky factorisation and the inverse from it "
        "(`torch.linalg.cholesky_ex`, `torch.cholesky_inverse`):\n\n" + "\n".join(lines),
    )
    if not good:
        raise SystemExit(f"a step of AdaptiveTAP takes more than {BAR} times its linear algebra")


if __name__ == "__main__":
    main()
