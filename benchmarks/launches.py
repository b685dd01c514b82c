"""What the layers give an accelerator to do, counted without one.

    python -m benchmarks.launches

Forward and backward of every workload of `benchmarks.speed` on a device that is not there
(`benchmarks.pretended`): the kernels started and how many times the host would wait for a number,
beside TorchDEQ's solvers on our own update map. Workloads whose products are small take as long on
a GPU as starting their kernels does, so the ratio says what to expect there; it is no time. Ends
with an error where TorchDEQ's best starts less than three times as many.
"""

from __future__ import annotations

from typing import Any

import torch

from deep_implicit_attention.deq import DEQFixedPoint

from .cuda import BAR
from .page import parse_out, provenance, write_results, write_section
from .pretended import NAME, Counts, register
from .rivals import PEERS, over_ours, torchdeq_on_our_map
from .speed import WORKLOADS, Workload, iterated
from .timing import Respond, both

TITLE = "Kernels of an accelerator"


def count(workload: Workload) -> dict[str, Any]:
    """Kernels and waits of forward and backward, of ours and of TorchDEQ's solvers."""
    register()
    torch.manual_seed(0)
    batch, sites, dim = workload.size
    module: Any = workload.make()
    x = (torch.randn(batch, sites, dim) / dim**0.5).to(NAME)
    module = module.to(NAME)
    contenders: dict[str, Respond] = {"ours": DEQFixedPoint(module)}
    if iterated(module):
        for peer in PEERS:
            contenders[peer] = torchdeq_on_our_map(module, peer)
    kernels, waits = {}, {}
    for who, respond in contenders.items():
        run = both(respond, x, list(module.parameters()))
        counts = Counts()
        run()
        kernels[who], waits[who] = counts.kernels, counts.waits
    return {"name": workload.name, "size": workload.size, "kernels": kernels, "waits": waits}


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    kernels, waits = found["kernels"], found["waits"]
    ratio = over_ours(kernels)
    cells = [f"{kernels[w]}, {waits[w]}" if w in kernels else "–" for w in ("ours", *PEERS)]
    best = "–" if ratio is None else f"{ratio:.1f}"
    size = ", ".join(map(str, found["size"]))
    return f"| {found['name']} | {size} | {' | '.join(cells)} | {best} |"


def main() -> None:
    page = parse_out(__doc__)
    results = []
    for workload in WORKLOADS:
        results.append(count(workload))
        print(row(results[-1]), flush=True)
    head = (
        "| layer | B, N, d | ours | "
        + " | ".join(f"TorchDEQ {peer}" for peer in PEERS)
        + " | best of TorchDEQ / ours |\n"
        + "|---" * (len(PEERS) + 4)
        + "|"
    )
    command = "python -m benchmarks.launches"
    text = (
        f"{provenance(command)}, float32, seed 0.\n\n"
        "Kernels started by forward and backward, and how many times the host waits for a number, "
        "counted on a device that is not there (`benchmarks/pretended.py`); TorchDEQ's solvers are "
        "on our own update map. Where products are small, starting kernels is most of the time on "
        "a GPU. No time is measured.\n\n" + "\n".join([head, *map(row, results)])
    )
    write_section(page, TITLE, text)
    write_results(page, TITLE, results, command)
    ratios = [over_ours(found["kernels"]) for found in results]
    if min(ratio for ratio in ratios if ratio is not None) < BAR:
        raise SystemExit(f"TorchDEQ starts less than {BAR:g} times as many kernels")


if __name__ == "__main__":
    main()
