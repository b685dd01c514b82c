"""Products with matrices of weights, which are most of the arithmetic of an update.

On the host torch takes float32 products to a BLAS that uses half of a processor of AMD with AVX-512
(110 GFLOP/s of 250), while oneDNN, which torch also ships and calls in compiled code, uses it well;
without AVX-512 it pays only for weights that outgrow the caches, and on a processor of Intel, whose
own BLAS it is, for large products. So such products go there, and those of their derivatives of any
order; other types and devices, compiled and functionally transformed code take the plain path.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..deq._watched import watched
from ._memory import empty


def _of_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return any("GenuineIntel" in line for line in file)
    except OSError:
        return "Intel" in platform.processor()


_WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
# With AVX-512, and a BLAS made for the processor: it is the quicker for small products and for
# weights in columns, and rows may lie as they like.
_OWN = _WIDE and _of_intel() and torch.backends.mkl.is_available()
# Below these many multiplications the way to oneDNN takes longer than it saves.
_SMALL = 1 << (23 if _OWN else 17)
# Without AVX-512, below this many weights.
_CACHED = 1 << 22
# In place a function of fewer numbers than these is no faster.
_CACHED_STATES = 1 << 18
# Matrices of so many weights are worth a copy that lies across, for all products of a solve.
_TURNED = 1 << 15
# With fewer results a row than these and at least so many rows, the transposed product takes 0.4 to
# 0.9 of the time.
_SLIM = 12
_MANY = 512
# A gradient by weights this narrow is the faster by the BLAS.
_NARROW = 64
# Rows of so many bytes, or of a multiple, compete for the same lines of the cache; from this many
# on, and with so many factors, it takes longer than making them rows that do not.
_ALIASED = 4096
_TALL = 1024
_FACTORS = 8
# So many bytes of hidden units are still in the cache when the next product reads them; a network
# with more of them than some such parts, at least so many rows a part, and so many components a
# row, is computed in parts.
_PART = 1 << 20
_PARTS = 4
_PART_ROWS = 512
_PART_COMPONENTS = 32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for `x` `(..., k)`, `weight` `(n, k)` and `bias` `(n,)`.

    `x` is narrowed to a narrow `weight`, and so is the result; without a bias a GPU returns sums in
    float32. There are no gradients then.
    """
    if weight.dtype == torch.bfloat16:
        return _product(x.to(weight.dtype), weight, bias)
    if not _fast(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def for_transposed(weight: Tensor, rows: int) -> Tensor:
    """`weight` for several products `linear(x, weight.mT)` with `x` of so many rows.

    With gaps between rows that would compete in the cache (measured: with a weight of 1024 × 1024 a
    product takes 0.75 of the time, the copy a third of one).
    """
    aliased = weight.shape[1] * weight.element_size() % _ALIASED == 0 and weight.is_contiguous()
    tall = len(weight) >= _TALL and rows >= _FACTORS
    if not (aliased and tall and weight.is_cpu) or _OWN or _fast(weight, weight) or watched(weight):
        return weight
    memory = empty(len(weight), weight.shape[1] + 8, like=weight)
    return memory[:, : weight.shape[1]].copy_(weight)


def turned(weight: Tensor) -> Tensor | None:
    """Wᵀ in rows, for `less` with W in a solve; None where it is not known to pay.

    An Intel processor's own BLAS takes it in three quarters of the time (768 × 512 times 512 × 128
    with the sum: 0.9 ms, and 1.25 by oneDNN with the sum after it; the copy 0.2).
    """
    worth = _OWN and weight.is_cpu and weight.dtype == torch.float32 and weight.numel() >= _TURNED
    if not worth or torch.compiler.is_compiling() or watched(weight):
        return None
    return weight.detach().mT.contiguous()


def less(field: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """`field` − x R for R in `rows`, in one pass over `field`, which nobody else holds."""
    flat = field.view(-1, field.shape[-1])
    flat.addmm_(x.reshape(-1, x.shape[-1]), rows, alpha=-1)
    return field


def linear_of_few(x: Tensor, weight: Tensor, symmetric: bool) -> Tensor:
    """x Wᵀ for few rows x and W in rows, by the product that is the fastest.

    Mostly that is x W, if W is `symmetric`; for a large W and a few rows more than one it is W xᵀ
    (measured with 4 rows and 1024 × 1024: 0.6 to 0.8 of the time of the other two in float64, 0.8
    to 0.9 in float32).
    """
    if x.is_cpu and 1 < len(x) < _FACTORS and len(weight) >= _TALL:
        return (weight @ x.mT).mT.contiguous()
    return x @ (weight if symmetric else weight.mT)


def linear_term(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` for a term of a sum: rows of few numbers lie transposed in memory.

    The BLAS is slow at such rows, and where the transposed product comes faster by more than
    reading it across takes, that is what is returned.
    """
    if not _slim(x, weight) or _fast(x, weight, bias):
        return linear(x, weight, bias)
    product = (weight @ x.reshape(-1, x.shape[-1]).mT).mT.reshape(*x.shape[:-1], len(weight))
    return product if bias is None else product + bias


def linear_by_weight(g: Tensor, x: Tensor) -> Tensor:
    """The derivative `(n, k)` of `linear` by its weight, for that by its result `g` `(..., n)`."""
    rows, columns = g.reshape(-1, g.shape[-1]).mT, x.reshape(-1, x.shape[-1]).mT
    wide = min(len(rows), len(columns)) >= _NARROW
    return linear(rows, columns) if wide else rows @ columns.mT


def linear_by_bias(g: Tensor) -> Tensor:
    """The derivative `(n,)` of `linear` by its bias."""
    return g.reshape(-1, g.shape[-1]).sum(dim=0)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x Wᵀ + b), in one pass or in place where no gradient is wanted and it pays."""
    if weight.dtype == torch.bfloat16:
        return _product(x.to(weight.dtype), weight, bias, "gelu", "none")
    wanted = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or bias.requires_grad
    )
    if wanted:
        return F.gelu(linear(x, weight, bias))
    if _fast(x, weight, bias):
        return _product(x, weight, bias, "gelu", "none")
    hidden = F.linear(x, weight, bias)
    if hidden.numel() < _CACHED_STATES or watched(hidden):
        return F.gelu(hidden)
    return torch.ops.aten.gelu_(hidden)


def linear_times(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """(x Wᵀ) ∘ factor; in one pass, and without a gradient, by oneDNN and for a narrow `weight`."""
    narrow = weight.dtype == torch.bfloat16
    if (narrow and x.is_cpu) or _fast(x, weight):
        x = x.to(weight.dtype)
        return torch.ops.mkldnn._linear_pointwise.binary(x, factor, weight, None, "mul")
    product = linear(x, weight) if narrow else F.linear(x, weight)
    return product.mul_(factor) if _spare() else product * factor


def in_parts(network: Callable[..., Tensor], width: int, *states: Tensor) -> Tensor:
    """`network(*states)`, of each row by itself, in parts of rows where its hidden units are many.

    Those of a part, `width` a row, stay in the cache (measured: with 8192 rows of 64 components and
    256 hidden units the network takes 0.8 of the time).
    """
    x = states[0]
    # First of all: to a compiler a size that is looked at is no longer any size.
    if not _spare() or _WIDE or not x.is_cpu:
        return network(*states)
    each = width * x.element_size()
    rows, step = x.numel() // x.shape[-1], _PART // each
    many = rows * each >= _PARTS * _PART and step >= _PART_ROWS and x.shape[-1] >= _PART_COMPONENTS
    if not many or watched(*states):
        return network(*states)
    cut = zip(*(state.reshape(rows, -1).split(step) for state in states), strict=True)
    first = network(*next(cut))
    result = first.new_empty(rows, x.shape[-1])
    result[:step] = first
    for part, some in zip(result[step:].split(step), cut, strict=True):
        part.copy_(network(*some))
    return result.view(x.shape)


def plus(fresh: Tensor, other: Tensor, alpha: int = 1) -> Tensor:
    """`fresh` + alpha · `other`, over `fresh`, which nobody else holds, where that may be."""
    if _spare() and fresh.shape == other.shape and fresh.dtype == other.dtype:
        return fresh.add_(other, alpha=alpha)
    return torch.add(fresh, other, alpha=alpha)


def _spare() -> bool:
    """Whether fresh results may be written over: there is no graph, and nothing is transformed.

    Less is asked than by `watched`, since an operation in place may be intercepted as well.
    """
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def narrowed(context: Any) -> Any:
    """A tuple of weights in bfloat16, for updates far from the solution."""
    return type(context)(*(t if t is None else t.bfloat16() for t in context))


def sums(a: Tensor, b: Tensor) -> Tensor:
    """a b for batches of matrices, in float32 for narrow ones of a GPU, which adds up in it."""
    if a.is_cpu or a.dtype != torch.bfloat16:
        return a @ b
    found = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return found.view(*a.shape[:-1], b.shape[-1])


def narrow_pays(x: Tensor) -> bool:
    """Whether the processor, or NVIDIA's GPU, multiplies bfloat16 faster than float32."""
    if x.dtype != torch.float32 or watched(x):
        return False
    if x.is_cuda:
        return torch.version.hip is None and _gpu_has_bfloat16(x.device)
    return x.is_cpu and _has_onednn() and bool(torch.backends.mkldnn.enabled) and _has_bfloat16()


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _has_bfloat16() -> bool:
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked())


@functools.cache
def _gpu_has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, after: str = "none", how: str = ""
) -> Tensor:
    if not x.is_cpu:  # narrow, or it would not be here
        if bias is None:
            found = torch.mm(x.reshape(-1, x.shape[-1]), weight.mT, out_dtype=torch.float32)
            return found.view(*x.shape[:-1], len(weight))
        product = F.linear(x, weight, bias)
        return F.gelu(product) if after == "gelu" else product
    # oneDNN reads the numbers of a bias one after the other, wherever they are.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], how)


def _fast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN is there for this product and worth the way."""
    # In this order: most products of small states are small.
    if not _WIDE and weight.numel() < _CACHED:
        return False
    return (
        not torch.compiler.is_compiling()
        and (not _WIDE or x.numel() * len(weight) >= _SMALL)
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and not (watched(x, weight) if bias is None else watched(x, weight, bias))
        and (bias is None or bias.dtype == torch.float32)
        and _dense(weight)
        and (not _OWN or weight.stride(1) == 1)
        and _has_onednn()
        and bool(torch.backends.mkldnn.enabled)
    )


def _slim(x: Tensor, weight: Tensor) -> bool:
    """Whether there are few results a row, and rows that are worth a detour."""
    return (
        weight.shape[0] < _SLIM
        and not torch.compiler.is_compiling()
        and weight.dtype != torch.bfloat16
        and x.is_cpu
        and x.numel() >= _MANY * x.shape[-1]
    )


def _dense(weight: Tensor) -> bool:
    """Whether rows or columns follow each other: with gaps oneDNN is a thousand times slower."""
    return weight.stride() in ((weight.shape[1], 1), (1, weight.shape[0]))


class _Linear(torch.autograd.Function):
    """`linear` with its derivative by oneDNN too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = linear(g, weight.mT)
        if ctx.needs_input_grad[1]:
            by_weight = linear_by_weight(g, x)
        if ctx.needs_input_grad[2]:
            by_bias = linear_by_bias(g)
        return by_x, by_weight, by_bias
