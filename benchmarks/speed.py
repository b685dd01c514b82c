"""Time, evaluations, residual and memory of the layers beside their rivals.

    python -m benchmarks.speed
    python -m benchmarks.speed --vit RUN --shakespeare RUN      # and with trained weights

Every figure of time is a ratio within one process, one thread: the contenders take turns, and the
median over the turns counts. They are, for each workload of random initial weights,

- **ours**: `DEQFixedPoint` with its defaults (relative residual 1e-4);
- **literal**: the equations written down straight, by TorchDEQ's Anderson (`benchmarks.literal`);
- **TorchDEQ**: the best of its three solvers on our own update map, prepared once, to 1e-4;
- **1 layer, 6 layers**: explicit transformer blocks of the same width and number of sites;
- **floor**: as many bare matrix products of the update as ours has evaluations.

Answers are held against a float64 solve to 1e-10. The results go to docs/benchmarks.md and, as
JSON, to docs/benchmarks.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdeq import get_deq

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.deq import DEQFixedPoint, DEQModule
from deep_implicit_attention.recipes import load_recipe
from deep_implicit_attention.solvers import Solution
from deep_implicit_attention.training import Run, windows

from . import literal
from .page import provenance, write_section

PEERS = ("anderson", "broyden", "fixed_point_iter")
Respond = Callable[[Tensor], Tensor]


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


def torchdeq_on_our_map(
    module: Any, solver: str, tol: float = 1e-4, from_input: bool = False
) -> Respond:
    """TorchDEQ on the update that `prepare` has made ready, with implicit gradients."""
    deq = get_deq(
        f_solver=solver, b_solver=solver, f_max_iter=200, b_max_iter=200,
        f_tol=tol, b_tol=tol, f_stop_mode="rel", b_stop_mode="rel", ift=True,
    )  # fmt: skip

    def respond(x: Tensor) -> Tensor:
        deq.train(torch.is_grad_enabled())
        context = module.prepare(x)
        start = x.detach() if from_input else torch.zeros_like(x)
        found, _ = deq(lambda z: module.update(z, context), start, solver_kwargs={})
        return found[-1]

    return respond


def explicit(dim: int, depth: int) -> nn.Module:
    """Pre-normalised transformer blocks."""
    block = nn.TransformerEncoderLayer(
        dim, 4 if dim % 4 == 0 else 1, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


def products(module: Any, x: Tensor, evaluations: int) -> Callable[[], None]:
    """The bare matrix products of as many updates."""
    batch, sites, dim = x.shape
    factors: list[tuple[Tensor, Tensor]] = []
    if isinstance(module, DEQMeanFieldAttention):
        factors.append((torch.randn(batch, sites * dim), torch.randn(sites * dim, sites * dim)))
    if isinstance(module, DEQVanillaSoftmaxAttention):
        heads = module.heads
        shape = batch, heads, sites
        factors.append((torch.rand(*shape, sites), torch.randn(*shape, dim // heads)))
        factors.append((x, torch.randn(dim, dim)))
    factors.append((x, torch.randn(dim, 4 * dim)))
    factors.append((torch.randn(batch, sites, 4 * dim), torch.randn(4 * dim, dim)))

    def run() -> None:
        for _ in range(evaluations):
            for a, b in factors:
                a @ b

    return run


def forward(respond: Respond, x: Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            respond(x)

    return run


def both(respond: Respond, x: Tensor, weights: list[nn.Parameter]) -> Callable[[], Any]:
    def run() -> None:
        for weight in weights:
            weight.grad = None
        respond(x.detach().requires_grad_()).square().sum().backward()

    return run


def take_turns(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median CPU seconds of each, all of them once before and then in turns.

    With one thread CPU time is what a quiet machine would take; other work does not count.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            started = time.process_time()
            run()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd keeps for backward."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes.values())


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """How far resident memory grows while `run` runs; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(module: Any, x: Tensor, layer: DEQFixedPoint, turns: int) -> dict[str, Any]:
    """All figures of one workload."""
    weights = list(module.parameters())
    with torch.no_grad():
        solution: Solution = layer(x, return_solution=True)
        exact_layer = DEQFixedPoint(
            copy.deepcopy(module).double(),
            solver_fwd_tol=1e-10,
            solver_fwd_max_iter=300,
            on_failure="raise",
        )
        exact = exact_layer(x.double()).flatten(1)
        error = (solution.value.double().flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)
    iterated = not isinstance(module, DEQAdaTAPMeanFieldAttention)
    evaluations = int(solution.steps.max())
    contenders: dict[str, Respond] = {"ours": layer}
    start = module.initial_state(x)
    parts = [start] if isinstance(start, Tensor) else list(start)
    contenders["literal"] = lambda x: literal.response(literal.update(module, x), parts)[0]
    if iterated:
        for peer in PEERS:
            contenders[peer] = torchdeq_on_our_map(module, peer)
    for depth in (1, 6):
        contenders[f"explicit {depth}"] = explicit(x.shape[2], depth)
    times = {}
    for name, way in (("forward", forward), ("both", None)):
        runs = {
            who: way(respond, x) if way else both(respond, x, weights)
            for who, respond in contenders.items()
        }
        if iterated:
            runs["floor"] = products(module, x, evaluations)
        times[name] = take_turns(runs, turns)
    run = both(layer, x, weights)
    return {
        "seconds": times,
        "evaluations": evaluations,
        "residual": solution.residual.max().item(),
        "error": error.max().item(),
        "saved bytes": saved_bytes(lambda: layer(x.detach().requires_grad_())),
        "peak bytes": peak_bytes(run),
    }


