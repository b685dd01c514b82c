"""A character-level language model of equilibrium attention, in a plain PyTorch loop."""

import argparse
import math
from pathlib import Path

import torch

from deep_implicit_attention.models import DeepImplicitAttentionTransformer
from deep_implicit_attention.training import measure_language, random_batch, shakespeare, windows

BATCH, LENGTH, RATE, WARMUP = 12, 64, 2e-3, 100


# %% the loop
def train(model, ids, iterations, seed, relax=2, learn=4, rate=RATE):
    """AdamW, warm-up, cosine; up to `relax` steps towards equilibrium, `learn` with a graph."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [[p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False)]
    groups = [{"params": p, "weight_decay": w} for p, w in zip(kinds, (0.1, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99))
    for i in range(1, iterations + 1):
        cosine = math.cos(math.pi * max(0, i - WARMUP) / max(1, iterations - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(i / WARMUP, 0.55 + 0.45 * cosine)
        inputs, targets = random_batch(ids, LENGTH, BATCH, generator)
        drawn = int(torch.randint(relax + 1, (1,), generator=generator))
        states = None
        if drawn:
            with torch.no_grad():
                _, states = model(inputs, steps=drawn, return_solution=True, measure=False)
        loss = model.loss(model(inputs, state=states, steps=learn), targets)
        optimizer.zero_grad()
        loss.backward()
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
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare-loop"))
    flags = parser.parse_args()
    text = shakespeare(flags.data)
    torch.manual_seed(flags.seed)
    model = DeepImplicitAttentionTransformer(
        num_tokens=len(text.vocabulary), max_seq_len=LENGTH, dim=128, depth=4, heads=4,
        positions="rotary", rotary_base=100.0, solver="picard", solver_fwd_tol=1e-3,
    )  # fmt: skip
    train(model, text.train, flags.iterations, flags.seed)
    model.eval().save_pretrained(flags.out)
    found = measure_language(model, *windows(text.validation, LENGTH))
    print("validation loss {validation_loss:.4f} nats, at residuals of "
          "{validation_residual:.1e} on average".format(**found))  # fmt: skip
    print(text.vocabulary.decode(model.generate(text.vocabulary.encode("\n")[None], 300)))
