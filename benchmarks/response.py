"""Time of Gaussian adaptive TAP attention beside one linear solve of its size.

    python -m benchmarks.response

Every figure is a ratio of times in one process with one thread: layer and `torch.linalg.solve`
take turns, and the median over the turns counts. Frozen calls follow one another inside
`with module.frozen():`.
"""

from __future__ import annotations

import statistics

import torch

from deep_implicit_attention.attention import DEQAdaTAPMeanFieldAttention
from deep_implicit_attention.deq import DEQFixedPoint
from deep_implicit_attention.spins import GaussianPrior

from .inference import seconds
from .page import parse_out, provenance, write_section

SITES, DIM, BATCH = 64, 16, 4
TURNS = 15
# Forward and backward over one solve, at most; calls with and without `frozen`, at least.
BAR, FROZEN_BAR = 3.0, 10.0


def ratios(dtype: torch.dtype) -> tuple[float, float, float]:
    """Layer over solve, forward and backward; plain over frozen, the same and forward alone."""
    torch.manual_seed(0)
    prior = GaussianPrior(torch.zeros(DIM), torch.eye(DIM))
    module = DEQAdaTAPMeanFieldAttention(SITES, DIM, prior=prior).to(dtype)
    layer = DEQFixedPoint(module, on_failure="raise")
    x = (torch.randn(BATCH, SITES, DIM, dtype=dtype) / DIM**0.5).requires_grad_()
    operator = module.prepare(x).operator.detach().requires_grad_()
    b = torch.randn(SITES * DIM, BATCH, dtype=dtype, requires_grad=True)

    def both() -> None:
        layer(x).sum().backward()

    @torch.no_grad()
    def forward() -> None:
        layer(x)

    def solve() -> None:
        torch.linalg.solve(operator, b).sum().backward()

    for run in (both, solve):
        run()
    turns = [(seconds(both), seconds(solve), seconds(forward)) for _ in range(TURNS)]
    plain, once, plain_forward = map(statistics.median, zip(*turns, strict=True))
    with module.frozen():
        both()
        turns = [(seconds(both), seconds(forward)) for _ in range(TURNS)]
    frozen, frozen_forward = map(statistics.median, zip(*turns, strict=True))
    return plain / once, plain / frozen, plain_forward / frozen_forward


def main() -> None:
    page = parse_out(__doc__)
    torch.set_num_threads(1)
    lines = [
        "| dtype | layer / solve | plain / frozen | plain / frozen, forward alone |",
        "|---|---|---|---|",
    ]
    good = True
    for dtype in (torch.float32, torch.float64):
        layer, frozen, forward = ratios(dtype)
        good &= layer <= BAR and frozen >= FROZEN_BAR
        lines.append(f"| {str(dtype)[6:]} | {layer:.2f} | {frozen:.1f} | {forward:.1f} |")
        print(lines[-1], flush=True)
    write_section(
        page,
        "Gaussian adaptive TAP attention",
        f"{provenance('make bench-full')}, one thread.\n\n"
        f"N = {SITES}, d = {DIM}, batch {BATCH}, trainable Gaussian prior: one linear system of "
        f"size {SITES * DIM}. Forward and backward, the layer beside `torch.linalg.solve` of that "
        f"size in turns, median of {TURNS}, and beside itself inside `frozen()`.\n\n"
        + "\n".join(lines),
    )
    if not good:
        raise SystemExit(f"beyond {BAR} times a solve, or frozen not {FROZEN_BAR:g} times faster")


if __name__ == "__main__":
    main()
