"""A character-level language model of equilibrium attention, in a plain PyTorch loop."""

import argparse
import math
from pathlib import Path

import torch

from deep_implicit_attention.models import DeepImplicitAttentionTransformer
from deep_implicit_attention.training import random_batch, shakespeare, windows

BATCH, LENGTH, RATE, WARMUP = 12, 64, 1e-3, 100


# %% the loop
def train(model, ids, iterations, seed, relax=14, learn=4, penalty=0.1):
    """AdamW with warm-up and a cosine; `relax` steps towards equilibrium, `learn` with a graph."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99))
    for i in range(1, iterations + 1):
        cosine = math.cos(math.pi * max(0, i - WARMUP) / max(1, iterations - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(i / WARMUP, 0.55 + 0.45 * cosine)
        inputs, targets = random_batch(ids, LENGTH, BATCH, generator)
        with torch.no_grad():
            states = model(inputs, steps=relax, return_solution=True)[1] if relax else None
        logits, states = model(inputs, state=states, steps=learn, return_solution=True)
        loss = model.loss(logits, targets)
        extra = penalty * model.jacobian_penalty(inputs, states) if penalty else 0.0
        optimizer.zero_grad()
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if i % 100 == 0:
            print(f"iteration {i}: training loss {loss.item():.4f}", flush=True)


# %% the run
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of tinyshakespeare.txt; else download")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"))
    flags = parser.parse_args()
    text = shakespeare(flags.data)
    torch.manual_seed(flags.seed)
    model = DeepImplicitAttentionTransformer(
        num_tokens=len(text.vocabulary), max_seq_len=LENGTH, dim=256, heads=8, positions="rotary",
        solver="picard", solver_fwd_tol=1e-2, solver_fwd_max_iter=100,
    )  # fmt: skip
    train(model, text.train, flags.iterations, flags.seed)
    model.eval().save_pretrained(flags.out)
    with torch.no_grad():
        parts = zip(*(part.split(67) for part in windows(text.validation, LENGTH)), strict=True)
        losses = [model.loss(model(inputs), targets) for inputs, targets in parts]
    print(f"validation loss {torch.stack(losses).mean():.4f} nats")
    print(text.vocabulary.decode(model.generate(text.vocabulary.encode("\n")[None], 300)))
