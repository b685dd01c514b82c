"""The layers on a GPU beside TorchDEQ, their synchronisations, and what part is bare products.

    python -m benchmarks.cuda

Without a CUDA device it says so and measures nothing. Times are of the wall clock between
synchronisations of the device, in turns, medians. Measured are, for every workload of
`benchmarks.speed`, forward and backward beside the best of TorchDEQ's solvers on our own update
map; how many times forward, and forward with backward, make the host wait, counted by torch's own
sync debug mode; for mean field (64, 256, 64) the part of the forward time that is the bare products
of its evaluations, and how much faster forward and backward are inside autocast, where first steps
have couplings in bfloat16; and the peak memory of forward and backward for different numbers of
steps. Ends with an error where a bar is missed; the waits and autocast have none.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import Tensor

from deep_implicit_attention.attention import DEQMeanFieldAttention
from deep_implicit_attention.deq import DEQFixedPoint

from .page import machine, parse_out, provenance, write_results, write_section
from .rivals import PEERS, over_ours, products, torchdeq_on_our_map
from .speed import WORKLOADS, Workload, iterated, literally
from .timing import Respond, Run, both, forward, take_turns

TITLE = "CUDA"
TURNS = 15
# TorchDEQ's best over ours, forward and backward, at least.
BAR = 3.0
# The part of the forward time that is bare products at the large mean-field size, at least.
FLOOR = 0.6
# Peak memory at most, over that with the fewest steps; all of them have the solver's history.
STEPS, MEMORY = (20, 40, 80, 160), 1.02
LARGE = Workload("mean-field", lambda: DEQMeanFieldAttention(256, 64), (64, 256, 64), (0, 0))


def clock() -> float:
    """Wall seconds, when the device has done all it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def made(workload: Workload) -> tuple[Any, Tensor]:
    """The module and its input on the device."""
    torch.manual_seed(0)
    batch, sites, dim = workload.size
    module: Any = workload.make().cuda()
    return module, (torch.randn(batch, sites, dim) / dim**0.5).cuda()


def synchronisations(run: Run) -> int:
    """How many times the host waits for the device in `run`."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def peak(run: Run) -> int:
    """Bytes allocated at most while `run` runs, beyond those before."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(workload: Workload) -> dict[str, Any]:
    """Times, evaluations and synchronisations of one workload."""
    module, x = made(workload)
    layer, weights = DEQFixedPoint(module), list(module.parameters())
    contenders: dict[str, Respond] = {"ours": layer, "literal": literally(module, x)}
    if iterated(module):
        for peer in PEERS:
            contenders[peer] = torchdeq_on_our_map(module, peer)
    runs = {who: both(respond, x, weights) for who, respond in contenders.items()}
    with torch.no_grad():
        solution = layer(x, return_solution=True)
    return {
        "name": workload.name,
        "size": workload.size,
        "seconds": take_turns(runs, TURNS, clock),
        "evaluations": int(solution.steps.max()),
        "residual": solution.residual.max().item(),
        "synchronisations": [synchronisations(forward(layer, x)), synchronisations(runs["ours"])],
    }


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    seconds = found["seconds"]
    ratio = over_ours(seconds)
    peer = "–" if ratio is None else f"{ratio:.1f}"
    return (
        f"| {found['name']} | {', '.join(map(str, found['size']))} "
        f"| {seconds['literal'] / seconds['ours']:.1f} | {peer} | {found['evaluations']} "
        f"| {found['residual']:.0e} | {', '.join(map(str, found['synchronisations']))} |"
    )


def large() -> dict[str, float]:
    """At the large mean-field size, the part of the forward time that is bare products, and the
    time of forward and backward over that inside autocast.
    """
    module, x = made(LARGE)
    layer, weights = DEQFixedPoint(module), list(module.parameters())
    with torch.no_grad():
        evaluations = int(layer(x, return_solution=True).steps.max())

    def narrow(x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return layer(x)

    runs = {
        "ours": forward(layer, x),
        "floor": products(module, x, evaluations),
        "both": both(layer, x, weights),
        "autocast": both(narrow, x, weights),
    }
    seconds = take_turns(runs, TURNS, clock)
    return {
        "evaluations": evaluations,
        "floor": seconds["floor"] / seconds["ours"],
        "autocast": seconds["both"] / seconds["autocast"],
    }


def memory_by_steps() -> dict[int, int]:
    """Peak bytes of forward and backward against the number of steps."""
    module, x = made(WORKLOADS[0])
    found = {}
    for steps in STEPS:
        layer = DEQFixedPoint(
            module, on_failure="ignore", solver_fwd_tol=0.0, solver_fwd_max_iter=steps
        )
        found[steps] = peak(both(layer, x, list(module.parameters())))
    return found


def main() -> None:
    page = parse_out(__doc__)
    if not torch.cuda.is_available():
        # What was measured where there was one stays.
        if f"\n## {TITLE}\n" not in (page.read_text() if page.exists() else ""):
            write_section(page, TITLE, "Not measured: no CUDA device was at hand.")
        print("no CUDA device: nothing is measured")
        return
    command = "python -m benchmarks.cuda"
    results = []
    for workload in WORKLOADS:
        results.append(measure(workload))
        print(row(results[-1]), flush=True)
    head = (
        "| layer | B, N, d | literal / ours, both | TorchDEQ / ours, both | evaluations "
        "| residual | synchronisations, forward, both |\n" + "|---" * 7 + "|"
    )
    part, peaks = large(), memory_by_steps()
    text = (
        f"{provenance(command)}, {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, "
        f"float32, median of {TURNS} turns. {machine()}.\n\n"
        f"TorchDEQ's best is to be at least {BAR:g} times slower.\n\n"
        + "\n".join([head, *map(row, results)])
        + f"\n\nMean field (64, 256, 64): {part['floor']:.0%} of the forward time is the bare "
        f"products of its {part['evaluations']} evaluations (to be at least {FLOOR:.0%}). Inside "
        f"autocast forward and backward are {part['autocast']:.2f} times as fast. Peak memory of "
        "forward and backward at mean field (32, 64, 16), in MB, with "
        + ", ".join(f"{steps} steps {size / 1e6:.1f}" for steps, size in peaks.items())
        + "."
    )
    write_section(page, TITLE, text)
    everything = {"workloads": results, "large": part, "peak by steps": peaks}
    write_results(page, TITLE, everything, command)
    ratios = [over_ours(found["seconds"]) for found in results]
    ratios = [ratio for ratio in ratios if ratio is not None]
    grows = max(peaks.values()) > MEMORY * peaks[STEPS[0]]
    if min(ratios) < BAR or part["floor"] < FLOOR or grows:
        raise SystemExit(f"not {BAR:g} times TorchDEQ, under {FLOOR:.0%} products, or memory grows")


if __name__ == "__main__":
    main()
