"""MNIST: a trained vision transformer as explicit networks of every depth, and at equilibrium.

    dia train mnist-vit --data-dir DATA --seed 0 --run-dir RUN
    python -m benchmarks.horizon RUN

prints the table of relaxation horizons in docs/results.md, over the 10,000 test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from deep_implicit_attention.models import DeepImplicitAttentionViT
from deep_implicit_attention.recipes import MnistViT, load_recipe
from deep_implicit_attention.training import Run, Split

HORIZONS = (1, 2, 4, 8, 16, None)


@torch.no_grad()
def row(model: DeepImplicitAttentionViT, split: Split, steps: int | None) -> str:
    """One line of the table; `steps` None is the equilibrium, to a relative residual of 1e-6."""
    right, loss, residuals, taken = 0, 0.0, [], 0.0
    for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True):
        logits, solutions = model(
            images, steps=steps, return_solution=True, solver_fwd_tol=1e-6, solver_fwd_max_iter=100
        )
        right += int((logits.argmax(dim=1) == labels).sum())
        loss += model.loss(logits, labels).item() * len(labels)
        residuals.append(torch.stack([solution.residual for solution in solutions]).amax(dim=0))
        taken += sum(solution.steps.float().sum().item() for solution in solutions)
    every = torch.cat(residuals)
    name = f"equilibrium ({taken / len(split):.1f} solver steps)" if steps is None else str(steps)
    return (
        f"| {name} | {right / len(split):.2%} | {loss / len(split):.4f} "
        f"| {every.median():.1e} | {every.max():.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a finished run of mnist-vit")
    run = Run(parser.parse_args().folder)
    recipe = load_recipe(run)
    if not isinstance(recipe, MnistViT):
        parser.error(f"{run.folder} is not a run of mnist-vit")
    torch.set_num_threads(1)
    data = recipe.load()
    model = recipe.model(data).eval()
    run.load_weights(model)
    print("| steps | accuracy | loss | median residual | largest residual |\n|---|---|---|---|---|")
    for steps in HORIZONS:
        print(row(model, data.test, steps), flush=True)


if __name__ == "__main__":
    main()
