"""The explicit transformer that the language model is held against."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deep_implicit_attention.attention._rotary import rotate


class ExplicitTransformer(nn.Module):
    """`depth` pre-normalised blocks of attention and feed-forward, head tied.

    The default size is that of nanoGPT's small CPU baseline, 0.80 M parameters. Positions are
    learned, or rotary with `rotary_base`. Weights start at the scale of a Linear's own and
    embeddings with `embedding_std` (``start="linear"``); so, but hidden units with unit deviation,
    as in the equilibrium model (``"wide"``); or as GPT-2's, std 0.02 and no biases (``"gpt2"``).
    What adds to the residual is smaller by √(2 depth) in each. It takes the options that the
    equilibrium model's training loop gives and has no use for them.
    """

    def __init__(
        self,
        num_tokens: int,
        max_seq_len: int,
        rotary_base: float | None = None,
        *,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        embedding_std: float = 0.05,
        start: Literal["linear", "wide", "gpt2"] = "linear",
    ) -> None:
        super().__init__()
        gpt2 = start == "gpt2"
        std = 0.02 if gpt2 else embedding_std
        self.tokens = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.tokens.weight, std=std)
        learned = rotary_base is None
        self.positions = nn.Parameter(torch.randn(max_seq_len, dim) * std) if learned else None
        self.blocks = nn.ModuleList(
            _Block(dim, depth, heads, rotary_base, not gpt2) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, bias=not gpt2)
        if start == "wide":
            with torch.no_grad():
                for block in self.blocks:
                    block.expand.weight.mul_(3**0.5)
        if gpt2:
            for block in self.blocks:
                for layer in block.inner:
                    nn.init.normal_(layer.weight, std=0.02)
                for layer in block.outer:
                    nn.init.normal_(layer.weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, ids: Tensor, **ignored: Any) -> Any:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return (logits, None) if ignored.get("return_solution") else logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _Block(nn.Module):
    def __init__(
        self, dim: int, depth: int, heads: int, rotary_base: float | None, bias: bool
    ) -> None:
        super().__init__()
        self.heads, self.rotary_base = heads, rotary_base
        self.norms = nn.ModuleList(nn.LayerNorm(dim, bias=bias) for _ in range(2))
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=bias)
        self.expand = nn.Linear(dim, 4 * dim, bias=bias)
        self.contract = nn.Linear(4 * dim, dim, bias=bias)
        self.inner, self.outer = (self.to_qkv, self.expand), (self.to_out, self.contract)
        with torch.no_grad():
            for layer in self.outer:  # what adds to the residual
                layer.weight.div_((2 * depth) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        batch, sites, dim = x.shape
        qkv = self.to_qkv(self.norms[0](x)).view(batch, sites, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.rotary_base is not None:
            q, k = rotate(q, self.rotary_base), rotate(k, self.rotary_base)
        pooled = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_out(pooled.transpose(1, 2).reshape(batch, sites, dim))
        return x + self.contract(F.gelu(self.expand(self.norms[1](x))))
