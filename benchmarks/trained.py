"""Speed of the layers of trained models beside TorchDEQ's solvers on the same update maps.

    python -m benchmarks.trained --vit RUN --shakespeare RUN

RUN is a folder that `dia train mnist-vit` or `dia train shakespeare` has written; a row is left as
it is where its run is not given. `--title` keeps tables of several processors apart. Random initial
weights flatter solvers: trained couplings are stronger. Forward and backward through the first
block, on the data of the model's own test or validation set, at the same tolerance for all. The
floor is the bare matrix products of our evaluations, forward and backward, in float32: what a
program that needs as many hardly goes below.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deep_implicit_attention.attention._products import narrow_pays
from deep_implicit_attention.deq import DEQFixedPoint, Implicit
from deep_implicit_attention.recipes import load_recipe
from deep_implicit_attention.solvers import Solution, anderson
from deep_implicit_attention.training import Run, windows

from .page import command_line, machine, provenance, write_results, write_section
from .rivals import PEERS, products, torchdeq_on_our_map
from .timing import Respond, both, take_turns

TOLERANCES = (1e-2, 1e-3, 1e-4)
LIMIT = 200
TITLE = "Speed with trained weights"
HEAD = (
    "| model | tolerance | TorchDEQ's best / ours, both | TorchDEQ's best / floor "
    "| evaluations, forward + backward | without preconditioner, forward | residual |\n"
    + "|---" * 7
    + "|"
)


def block(kind: str, folder: Path) -> tuple[Any, Tensor]:
    """The first block's mechanism and the fields that drive it."""
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
    return model.blocks[0].fun, x


def measure(kind: str, folder: Path, turns: int) -> list[dict[str, Any]]:
    """Ours and TorchDEQ's at every tolerance."""
    module, x = block(kind, folder)
    weights = list(module.parameters())
    from_input = kind == "shakespeare"
    found = []
    for tol in TOLERANCES:
        layer = DEQFixedPoint(
            module, initial_state="input" if from_input else "zeros", on_failure="ignore",
            solver_fwd_tol=tol, solver_fwd_max_iter=LIMIT,
            solver_bwd_tol=tol, solver_bwd_max_iter=LIMIT,
        )  # fmt: skip
        contenders: dict[str, Respond] = {"ours": layer}
        for peer in PEERS:
            contenders[peer] = torchdeq_on_our_map(module, peer, tol, from_input)
        runs = {who: both(respond, x, weights) for who, respond in contenders.items()}
        with torch.no_grad():
            solution = layer(x, return_solution=True)
            plain = layer(x, return_solution=True, solver_fwd_preconditioner=None)
        steps = int(solution.steps.max()), _backward_steps(layer, x, tol)
        runs["floor"] = products(module, x, sum(steps))
        found.append(
            {
                "model": kind,
                "tolerance": tol,
                "seconds": take_turns(runs, turns),
                "evaluations": steps[0],
                "backward evaluations": steps[1],
                "plain evaluations": int(plain.steps.max()),
                "residual": solution.residual.max().item(),
            }
        )
        print(row(found[-1]), flush=True)
    return found


def _backward_steps(layer: DEQFixedPoint, x: Tensor, tol: float) -> int:
    """Products with the transposed Jacobian that a backward pass of the layer takes."""
    seen: list[Solution] = []
    own = layer._settings.adjoint.options
    adjoint = Implicit(anderson, tol=tol, max_iter=LIMIT, observe=seen.append, **own)
    layer(x.detach().requires_grad_(), adjoint=adjoint).square().sum().backward()
    return int(seen[0].steps.max())


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    seconds = found["seconds"]
    best = min(PEERS, key=seconds.__getitem__)
    return (
        f"| {found['model']} | {found['tolerance']:g} | {seconds[best] / seconds['ours']:.1f} "
        f"({best}) | {seconds[best] / seconds['floor']:.1f} "
        f"| {found['evaluations']} + {found['backward evaluations']} "
        f"| {found['plain evaluations']} | {found['residual']:.0e} |"
    )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--vit", type=Path, help="a run of mnist-vit")
    parser.add_argument("--shakespeare", type=Path, help="a run of shakespeare")
    parser.add_argument("--title", default=TITLE, help="heading of the table")
    flags = parser.parse_args()
    title = flags.title
    runs = {"vit": flags.vit, "shakespeare": flags.shakespeare}
    if not any(runs.values()):
        parser.error("give --vit RUN, --shakespeare RUN or both")
    torch.set_num_threads(1)
    path = flags.out.with_suffix(".json")
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = [r for r in before.get(title, {}).get("results", []) if not runs[r["model"]]]
    for kind, folder in runs.items():
        if folder:
            kept += measure(kind, folder, flags.turns)
    kept.sort(key=lambda found: (list(runs).index(found["model"]), -found["tolerance"]))
    command = "python -m benchmarks.trained --vit RUN --shakespeare RUN"
    command += "" if title == TITLE else f' --title "{title}"'
    write_section(
        flags.out,
        title,
        f"{provenance(command)}, median of {flags.turns} turns. {machine()}.\n\n"
        "The first block of trained models (`dia train mnist-vit`, `dia train shakespeare`), "
        "forward and backward, beside TorchDEQ's solvers on the same update map, and the floor: "
        "the bare matrix products of our evaluations. Layers with "
        "normalised softmax couplings have no preconditioner; on processors with fast bfloat16 "
        f"({'as' if narrow_pays(torch.ones(1)) else 'not'} this one) ours begins in it, and "
        "evaluations count both kinds.\n\n" + "\n".join([HEAD, *map(row, kept)]),
    )
    write_results(flags.out, title, kept, command)


if __name__ == "__main__":
    main()
