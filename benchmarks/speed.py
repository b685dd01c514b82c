"""Time, evaluations, residual and memory of the layers beside their rivals.

    python -m benchmarks.speed --turns 3

Every figure of time is a ratio within one process, one thread: the contenders take turns, and the
median over the turns counts. They are, for each workload of random initial weights,

- **ours**: `DEQFixedPoint` with its defaults (relative residual 1e-4);
- **literal**: the equations written down straight, by TorchDEQ's Anderson (`benchmarks.literal`),
  as in the project of 2021; **lean**: the same with the mask of J_ii = 0 not as large as J;
- **TorchDEQ**: the best of its three solvers on our own update map, prepared once, to 1e-4;
- **1 layer, 6 layers**: explicit transformer blocks of the same width and number of sites;
- **floor**: as many bare matrix products of the update as ours has evaluations.

Answers are held against a float64 solve to 1e-10. A second table counts evaluations of the update,
also without our preconditioner. The results go to docs/benchmarks.md and, with all seconds, to
docs/benchmarks.json; `--title` keeps those of several processors apart. Trained weights are in
`benchmarks.trained`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.attention._site_couplings import SiteCouplings
from deep_implicit_attention.deq import DEQFixedPoint, DEQModule
from deep_implicit_attention.solvers import Solution

from . import literal
from .page import command_line, machine, provenance, write_results, write_section
from .rivals import PEERS, explicit, products, torchdeq_on_our_map
from .timing import Respond, both, forward, peak_bytes, saved_bytes, take_turns

# What holds back the rows near or below their bars.
MISSED = (
    "Where a bar is missed, or met in one run and missed in the next: mean field (32, 64, 16) "
    "has couplings whose spectrum is a disc, for which plain iteration is optimal, so no solver "
    "saves evaluations, and over half of its forward time is bare products (floor). Mean field "
    "(60, 17, 10) and softmax (32, 64, 16), whose bare products are a fifth of it or less, and "
    "adaptive TAP (4, 32, 8), one linear system of size 256, are many small operations. "
    "Inverses of batches are faster on Intel's processors, so literal of the last is, too."
)


@dataclass(frozen=True)
class Workload:
    """A mechanism, its batch, and how many times faster than literal it should be."""

    name: str
    make: Callable[[], DEQModule]
    size: tuple[int, int, int]
    bar: tuple[float, float]


def _softmax(sites: int, dim: int) -> Callable[[], DEQModule]:
    return lambda: DEQVanillaSoftmaxAttention(sites, dim, heads=4)


WORKLOADS = [
    Workload("mean-field", lambda: DEQMeanFieldAttention(64, 16), (32, 64, 16), (7, 5)),
    Workload("mean-field", lambda: DEQMeanFieldAttention(128, 32), (4, 128, 32), (30, 20)),
    Workload("mean-field", lambda: DEQMeanFieldAttention(17, 10), (60, 17, 10), (5, 4.5)),
    Workload("softmax, 4 heads", _softmax(64, 16), (32, 64, 16), (9, 8)),
    Workload("softmax, 4 heads", _softmax(64, 64), (32, 64, 64), (10, 7)),
    Workload("softmax, 4 heads", _softmax(512, 64), (8, 512, 64), (20, 11)),
    Workload("adaptive TAP", lambda: DEQAdaTAPMeanFieldAttention(32, 8), (4, 32, 8), (60, 90)),
    Workload("adaptive TAP", lambda: DEQAdaTAPMeanFieldAttention(64, 16), (4, 64, 16), (40, 70)),
]


def iterated(module: Any) -> bool:
    """Whether our layer iterates; the Gaussian adaptive TAP is a linear system."""
    return not isinstance(module, DEQAdaTAPMeanFieldAttention)


def literally(
    module: Any, x: Tensor, seen: Callable[[], None] = lambda: None, broadcast: bool = False
) -> Respond:
    """The literal equations of `module` by TorchDEQ's Anderson."""
    start = module.initial_state(x)
    parts = [start] if isinstance(start, Tensor) else list(start)

    def respond(x: Tensor) -> Tensor:
        update = literal.update(module, x, broadcast)

        def counted(z: list[Tensor]) -> list[Tensor]:
            seen()
            return update(z)

        return literal.response(counted, parts)[0]

    return respond


