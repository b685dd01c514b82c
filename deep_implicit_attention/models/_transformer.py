"""A causal language model whose blocks are equilibria of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import DEQVanillaSoftmaxAttention, DEQVectorSpinAttention
from ..attention._normalize import LayerNorm
from ..attention._rotary import ROTARY_BASE
from ..attention._softmax_couplings import check_key_mask
from ..deq import DEQModule, StateCache, spectral_radius
from ..deq._state import State
from ..solvers._validate import check_counts, check_number
from ._count import count_params
from ._decode import check_left_padding, check_sampling, sample, stop_ids
from ._equilibrium import (
    check_classes,
    check_integers,
    check_name,
    check_solutions,
    equilibrium,
    penalty_of,
    starts_of,
    value_of,
)
from ._positions import Positioned, sinusoids
from ._pretrained import Pretrained

_POSITIONS = ("learned", "sinusoidal", "rotary")
# The embeddings start small, so that the logits that share them do, and are scaled up to fields.
_START = 0.05
_FIELD_SCALE = 10.0

_ATTENTION: dict[str, Callable[..., DEQModule]] = {
    "softmax": partial(DEQVanillaSoftmaxAttention, 1, normalize=True, causal=True),
    "softmax-plain": partial(DEQVanillaSoftmaxAttention, 1, causal=True),
    "vector-spin": partial(DEQVectorSpinAttention, causal=True),
}


class DeepImplicitAttentionTransformer(Pretrained, Positioned):
    """Token ids → logits of the next token, by the response of a causal system of vector spins.

    1. Embeddings of token and position, brought to components of order one, are the field x_i on
       site i.
    2. `depth` blocks of causal attention, each solved to equilibrium; the magnetizations of one
       are the fields of the next.
    3. A LayerNorm and the transposed token embedding read the logits.

    With ``steps=K`` (here or in a call) the same weights are an explicit network, in which every
    block takes K steps from z = x; ``steps=1`` is a transformer's: attention (with the state in
    the place of the values) and feed-forward beside a residual.

    Ids are `(B, T)`, logits `(B, T, num_tokens)`, for any T up to `max_seq_len`.

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: longest sequence, and window of `generate`.
        dim: components of a site, divisible by `heads`.
        depth: number of blocks.
        heads: heads of the couplings.
        attention: ``"softmax"``, softmax couplings of the normalised x acting on the normalised
            state (`DEQVanillaSoftmaxAttention` with ``normalize=True``); ``"softmax-plain"``,
            the same without normalisation; ``"vector-spin"`` (`DEQVectorSpinAttention`, β = 1),
            which contracts whatever its weights.
        positions: ``"learned"`` or ``"sinusoidal"`` (added to x), or ``"rotary"`` (in the
            couplings only).
        rotary_base: of rotary positions: pairs of components turn by 1 to about 1 / base a site.
        dropout: of the components of x and, in every block, of what the sum over couplings and f
            add (of vector spins, f only), while training; drawn once for a solve.
        weight_norm: separate magnitude and direction for every weight that acts on x or z
            (`torch.nn.utils.parametrizations.weight_norm`), put together once for each solve.
        solver: ``"anderson"``, ``"broyden"``, ``"newton_krylov"`` or ``"picard"``.
        **options: options of `DEQFixedPoint` but for `adjoint` and `initial_state`; `adjoint` is
            an option of a call.

    Cost of an update of one block: O(B T² dim + B T dim²).
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        dim: int,
        depth: int = 1,
        heads: int = 4,
        attention: str = "softmax",
        positions: str = "learned",
        rotary_base: float = ROTARY_BASE,
        dropout: float = 0.0,
        weight_norm: bool = False,
        solver: str = "anderson",
        **options: Any,
    ) -> None:
        super().__init__()
        check_counts(
            num_tokens=num_tokens, max_seq_len=max_seq_len, dim=dim, depth=depth, heads=heads
        )
        check_number("dropout", dropout, minimum=0.0, below=1.0)
        check_name("attention", attention, tuple(_ATTENTION))
        check_name("positions", positions, _POSITIONS)
        self.num_tokens, self.max_seq_len, self.dim = num_tokens, max_seq_len, dim
        self.steps: int | None = options.get("steps")
        self.tokens = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.tokens.weight, std=_START)
        if positions == "learned":
            self.positions = nn.Parameter(torch.randn(max_seq_len, dim) * _START)
        elif positions == "sinusoidal":
            self.register_buffer("positions", self._sinusoids().to(self.tokens.weight), False)
        else:
            self.positions = None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            mechanism = _ATTENTION[attention](
                dim=dim,
                heads=heads,
                rotary=positions == "rotary",
                rotary_base=rotary_base,
                dropout=dropout,
            )
            self.blocks.append(equilibrium(mechanism, solver, weight_norm, options))
        self.norm = LayerNorm(dim)

    def fields(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The fields x `(B, T, dim)` that `ids` apply; positions count the tokens in `mask`."""
        self._check(ids, mask)
        if ids.shape[1] > self.max_seq_len:
            raise ValueError(
                f"ids must have at most max_seq_len = {self.max_seq_len} tokens, got {ids.shape[1]}"
            )
        return self._fields(ids, _positions(ids, mask))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        state: Sequence[Any] | None = None,
        return_solution: bool = False,
        **overrides: Any,
    ) -> Any:
        """Logits of the token after each position, `(B, T, num_tokens)`.

        Args:
            ids: `(B, T)`, int32 or int64.
            mask: boolean `(B, T)`, True = token; padding on either side changes nothing.
            state: where each block's relaxation starts: a state, or an earlier call's `Solution`,
                for each block.
            return_solution: return also the blocks' `Solution`s, as a tuple.
            **overrides: options of the blocks for this call: ``steps``, ``adjoint``,
                ``solver_fwd_tol``, ``measure``, ...

        Raises:
            TypeError, ValueError: for ids or a mask of the wrong kind, shape or range.
        """
        x = self.fields(ids, mask)
        answers = []
        for block, start in zip(self.blocks, starts_of(state, self.blocks), strict=True):
            options = {**overrides, "state": start, "return_solution": return_solution}
            answers.append(block(x, *_given(mask), **options))
            x = value_of(answers[-1])
        logits = self._logits(x)
        return (logits, tuple(answers)) if return_solution else logits

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        top_p: float | None = None,
        stop: int | Sequence[int] | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        cache: bool = True,
        **overrides: Any,
    ) -> Tensor:
        """`ids` `(B, T)` continued, `(B, T + max_new_tokens)`, or shorter with `stop`.

        The equilibrium of what has been said does not depend on what comes next, so each new token
        costs the solve of one site against the cached states of the others, O(t). Beyond
        `max_seq_len` the window slides, positions change, and everything is solved anew.

        Args:
            ids: prompts of one length; for others see `left_pad`.
            max_new_tokens: tokens to add.
            temperature: of the softmax that is drawn from; 0 takes the likeliest.
            top_k: draw from the likeliest k only.
            top_p: draw from the fewest likeliest whose probabilities reach this together (Holtzman
                et al. 2020, arXiv:1904.09751); of the `top_k` likeliest, if both are given.
            stop: ids of tokens that end a text. A row that has said one repeats it, until all rows
                have or `max_new_tokens` are added.
            mask: boolean `(B, T)`, False at the left padding of shorter prompts, each of which is
                continued as it would be alone.
            generator: of the draws.
            cache: False solves for all sites at every token. So does a fixed number of steps, which
                would need the states of the prefix at every step.
            **overrides: options of the blocks.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        self._check(ids, mask)
        ends = None if stop is None else stop_ids(stop, self.num_tokens, ids)
        over = torch.zeros_like(ids[:, :1], dtype=torch.bool)
        for name in ("state", "return_solution"):
            if name in overrides:
                raise TypeError(f"generate solves many times and takes no {name!r}")
        if ids.shape[1] == 0:
            raise ValueError("ids must hold at least one token of every prompt")
        if mask is not None:
            check_left_padding(mask)
        cache = cache and overrides.get("steps", self.steps) is None
        caches: list[StateCache] = []
        before = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for _ in range(max_new_tokens):
                window = ids[:, -self.max_seq_len :]
                seen = None if mask is None else mask[:, -self.max_seq_len :]
                if not cache:
                    logits = self(window, seen, **overrides)[:, -1]
                else:
                    slid = ids.shape[1] > self.max_seq_len
                    caches = self._extend([] if slid else caches, window, seen, overrides)
                    last = caches[-1].solution.value[:, -1]
                    logits = self._logits(last.to(self.tokens.weight.dtype))
                said = sample(logits, temperature, top_k, top_p, generator).to(ids)
                ids = torch.cat([ids, torch.where(over, ids[:, -1:], said)], dim=1)
                if mask is not None:
                    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                if ends is not None:
                    over = torch.isin(ids[:, -1:], ends)
                    if bool(over.all()):
                        break
        finally:
            self.train(before[0][1])
            for module, training in before:  # parts may have been in another mode
                module.training = training
        return ids

    def _extend(
        self, caches: list[StateCache], ids: Tensor, mask: Tensor | None, overrides: dict[str, Any]
    ) -> list[StateCache]:
        """The blocks' caches with the last of `ids` in them; with all of them, if there are none.

        The new site of a block is driven by the new state of the block below.
        """
        at = _positions(ids, mask)
        if caches:
            ids, at = ids[:, -1:], at[..., -1:]
        x = self._fields(ids, at)
        extended = []
        for number, block in enumerate(self.blocks):
            if caches:
                cache = caches[number].append(x, **overrides)
            else:
                cache = StateCache.start(block, x, *_given(mask), **overrides)  # type: ignore
            x = cache.solution.value.to(x.dtype)
            extended.append(cache)
        return extended

    def maps(
        self, ids: Tensor, solutions: Sequence[Any], mask: Tensor | None = None
    ) -> list[tuple[Callable[[State], State], Tensor]]:
        """Each block's update z ↦ F(z; x) and its equilibrium, for the diagnostics of `deq`.

        `solutions` are those that ``forward(ids, mask, return_solution=True)`` returned. Costs
        no solve. Dropout is drawn anew.
        """
        return [
            (block.map(x, *_given(mask)), z) for block, x, z in self._driven(ids, solutions, mask)
        ]

    def couplings(
        self, ids: Tensor, solutions: Sequence[Any], mask: Tensor | None = None
    ) -> Tensor:
        """J_ij of every block and head, `(depth, B, heads, T, T)`, for looking."""
        driven = self._driven(ids, solutions, mask)
        return torch.stack([block.fun.couplings(x, mask) for block, x, _ in driven])

    def _driven(
        self, ids: Tensor, solutions: Sequence[Any], mask: Tensor | None
    ) -> list[tuple[Any, Tensor, Tensor]]:
        """Each block, the fields that drive it, and its equilibrium."""
        states = [value_of(part) for part in check_solutions(solutions, len(self.blocks))]
        fields = [self.fields(ids, mask), *states[:-1]]
        return list(zip(self.blocks, fields, states, strict=True))

    def spectral_radius(
        self, ids: Tensor, solutions: Sequence[Any], mask: Tensor | None = None
    ) -> Tensor:
        """Spectral radius of ∂F/∂z of each block, `(depth, B)`: iteration contracts below 1."""
        pairs = self.maps(ids, solutions, mask)
        return torch.stack([spectral_radius(f, z) for f, z in pairs])

    def jacobian_penalty(
        self,
        ids: Tensor,
        solutions: Sequence[Any],
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean over samples and blocks of ‖∂F/∂z‖_F² per component: a term for the loss.

        Hutchinson's estimate with one vector (see `deq.jacobian_penalty`). Padding has no
        components.
        """
        maps = self.maps(ids, solutions, mask)
        if mask is None:
            return penalty_of(maps, generator)
        return penalty_of(maps, generator, mask.sum(dim=1).clamp_min(1) / mask.shape[1])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token; targets of −100 do not count.

        Raises:
            TypeError: for targets that are no integers.
            ValueError: for targets of another shape than the ids, or that are no tokens.
        """
        check_integers("targets", targets)
        if logits.shape[:-1] != targets.shape:
            raise ValueError(
                f"targets must have shape {tuple(logits.shape[:-1])} as the logits do, got "
                f"{tuple(targets.shape)}"
            )
        check_classes("targets", targets, logits.shape[-1])
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long())

    def count_params(self) -> int:
        """Number of parameters; the tied embedding counts once."""
        return count_params(self)

    def _fields(self, ids: Tensor, at: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions[at]
        return self.dropout(x * _FIELD_SCALE)

    def _sinusoids(self) -> Tensor:
        return sinusoids(self.max_seq_len, self.dim) / _FIELD_SCALE

    def _logits(self, z: Tensor) -> Tensor:
        return F.linear(self.norm(z), self.tokens.weight)

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        """Raise unless ids and mask are what this model takes."""
        check_integers("ids", ids)
        if ids.dim() != 2:
            raise ValueError(f"ids must have shape (batch, tokens), got {tuple(ids.shape)}")
        # A compiler cannot branch on data, and on the meta device there is none.
        if not (torch.compiler.is_compiling() or ids.is_meta) and ids.numel():
            low, high = torch.stack(ids.aminmax()).tolist()  # an accelerator is asked once
            if low < 0 or high >= self.num_tokens:
                wrong = low if low < 0 else high
                raise ValueError(f"ids must be from 0 to {self.num_tokens - 1}, got {wrong}")
        check_key_mask(mask, ids)


def _positions(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The position of every token, `(T,)`, or `(B, T)` where `mask` leaves some out."""
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device)
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)


def _given(mask: Tensor | None) -> tuple[Tensor, ...]:
    return () if mask is None else (mask,)