def row(name: str, size: tuple[int, ...], bar: tuple[float, ...], found: dict[str, Any]) -> str:
    """A line of the table of random weights."""

    def ratio(way: str, rival: str) -> str:
        seconds = found["seconds"][way]
        return f"{seconds[rival] / seconds['ours']:.1f}" if rival in seconds else "–"

    def peer(way: str) -> str:
        seconds = found["seconds"][way]
        rivals = [seconds[p] for p in PEERS if p in seconds]
        return f"{min(rivals) / seconds['ours']:.1f}" if rivals else "–"

    peak = found["peak bytes"]
    cells = [
        name,
        ", ".join(map(str, size)),
        f"{ratio('forward', 'literal')} ({bar[0]:g})",
        f"{ratio('both', 'literal')} ({bar[1]:g})",
        f"{peer('forward')}, {peer('both')}",
        f"{ratio('both', 'explicit 1')}, {ratio('both', 'explicit 6')}",
        ratio("forward", "floor"),
        str(found["evaluations"]),
        f"{found['residual']:.0e}",
        f"{found['error']:.0e}",
        f"{found['saved bytes'] / 1e6:.1f}",
        "–" if peak is None else f"{peak / 1e6:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| layer | B, N, d | literal / ours, forward (bar) | literal / ours, both (bar) "
    "| TorchDEQ / ours, forward, both | explicit 1, 6 layers / ours, both | floor / ours "
    "| evaluations | residual | error | saved, MB | peak, MB |\n" + "|---" * 12 + "|"
)


def trained(kind: str, folder: Path, turns: int) -> str:
    """TorchDEQ's best over ours on the first block of a trained model: lines of a table."""
    run = Run(folder)
    recipe: Any = load_recipe(run)
    data = recipe.load()
    model = recipe.model(len(data.vocabulary) if kind == "shakespeare" else data).eval()
    run.load_weights(model)
    with torch.no_grad():
        if kind == "shakespeare":
            x = model.fields(windows(data.validation, recipe.length)[0][: recipe.batch_size])
        else:
            x = model.fields(model.sites(data.test.images[:60]))
    module = model.blocks[0].fun
    weights = list(module.parameters())
    from_input = kind == "shakespeare"
    lines = []
    for tol in (1e-2, 1e-4):
        layer = DEQFixedPoint(
            module, initial_state="input" if from_input else "zeros", on_failure="ignore",
            solver_fwd_tol=tol, solver_fwd_max_iter=200,
            solver_bwd_tol=tol, solver_bwd_max_iter=200,
        )  # fmt: skip
        contenders: dict[str, Respond] = {"ours": layer}
        for peer in PEERS:
            contenders[peer] = torchdeq_on_our_map(module, peer, tol, from_input)
        seconds = take_turns(
            {who: both(respond, x, weights) for who, respond in contenders.items()}, turns
        )
        best = min(PEERS, key=seconds.__getitem__)
        solution = layer(x, return_solution=True)
        lines.append(
            f"| {kind} | {tol:g} | {seconds[best] / seconds['ours']:.1f} ({best}) "
            f"| {int(solution.steps.max())} | {solution.residual.max().item():.0e} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--vit", type=Path, help="a run of mnist-vit")
    parser.add_argument("--shakespeare", type=Path, help="a run of shakespeare")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    results, lines = [], []
    for workload in WORKLOADS:
        torch.manual_seed(0)
        module: Any = workload.make()
        batch, sites, dim = workload.size
        x = torch.randn(batch, sites, dim) / dim**0.5
        found = measure(module, x, DEQFixedPoint(module), flags.turns)
        results.append({"name": workload.name, "size": workload.size, **found})
        lines.append(row(workload.name, workload.size, workload.bar, found))
        print(lines[-1], flush=True)
    text = (
        f"{provenance()}, float32, one thread, median of {flags.turns} turns.\n\n"
        "The layer with its defaults beside literal equations under TorchDEQ's Anderson, the best "
        "of TorchDEQ's solvers on our own update map, explicit transformer blocks, and the bare "
        "matrix products of its evaluations (*floor*: the part of the forward time that is "
        "them). `benchmarks/speed.py` says what each is; `docs/benchmarks.json` has the "
        "seconds. Bars are those we set ourselves; where a figure is below, it is missed. CUDA "
        "was not measured.\n\n" + "\n".join([HEAD, *lines])
    )
    write_section(flags.out, "Speed", text)
    flags.out.with_suffix(".json").write_text(
        json.dumps({"provenance": provenance(), "threads": 1, "results": results}, indent=1) + "\n"
    )
    runs = [(kind, getattr(flags, kind)) for kind in ("vit", "shakespeare")]
    if any(folder for _, folder in runs):
        table = "| model | tolerance | TorchDEQ's best / ours, both | evaluations | residual |\n"
        table += "|---|---|---|---|---|\n"
        table += "\n".join(trained(kind, folder, flags.turns) for kind, folder in runs if folder)
        write_section(
            flags.out,
            "Speed with trained weights",
            f"{provenance()}, one thread.\n\nFirst block of trained models, forward and backward, "
            "beside TorchDEQ's solvers on the same update map, at the same tolerance.\n\n" + table,
        )


if __name__ == "__main__":
    main()