@torch.no_grad()
def solves(module: Any, x: Tensor, layer: DEQFixedPoint) -> dict[str, dict[str, float]]:
    """Evaluations, worst true residual and worst error of ours and of the rivals."""
    exact = DEQFixedPoint(
        copy.deepcopy(module).double(),
        solver_fwd_tol=1e-10,
        solver_fwd_max_iter=300,
        on_failure="raise",
    )(x.double()).flatten(1)
    context = module.prepare(x)

    def judged(evaluations: int, value: Tensor) -> dict[str, float]:
        flat = value.flatten(1)
        error = (flat.double() - exact).norm(dim=1) / exact.norm(dim=1)
        found = {"evaluations": evaluations, "error": error.max().item()}
        if iterated(module):
            image = module.update(value, context).flatten(1)
            residual = (image - flat).norm(dim=1) / image.norm(dim=1)
            found["residual"] = residual.max().item()
        return found

    solution: Solution = layer(x, return_solution=True)
    found = {"ours": judged(int(solution.steps.max()), solution.value)}
    found["ours"]["residual"] = solution.residual.max().item()
    if iterated(module):
        plain = layer(x, return_solution=True, solver_fwd_preconditioner=None)
        found["plain"] = judged(int(plain.steps.max()), plain.value)
        for peer in PEERS:
            count = Count()
            value = torchdeq_on_our_map(module, peer, seen=count)(x)
            found[peer] = judged(count.calls, value)
    count = Count()
    value = literally(module, x, count)(x)
    found["literal"] = judged(count.calls, value)
    return found


