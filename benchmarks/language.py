"""Tiny Shakespeare: equilibrium models beside explicit ones, and at every horizon.

    python -m benchmarks.language train KIND FOLDER --data DATA --seed 0
    python -m benchmarks.language train explicit-gpt2 FOLDER --data DATA --rate 1e-3
    python -m benchmarks.language train equilibrium FOLDER --data DATA --learn 0
    python -m benchmarks.language horizons FOLDER --data DATA
    python -m benchmarks.language iterations
    python -m benchmarks.language memory
    python -m benchmarks.language generation

KIND is one of `MODELS`. The second line is nanoGPT's recipe; the third learns by the exact implicit
gradient, the others through the last steps. All models are trained by the loop of
`examples/shakespeare.py`, on one thread. Losses are over the whole validation split, in windows of
64 characters that do not overlap.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.explicit import ExplicitTransformer
from deep_implicit_attention.models import DeepImplicitAttentionTransformer
from deep_implicit_attention.training import shakespeare, windows
from examples.shakespeare import LENGTH, RATE, train

HORIZONS = (1, 2, 4, 8, 16)
# So many iterations are timed, with the numbers of steps drawn by this seed, whose mean is that of
# a long run.
ITERATIONS, TYPICAL = 20, 24
# Equilibrium when evaluated: to a relative residual of 1e-3, or what 100 steps reach.
EQUILIBRIUM = {"solver_fwd_tol": 1e-3, "solver_fwd_max_iter": 100, "on_failure": "ignore"}
ROTARY = {"positions": "rotary", "rotary_base": 100.0}
SOLVER = {"solver": "picard", "on_failure": "ignore", "solver_fwd_tol": 1e-3,
          "solver_bwd_tol": 1e-2, "solver_bwd_max_iter": 20}  # fmt: skip
_equilibrium = partial(DeepImplicitAttentionTransformer, dim=128, depth=4, heads=4, **SOLVER)
# Each at most 0.81 million parameters.
MODELS: dict[str, Callable[..., Any]] = {
    "equilibrium": partial(_equilibrium, **ROTARY),
    "equilibrium-learned": _equilibrium,  # positions
    "equilibrium-two": partial(_equilibrium, depth=2, dim=176, heads=8, **ROTARY),
    "equilibrium-one": partial(_equilibrium, depth=1, dim=256, heads=16, **ROTARY),
    "explicit": partial(ExplicitTransformer, rotary_base=100.0),
    "explicit-wide": partial(ExplicitTransformer, rotary_base=100.0, start="wide"),
    "explicit-learned": ExplicitTransformer,
    "explicit-gpt2": partial(ExplicitTransformer, start="gpt2"),  # nanoGPT
    "explicit-gpt2-rotary": partial(ExplicitTransformer, start="gpt2", rotary_base=100.0),
}


def make(kind: str, num_tokens: int = 65) -> Any:
    """The model of that name."""
    return MODELS[kind](num_tokens=num_tokens, max_seq_len=LENGTH)


@torch.no_grad()
def evaluate(model: Any, ids: Tensor, **overrides: Any) -> dict[str, float]:
    """Mean loss over `ids`; mean and worst relative residual, and mean steps, over windows.

    The residual of a window is that of the block where it is largest; steps are those of a block.
    """
    model.eval()
    inputs, targets = windows(ids, LENGTH)
    loss, residuals, steps = 0.0, [], []
    for some, following in zip(inputs.split(67), targets.split(67), strict=True):
        logits, solutions = model(some, return_solution=True, **overrides)
        loss += model.loss(logits, following).item() * len(some)
        if solutions is not None:
            residuals.append(torch.stack([s.residual for s in solutions]).amax(dim=0))
            steps.append(torch.stack([s.steps.float() for s in solutions]).mean(dim=0))
    found = {"loss": loss / len(inputs)}
    if residuals:
        found["residual"] = torch.cat(residuals).mean().item()
        found["worst"] = torch.cat(residuals).max().item()
        found["steps"] = torch.cat(steps).mean().item()
    return found


def run_training(flags: argparse.Namespace) -> None:
    """Train, save, and measure at the end."""
    text = shakespeare(flags.data)
    torch.manual_seed(flags.seed)
    model = make(flags.kind, len(text.vocabulary))
    steps = {"relax": flags.relax, "learn": flags.learn or None}
    if flags.kind.startswith("explicit"):
        steps = {"relax": 0, "learn": 1}
    started = time.process_time()
    train(model, text.train, flags.iterations, flags.seed, **steps, rate=flags.rate)
    seconds = (time.process_time() - started) / flags.iterations
    flags.folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), flags.folder / "weights.safetensors")
    found = evaluate(model, text.validation, **EQUILIBRIUM)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["cpu_seconds_per_iteration"] = seconds
    print(
        json.dumps({"kind": flags.kind, "seed": flags.seed, "rate": flags.rate, **steps, **found})
    )


def run_horizons(flags: argparse.Namespace) -> None:
    """The loss of trained weights at every horizon, and at equilibrium by each solver."""
    text = shakespeare(flags.data)
    model = make(flags.kind, len(text.vocabulary))
    model.load_state_dict(load_file(flags.folder / "weights.safetensors"))
    for steps in HORIZONS:
        found = evaluate(model, text.validation, steps=steps)
        print(f"| {steps} | {found['loss']:.4f} | {found['residual']:.1e} |", flush=True)
    found = evaluate(model, text.validation, **EQUILIBRIUM)
    print("equilibrium", json.dumps(found))


def run_iterations(flags: argparse.Namespace) -> None:
    """CPU milliseconds of a training iteration, over those of the explicit one, in turns."""
    ids = torch.randint(65, (100_000,), generator=torch.Generator().manual_seed(0))
    kinds = [kind for kind in MODELS if kind == "explicit" or not kind.startswith("explicit")]
    models = {kind: make(kind) for kind in kinds}
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(flags.turns):
        for kind, model in models.items():
            relax, learn = (0, 1) if kind == "explicit" else (2, 4)
            started = time.process_time()
            train(model, ids, ITERATIONS, TYPICAL, relax, learn)
            best[kind] = min(best[kind], (time.process_time() - started) / ITERATIONS)
    for kind, seconds in best.items():
        print(f"| {kind} | {1e3 * seconds:.0f} | {seconds / best['explicit']:.2f} |")


def run_memory(flags: argparse.Namespace) -> None:
    """Bytes that autograd saves for a training step, against the number of solver steps."""
    torch.manual_seed(0)
    model = make("equilibrium")
    ids = torch.randint(65, (12, LENGTH))
    for steps in (5, 10, 20, 40):
        limits = {"solver_fwd_tol": 0.0, "solver_fwd_max_iter": steps, "on_failure": "ignore"}
        print(steps, _saved(model, ids, **limits), _saved(model, ids, steps=steps))


def _saved(model: Any, ids: Tensor, **overrides: Any) -> int:
    """Bytes of distinct storages that autograd holds between forward and backward."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(ids, **overrides).square().mean()
    loss.backward()
    return sum(sizes.values())


