"""How time grows with sites, components and batch, and softmax couplings of very many sites.

    python -m benchmarks.scaling

Time of one evaluation, of a context that is prepared, as one size doubles; for the Gaussian
adaptive TAP, which has no evaluations, of a forward pass. The exponent is the slope of log time
over log size, that of the arithmetic the slope of its floating-point operations over the same
sizes. A second table has memory and time of softmax couplings without and with their N × N matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
    _pooling,
)
from deep_implicit_attention.deq import DEQFixedPoint

from .page import machine, parse_out, provenance, write_results, write_section
from .timing import Largest, both, forward, peak_bytes, saved_bytes, take_turns

Size = tuple[int, int, int]  # B, N, d
# Softmax couplings have no matrix in a solve from the first number of sites on, and none at all
# from the second.
MATRIX, FUSED = (1 << 30, 1 << 30), (1, 1)
TURNS = 7
# A timed run repeats an evaluation until it takes about this long.
SECONDS = 0.02
LAYERS: dict[str, Callable[[int, int], Any]] = {
    "mean-field": DEQMeanFieldAttention,
    "softmax, as a matrix": lambda sites, dim: DEQVanillaSoftmaxAttention(sites, dim, heads=4),
    "softmax, fused": lambda sites, dim: DEQVanillaSoftmaxAttention(sites, dim, heads=4),
    "adaptive TAP": DEQAdaTAPMeanFieldAttention,
}


def operations(layer: str, size: Size) -> float:
    """Floating-point operations of what is timed, in matrix products and factorisations."""
    batch, sites, dim = size
    correction = 16.0 * batch * sites * dim**2
    if layer == "mean-field":
        return 2.0 * batch * (sites * dim) ** 2 + correction
    if layer == "adaptive TAP":
        unknowns = sites * dim
        return unknowns**3 / 3 + 2.0 * batch * unknowns**2
    anew = 2 if layer == "softmax, fused" else 1
    return anew * 2.0 * batch * sites**2 * dim + 2.0 * batch * sites * dim**2 + correction


# The layer, the size that doubles, and from what on.
DOUBLINGS: list[tuple[str, str, Size, int]] = [
    ("mean-field", "N", (16, 16, 16), 5),
    ("mean-field", "d", (16, 32, 8), 5),
    ("mean-field", "B", (8, 64, 16), 5),
    ("softmax, as a matrix", "N", (4, 64, 64), 5),
    ("softmax, as a matrix", "d", (4, 64, 32), 5),
    ("softmax, as a matrix", "B", (4, 64, 64), 5),
    ("softmax, fused", "N", (1, 256, 64), 5),
    ("softmax, fused", "d", (1, 256, 32), 5),
    ("softmax, fused", "B", (1, 256, 64), 5),
    ("adaptive TAP", "N", (4, 16, 16), 4),
    ("adaptive TAP", "d", (4, 32, 8), 4),
    ("adaptive TAP", "B", (4, 32, 16), 5),
]


class _From:
    """Inside, softmax couplings have no matrix from `fused` sites on, and never one from `long`."""

    def __init__(self, fused: int, long: int) -> None:
        self.inside = fused, long

    def __enter__(self) -> None:
        self.outside = _pooling._FUSED, _pooling._LONG
        _pooling._FUSED, _pooling._LONG = self.inside

    def __exit__(self, *exception: object) -> None:
        _pooling._FUSED, _pooling._LONG = self.outside


@torch.no_grad()
def seconds(layer: str, size: Size) -> float:
    """CPU seconds of one evaluation (adaptive TAP: of one solve)."""
    torch.manual_seed(0)
    batch, sites, dim = size
    module = LAYERS[layer](sites, dim)
    x = torch.randn(batch, sites, dim) / dim**0.5
    if layer == "adaptive TAP":
        call: Callable[[], Any] = forward(DEQFixedPoint(module), x)
    else:
        with _From(*(FUSED if layer == "softmax, fused" else MATRIX)):
            context, z = module.prepare(x), torch.randn_like(x)
        call = lambda: module.update(z, context)  # noqa: E731
    once = take_turns({"": call}, 3)[""]
    repeats = max(1, math.ceil(SECONDS / max(once, 1e-6)))

    def repeated() -> None:
        for _ in range(repeats):
            call()

    return take_turns({"": repeated}, TURNS)[""] / repeats


def slope(sizes: list[int], values: list[float]) -> float:
    """The exponent of a power law, fitted."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def exponents() -> tuple[list[str], list[dict[str, Any]]]:
    """The table of exponents, and the times."""
    lines = ["| layer | doubled | from | to | exponent | of the arithmetic |", "|---" * 6 + "|"]
    results = []
    for layer, axis, start, points in DOUBLINGS:
        place = "BNd".index(axis)
        sizes: list[Size] = []
        for k in range(points):
            size = list(start)
            size[place] *= 2**k
            sizes.append((size[0], size[1], size[2]))
        along = [size[place] for size in sizes]
        times = [seconds(layer, size) for size in sizes]
        found = slope(along, times)
        arithmetic = slope(along, [operations(layer, size) for size in sizes])
        lines.append(
            f"| {layer} | {axis} | {', '.join(map(str, sizes[0]))} "
            f"| {', '.join(map(str, sizes[-1]))} | {found:.2f} | {arithmetic:.2f} |"
        )
        print(lines[-1], flush=True)
        results.append({"layer": layer, "doubled": axis, "sizes": sizes, "seconds": times})
    return lines, results


