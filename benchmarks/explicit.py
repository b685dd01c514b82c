"""The explicit transformer that the language model is held against: GPT-2's blocks, small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deep_implicit_attention.attention._rotary import rotate


class ExplicitTransformer(nn.Module):
    """`depth` pre-normalised blocks of attention and feed-forward, head tied.

    Positions are learned, or rotary as in the equilibrium model. The default is the size of
    nanoGPT's small CPU baseline, 0.80 M parameters. It takes the options that the equilibrium
    model's training loop gives and has no use for them.
    """

    def __init__(
        self,
        num_tokens: int,
        max_seq_len: int,
        rotary: bool = False,
        dim: int = 128,
        depth: int = 4,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, dim)
        self.positions = None if rotary else nn.Parameter(torch.randn(max_seq_len, dim) * 0.02)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(dim, depth, rotary) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, bias=False)

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
    def __init__(self, dim: int, depth: int, rotary: bool, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.norms = nn.ModuleList(nn.LayerNorm(dim, bias=False) for _ in range(2))
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.expand = nn.Linear(dim, 4 * dim, bias=False)
        self.contract = nn.Linear(4 * dim, dim, bias=False)
        for layer in (self.to_qkv, self.expand):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.to_out, self.contract):  # what adds to the residual
            nn.init.normal_(layer.weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        batch, sites, dim = x.shape
        qkv = self.to_qkv(self.norms[0](x)).view(batch, sites, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        pooled = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_out(pooled.transpose(1, 2).reshape(batch, sites, dim))
        return x + self.contract(F.gelu(self.expand(self.norms[1](x))))