@torch.no_grad()
def run_generation(flags: argparse.Namespace) -> None:
    """CPU milliseconds of one more token after t of them, cached and solved anew."""
    torch.manual_seed(0)
    model = DeepImplicitAttentionTransformer(num_tokens=65, max_seq_len=2049, dim=256).eval()
    print("| t | cached | anew |\n|---|---|---|")
    for t in (64, 128, 256, 512, 1024, 2048):
        ids = torch.randint(65, (1, t + 1))
        caches = model._extend([], ids[:, :t], None, {})
        cached = _milliseconds(lambda c=caches, i=ids: model._extend(c, i, None, {}), 20)
        anew = _milliseconds(lambda i=ids: model(i), 2)
        print(f"| {t} | {cached:.1f} | {anew:.0f} |", flush=True)


def _milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """The least CPU time of a call."""
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    trained = commands.add_parser("train")
    trained.add_argument("kind", choices=tuple(MODELS))
    trained.add_argument("--seed", type=int, default=0)
    trained.add_argument("--iterations", type=int, default=2000)
    trained.add_argument("--relax", type=int, default=2, help="most steps without gradient")
    trained.add_argument("--learn", type=int, default=4, help="steps with; 0 is equilibrium")
    trained.add_argument("--rate", type=float, default=RATE, help="largest learning rate")
    trained.set_defaults(run=run_training)
    horizons = commands.add_parser("horizons")
    horizons.add_argument("--kind", choices=tuple(MODELS), default="equilibrium")
    horizons.set_defaults(run=run_horizons)
    for command in (trained, horizons):
        command.add_argument("folder", type=Path)
        command.add_argument("--data", type=Path)
    iterations = commands.add_parser("iterations")
    iterations.add_argument("--turns", type=int, default=5)
    iterations.set_defaults(run=run_iterations)
    commands.add_parser("memory").set_defaults(run=run_memory)
    commands.add_parser("generation").set_defaults(run=run_generation)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    flags.run(flags)


if __name__ == "__main__":
    main()