def without_a_matrix() -> tuple[list[str], dict[str, Any]]:
    """Memory as N doubles, one batch of one, d = 64, 4 heads, forward and backward."""
    lines = [
        "| N | largest tensor, elements / (N d) | saved, MB | peak, MB | one N × N × 4 heads, MB |",
        "|---" * 5 + "|",
    ]
    results: dict[str, Any] = {"memory": [], "speed": []}
    for sites in (2048, 4096, 8192):
        torch.manual_seed(0)
        module = DEQVanillaSoftmaxAttention(sites, 64, heads=4)
        layer, x = DEQFixedPoint(module), torch.randn(1, sites, 64) / 8
        run = both(layer, x, list(module.parameters()))
        peak = peak_bytes(run)
        with Largest() as largest:
            run()
        saved = saved_bytes(lambda: layer(x.detach().requires_grad_()))  # noqa: B023
        ratio = largest.elements / x.numel()
        lines.append(
            f"| {sites} | {ratio:.0f} | {saved / 1e6:.0f} "
            f"| {'–' if peak is None else f'{peak / 1e6:.0f}'} | {16e-6 * sites**2:.0f} |"
        )
        print(lines[-1], flush=True)
        found = {"sites": sites, "saved": saved, "peak": peak, "largest": largest.elements}
        results["memory"].append(found)
    lines += ["", "| N = 512, B | precomputed / chosen, forward, both | / no matrix at all |"]
    lines += ["|---" * 3 + "|"]
    for batch in (1, 8):
        found = _at_512(batch)
        results["speed"].append({"batch": batch, "seconds": found})
        cells = [str(batch)]
        for who in ("chosen", "fused"):
            ratios = [found[way]["matrix"] / found[way][who] for way in ("forward", "both")]
            cells.append(", ".join(f"{ratio:.2f}" for ratio in ratios))
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines, results


def _at_512(batch: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    module = DEQVanillaSoftmaxAttention(512, 64, heads=4)
    layer, x = DEQFixedPoint(module), torch.randn(batch, 512, 64) / 8
    ways = {
        "chosen": (_pooling._FUSED, _pooling._LONG),
        "fused": FUSED,
        "matrix": MATRIX,
    }

    def under(thresholds: tuple[int, int], run: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> None:
            with _From(*thresholds):
                run()

        return inside

    found = {}
    for name in ("forward", "both"):
        run = forward(layer, x) if name == "forward" else both(layer, x, list(module.parameters()))
        found[name] = take_turns({who: under(way, run) for who, way in ways.items()}, TURNS)
    return found


def main() -> None:
    page: Path = parse_out(__doc__)
    torch.set_num_threads(1)
    made = f"{provenance('make bench-full')}, float32, median of {TURNS} turns. {machine()}.\n\n"
    lines, times = exponents()
    write_section(
        page,
        "Growth with size",
        made + "Exponent of the time of one evaluation as one size doubles, the couplings being "
        "ready (adaptive TAP: of a whole solve), fitted over all sizes. It is below that of the "
        "arithmetic where small sizes are dispatching or large ones fill the processor better; "
        "above it where couplings outgrow the caches. Softmax couplings are a matrix made "
        "once, or made anew in every evaluation by fused attention, whose exponentials are not "
        "counted in the arithmetic. On a machine shared with others an exponent moves by a tenth "
        "from run to run.\n\n" + "\n".join(lines),
    )
    lines, memory = without_a_matrix()
    write_section(
        page,
        "Softmax couplings of many sites",
        made + "d = 64, 4 heads. From 2,048 sites on there is no matrix between sites, neither "
        "forward nor backward. Peak is how far resident memory grows in a forward and backward "
        "pass. At N = 512: time with couplings precomputed as matrices, over the time of what "
        "the library chooses, and over that without a matrix anywhere.\n\n" + "\n".join(lines),
    )
    write_results(page, "Growth with size", times, "make bench-full")
    write_results(page, "Softmax couplings of many sites", memory, "make bench-full")


if __name__ == "__main__":
    main()
