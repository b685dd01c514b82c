"""What the layers are held against, beside the literal equations of `benchmarks.literal`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchdeq import get_deq

from deep_implicit_attention.attention import (
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.attention._products import linear

from .timing import Respond, Run

PEERS = ("anderson", "broyden", "fixed_point_iter")


def over_ours(costs: dict[str, float]) -> float | None:
    """What the best of TorchDEQ's solvers costs over "ours"; None where there is no solver."""
    rivals = [costs[peer] for peer in PEERS if peer in costs]
    return min(rivals) / costs["ours"] if rivals else None


def torchdeq_on_our_map(
    module: Any,
    solver: str,
    tol: float = 1e-4,
    from_input: bool = False,
    seen: Callable[[], None] = lambda: None,
) -> Respond:
    """TorchDEQ on the update that `prepare` has made ready, with implicit gradients.

    `seen` is called at every evaluation.
    """
    deq = get_deq(
        f_solver=solver, b_solver=solver, f_max_iter=200, b_max_iter=200,
        f_tol=tol, b_tol=tol, f_stop_mode="rel", b_stop_mode="rel", ift=True,
    )  # fmt: skip

    def respond(x: Tensor) -> Tensor:
        deq.train(torch.is_grad_enabled())
        context = module.prepare(x)
        start = x.detach() if from_input else torch.zeros_like(x)

        def update(z: Tensor) -> Tensor:
            seen()
            return module.update(z, context)

        found, _ = deq(update, start, solver_kwargs={})
        return found[-1]

    return respond


def explicit(dim: int, depth: int) -> nn.Module:
    """Pre-normalised transformer blocks."""
    block = nn.TransformerEncoderLayer(
        dim, 4 if dim % 4 == 0 else 1, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


def products(module: Any, x: Tensor, evaluations: int) -> Run:
    """The bare matrix products of as many updates, each in the fastest way that the library has."""
    batch, sites, dim = x.shape
    factors: list[tuple[Tensor, Tensor]] = []
    batched: list[tuple[Tensor, Tensor]] = []
    if isinstance(module, DEQMeanFieldAttention):
        size = sites * dim
        factors.append((x.new_ones(batch, size), x.new_ones(size, size)))
    if isinstance(module, DEQVanillaSoftmaxAttention):
        heads = module.heads
        shape = batch, heads, dim // heads, sites
        batched.append((x.new_ones(*shape), x.new_ones(batch, heads, sites, sites)))
        factors.append((x, x.new_ones(dim, dim)))
    factors.append((x, x.new_ones(4 * dim, dim)))
    factors.append((x.new_ones(batch, sites, 4 * dim), x.new_ones(dim, 4 * dim)))

    def run() -> None:
        with torch.no_grad():
            for _ in range(evaluations):
                for a, b in batched:
                    a @ b
                for a, weight in factors:
                    linear(a, weight)

    return run