class Count:
    """Counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def measure(module: Any, x: Tensor, layer: DEQFixedPoint, turns: int) -> dict[str, Any]:
    """All figures of one workload."""
    weights = list(module.parameters())
    found = solves(module, x, layer)
    contenders: dict[str, Respond] = {"ours": layer, "literal": literally(module, x)}
    if iterated(module):
        for peer in PEERS:
            contenders[peer] = torchdeq_on_our_map(module, peer)
    if isinstance(module, SiteCouplings):
        contenders["lean"] = literally(module, x, broadcast=True)
    for depth in (1, 6):
        contenders[f"explicit {depth}"] = explicit(x.shape[2], depth)
    times = {}
    for name in ("forward", "both"):
        runs = {
            who: forward(respond, x) if name == "forward" else both(respond, x, weights)
            for who, respond in contenders.items()
        }
        if iterated(module):
            runs["floor"] = products(module, x, int(found["ours"]["evaluations"]))
        times[name] = take_turns(runs, turns)
    run = both(layer, x, weights)
    return {
        "seconds": times,
        "solves": found,
        "saved bytes": saved_bytes(lambda: layer(x.detach().requires_grad_())),
        "peak bytes": peak_bytes(run),
    }


HEAD = (
    "| layer | B, N, d | literal / ours, forward (bar) | literal / ours, both (bar) "
    "| lean / ours, forward, both | TorchDEQ / ours, forward, both "
    "| explicit 1, 6 layers / ours, both | floor / ours, forward "
    "| saved, MB | peak, MB |\n" + "|---" * 10 + "|"
)


def row(workload: Workload, found: dict[str, Any]) -> str:
    """A line of the table of times."""

    def ratio(way: str, rival: str) -> str:
        seconds = found["seconds"][way]
        return f"{seconds[rival] / seconds['ours']:.1f}" if rival in seconds else "–"

    def judged(way: str, bar: float) -> str:
        seconds = found["seconds"][way]
        value = f"{ratio(way, 'literal')} ({bar:g})"
        return f"**{value}**" if seconds["literal"] / seconds["ours"] >= bar else value

    def peer(way: str) -> str:
        seconds = found["seconds"][way]
        rivals = [seconds[p] for p in PEERS if p in seconds]
        return f"{min(rivals) / seconds['ours']:.1f}" if rivals else "–"

    peak = found["peak bytes"]
    cells = [
        workload.name,
        ", ".join(map(str, workload.size)),
        judged("forward", workload.bar[0]),
        judged("both", workload.bar[1]),
        f"{ratio('forward', 'lean')}, {ratio('both', 'lean')}",
        f"{peer('forward')}, {peer('both')}",
        f"{ratio('both', 'explicit 1')}, {ratio('both', 'explicit 6')}",
        ratio("forward", "floor"),
        f"{found['saved bytes'] / 1e6:.1f}",
        "–" if peak is None else f"{peak / 1e6:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


COUNTED = ("ours", "plain", "literal", *PEERS)
COUNTS_HEAD = (
    "| layer | B, N, d | ours | without preconditioner | literal | TorchDEQ anderson | broyden "
    "| fixed_point_iter | residual, ours | literal | error, ours | literal |\n" + "|---" * 12 + "|"
)


def counts(workload: Workload, found: dict[str, Any]) -> str:
    """A line of the table of evaluations."""
    found = found["solves"]

    def number(who: str, what: str) -> str:
        return f"{found[who][what]:.0e}" if what in found.get(who, {}) else "–"

    cells = [workload.name, ", ".join(map(str, workload.size))]
    cells += [str(found[who]["evaluations"]) if who in found else "–" for who in COUNTED]
    cells += [number(who, what) for what in ("residual", "error") for who in ("ours", "literal")]
    return "| " + " | ".join(cells) + " |"


TIMES_TEXT = (
    "CPU time of the layer with its defaults (relative residual 1e-4) beside the literal equations "
    "under TorchDEQ's Anderson, the best of TorchDEQ's solvers on our own update map, and explicit "
    "transformer blocks; the floor is the part of the forward time that is the bare matrix "
    "products of its evaluations. The literal equations recompute everything in every step, as the "
    "project of 2021 did, and like it they make the mask of J_ii = 0 as large as the couplings; "
    "lean is the same with a mask of N × N. Until commit 273f2e9 this table called lean literal. "
    "Bars are those we set ourselves; bold is reached. "
    "`benchmarks/speed.py` says what each is; `docs/benchmarks.json` has the seconds. "
)
COUNTS_TEXT = (
    "Evaluations of the update from zeros, worst relative residual of the value returned, on the "
    "plain map, and worst relative error against a float64 solve to 1e-10. The first iterate, "
    "F(0), and the step after it where f but not the couplings is evaluated (softmax, mean field "
    "of few sites), are not counted for ours. Adaptive TAP is one linear system for us; TorchDEQ "
    "on our map is then left out.\n\n"
)


def random_weights(page: Path, turns: int, title: str) -> None:
    """The two tables of random initial weights, that of times under `title`."""
    results, times, evaluations = [], [HEAD], [COUNTS_HEAD]
    for workload in WORKLOADS:
        torch.manual_seed(0)
        module: Any = workload.make()
        batch, sites, dim = workload.size
        x = torch.randn(batch, sites, dim) / dim**0.5
        found = measure(module, x, DEQFixedPoint(module), turns)
        results.append({"name": workload.name, "size": workload.size, **found})
        times.append(row(workload, found))
        evaluations.append(counts(workload, found))
        print(times[-1], evaluations[-1], sep="\n", flush=True)
    command = f"python -m benchmarks.speed --turns {turns}"
    command += "" if title == "Speed" else f' --title "{title}"'
    made = f"{provenance(command)}, float32, median of {turns} turns. {machine()}.\n\n"
    write_section(page, title, made + TIMES_TEXT + MISSED + "\n\n" + "\n".join(times))
    write_section(
        page,
        "Evaluations and accuracy of the layers",
        f"{provenance(command)}, float32, seed 0.\n\n" + COUNTS_TEXT + "\n".join(evaluations),
    )
    write_results(page, title, results, command)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--title", default="Speed", help="heading of the table of times")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    random_weights(flags.out, flags.turns, flags.title)


if __name__ == "__main__":
    main()
