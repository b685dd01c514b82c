"""The equations of the attention modules written down straight: the rival of `benchmarks.speed`.

Every step computes everything anew from the raw parameters (couplings, masks, queries and keys, the
Onsager term), and TorchDEQ's Anderson iterates it with m = 5, 30 steps and a relative tolerance of
1e-4, forward and backward: the way of the project of 2021. That project made the mask of J_ii = 0
as large as the couplings; with `broadcast` it is N × N, which is kinder to the rival. The functions
take the module whose weights they share, so that both sides solve the same system.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchdeq import get_deq

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.attention._parts import FeedForward

Update = Callable[[list[Tensor]], list[Tensor]]


def update(module: torch.nn.Module, x: Tensor, broadcast: bool = False) -> Update:
    """The update of `module` driven by `x`, on a list of state elements."""
    if isinstance(module, DEQMeanFieldAttention):
        return lambda z: [_mean_field(module, z[0], x, broadcast)]
    if isinstance(module, DEQVanillaSoftmaxAttention):
        return lambda z: [_softmax(module, z[0], x)]
    if isinstance(module, DEQAdaTAPMeanFieldAttention):
        return lambda z: _adaptive_tap(module, *z, x, broadcast)
    raise TypeError(f"no literal equations for {type(module).__name__}")


def response(update: Update, start: list[Tensor], solver: str = "anderson") -> list[Tensor]:
    """The fixed point by TorchDEQ, with an implicit gradient where gradients are enabled."""
    deq = get_deq(
        f_solver=solver, b_solver=solver, f_max_iter=30, b_max_iter=30,
        f_tol=1e-4, b_tol=1e-4, f_stop_mode="rel", b_stop_mode="rel", ift=True,
    )  # fmt: skip
    deq.train(torch.is_grad_enabled())
    # TorchDEQ takes the list's elements as arguments.
    found, _ = deq(lambda *z: update(list(z)), start, solver_kwargs={})
    return list(found[-1])


def _weight(module: DEQMeanFieldAttention | DEQAdaTAPMeanFieldAttention, broadcast: bool) -> Tensor:
    weight = module._weight
    if module.weight_sym_internal:
        weight = 0.5 * (weight + weight.transpose(-1, -2))
    if module.weight_sym_sites:
        weight = 0.5 * (weight + weight.transpose(0, 1))
    sites, dim = weight.shape[1:3]
    same = torch.eye(sites, dtype=weight.dtype, device=weight.device)
    if broadcast:
        return weight * (1 - same)[:, :, None, None]
    same = same.repeat(dim * dim, 1, 1).view(dim, dim, sites, sites).permute(2, 3, 0, 1)
    return weight * (1 - same)


def _correction(f: FeedForward, z: Tensor) -> Tensor:
    return f.contract(F.gelu(f.expand(z)))


def _mean_field(module: DEQMeanFieldAttention, z: Tensor, x: Tensor, broadcast: bool) -> Tensor:
    field = torch.einsum("ijcd,bjd->bic", _weight(module, broadcast), z)
    assert module.correction is not None
    return field - _correction(module.correction, z) + x


def _softmax(module: DEQVanillaSoftmaxAttention, z: Tensor, x: Tensor) -> Tensor:
    batch, sites, dim = x.shape

    def heads(t: Tensor) -> Tensor:
        return t.view(batch, sites, module.heads, -1).transpose(1, 2)

    q, k = heads(module.to_q(x)), heads(module.to_k(x))
    couplings = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * module.scale, dim=-1)
    pooled = torch.einsum("bhij,bhjd->bhid", couplings, heads(z))
    field = module.to_out(pooled.transpose(1, 2).reshape(batch, sites, dim))
    assert module.correction is not None
    return field - _correction(module.correction, z) + x


def _adaptive_tap(
    module: DEQAdaTAPMeanFieldAttention, z: Tensor, v: Tensor, x: Tensor, broadcast: bool
) -> list[Tensor]:
    batch, sites, dim = x.shape
    weight, prior = _weight(module, broadcast), module.spin_prior_inv_var
    field = x + torch.einsum("ijcd,bjd->bic", weight, z) - torch.einsum("bicd,bid->bic", v, z)
    covariance = torch.linalg.inv(prior - v)
    mean = torch.einsum("bicd,bid->bic", covariance, field)
    total = v + torch.linalg.inv(covariance)
    operator = -weight.expand(batch, -1, -1, -1, -1).clone()
    index = torch.arange(sites, device=x.device)
    operator[:, index, index] = total
    operator = operator.permute(0, 1, 3, 2, 4).reshape(batch, sites * dim, sites * dim)
    chi = torch.linalg.inv(operator).view(batch, sites, dim, sites, dim)
    own = chi[:, index, :, index].transpose(0, 1)
    return [mean, total - torch.linalg.inv(own)]
