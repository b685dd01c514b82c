"""Padding is no part of what is told about a solution: each prompt is as it would be alone."""

from __future__ import annotations

import torch

from deep_implicit_attention.models import left_pad

from .conftest import build

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


def test_the_maps_of_padded_prompts_rest_at_their_equilibria() -> None:
    model = build().eval()
    ids, mask = left_pad(PROMPTS)
    with torch.no_grad():
        _, solutions = model(ids, mask, return_solution=True)
        for f, z in model.maps(ids, solutions, mask):
            torch.testing.assert_close(f(z), z, rtol=0, atol=1e-8)


def test_the_penalty_of_a_batch_is_the_mean_of_those_of_its_prompts() -> None:
    """By the vectors that are drawn for the batch, of which each prompt has those of its sites."""
    model = build().eval()
    ids, mask = left_pad(PROMPTS)
    _, solutions = model(ids, mask, return_solution=True)
    random = torch.Generator().manual_seed(0)
    found = model.jacobian_penalty(ids, solutions, mask, generator=random)
    random.manual_seed(0)
    drawn = [torch.randn(3, 5 * 16, dtype=torch.float64, generator=random) for _ in range(2)]
    parts = []
    for row, prompt in enumerate(PROMPTS):
        alone = torch.tensor([prompt])
        pairs = model.maps(alone, model(alone, return_solution=True)[1])
        for (f, z), vectors in zip(pairs, drawn, strict=True):
            z = z.detach().requires_grad_()
            v = vectors[row].view(1, 5, 16)[:, -len(prompt) :]
            (product,) = torch.autograd.grad(f(z), z, v)
            parts.append(product.square().mean())
    torch.testing.assert_close(found, torch.stack(parts).mean(), rtol=1e-6, atol=0)
