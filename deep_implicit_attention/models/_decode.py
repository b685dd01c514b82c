"""Prompts of different lengths, and the next token from its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..deq._state import full_precision
from ..solvers._validate import check_count, check_integer, check_number


def left_pad(prompts: Sequence[Sequence[int] | Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts as one batch that ends together: ids `(B, T)` and a mask, True = token.

    Shorter ones begin with the id `pad`, which the mask hides.

    Raises:
        ValueError: without prompts, or for one that is empty or not a sequence of integers.
    """
    rows = []
    for number, prompt in enumerate(prompts):
        try:
            rows.append(torch.as_tensor(prompt))
        except (TypeError, ValueError, RuntimeError) as error:  # the last for None
            raise ValueError(
                f"prompt {number} must be a sequence of ids, got {prompt!r}"
            ) from error
    if not rows:
        raise ValueError("prompts must hold at least one prompt")
    for number, row in enumerate(rows):
        whole = not (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool)
        if row.dim() != 1 or not len(row) or not whole:
            raise ValueError(f"prompt {number} must be a sequence of at least one id, got {row}")
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = True
    return ids, mask


def check_left_padding(mask: Tensor) -> None:
    """Raise unless every row of a boolean mask is padding, then at least one token."""
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError(
            "mask must be left padding, False then True in every row with the last True: prompts "
            "of different lengths end together (see left_pad)"
        )


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raise for settings of `sample` that are out of range."""
    check_count("max_new_tokens", max_new_tokens)
    check_number("temperature", temperature, minimum=0.0)
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None:
        check_number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def stop_ids(stop: int | Sequence[int], num_tokens: int, like: Tensor) -> Tensor:
    """The ids `stop` as a tensor; raises for what are no ids of tokens."""
    ids = list(stop) if isinstance(stop, Sequence) else [stop]
    for one in ids:
        check_integer("stop", one)
        if not 0 <= one < num_tokens:
            raise ValueError(f"stop must hold ids from 0 to {num_tokens - 1}, got {one}")
    return torch.tensor([int(one) for one in ids], dtype=like.dtype, device=like.device)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Ids `(B, 1)` from softmax(`logits` / temperature) over the `top_k` likeliest, and of these
    over the fewest likeliest whose probabilities reach `top_p` together.

    The likeliest itself at temperature 0.

    Raises:
        FloatingPointError: for logits that are not finite.
    """
    if not math.isfinite(float(logits.detach().sum())) and not bool(logits.isfinite().all()):
        raise FloatingPointError(
            "the logits of the next token are not finite: look at the weights of the model"
        )
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1, keepdim=True)
    logits = full_precision(logits)
    # From the largest down, so that a small temperature makes none infinite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        # By their places, as several may be equal to the last.
        likeliest = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, *likeliest[::-1])
    if top_p is not None and top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        likelier = p.cumsum(dim=-1) - p  # the probability of those before it
        likelier[:, 0] = 0.0  # not what rounding leaves
        ordered = ordered.masked_fill(likelier >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, places, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
