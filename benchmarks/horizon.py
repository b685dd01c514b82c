"""MNIST: a trained vision transformer as explicit networks of every depth, and at equilibrium.

    python examples/mnist.py --data DATA --seed 0 --out FOLDER
    python -m benchmarks.horizon FOLDER --data DATA

prints the table of relaxation horizons in docs/results.md, over the 10,000 test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from deep_implicit_attention.models import DeepImplicitAttentionViT
from deep_implicit_attention.training import Split, mnist

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
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    model = DeepImplicitAttentionViT.from_pretrained(flags.folder)
    test = mnist(flags.data, 1 / 12, 0).test
    print("| steps | accuracy | loss | median residual | largest residual |\n|---|---|---|---|---|")
    for steps in HORIZONS:
        print(row(model, test, steps), flush=True)


if __name__ == "__main__":
    main()
