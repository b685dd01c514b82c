"""MNIST with a vision transformer of equilibrium attention, in a plain PyTorch loop."""

import argparse
from pathlib import Path

import torch

from deep_implicit_attention.models import DeepImplicitAttentionViT
from deep_implicit_attention.training import Schedule, augment, mnist

BATCH, RATE, BLOCK_RATE, DECAY = 60, 3e-3, 3e-4, 0.01
MOVES = Schedule(1, BATCH, RATE, 0.1, DECAY, smoothing=0.0, shift=1.5, rotation=8.0, zoom=0.1)


# %% the loop
def train(model, data, epochs, out):
    """AdamW, warm-up and a cosine; saves the weights of the lowest validation loss in `out`."""
    outer = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    groups = [{"params": outer}, {"params": model.blocks.parameters()}]
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    batches, losses = len(data.train) // BATCH, []
    options = {"total_steps": epochs * batches, "pct_start": 0.1, "cycle_momentum": False}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE, BLOCK_RATE], **options)
    for epoch in range(1, epochs + 1):
        model.train()
        for index in torch.randperm(len(data.train))[: batches * BATCH].split(BATCH):
            images = augment(data.train.images[index], MOVES, data.background)
            optimizer.zero_grad()
            model.loss(model(images), data.train.labels[index]).backward()
            optimizer.step()
            schedule.step()
        losses.append(report(f"epoch {epoch}, validation", model.eval(), data.validation))
        if losses[-1] == min(losses):
            model.save_pretrained(out)


@torch.no_grad()
def report(what, model, split):
    """Prints loss and accuracy; returns the loss."""
    logits = torch.cat([model(images) for images in split.images.split(500)])
    loss = model.loss(logits, split.labels).item()
    accuracy = (logits.argmax(dim=1) == split.labels).double().mean()
    print(f"{what}: {loss:.4f} nats, {accuracy:.2%}", flush=True)
    return loss


# %% the run
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the four idx files; else download")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist-loop"))
    flags = parser.parse_args()
    torch.manual_seed(flags.seed)
    data = mnist(flags.data, validation=1 / 12, seed=flags.seed)
    size = {"image_size": 28, "patch_size": 7, "num_classes": 10, "dim": 10, "channels": 1}
    stem = {"stem": "convolution", "widths": (12, 24, 24, 32)}
    model = DeepImplicitAttentionViT(**size, **stem, solver_fwd_tol=1e-3, solver_bwd_tol=1e-3)
    train(model, data, flags.epochs, flags.out)
    report("test", DeepImplicitAttentionViT.from_pretrained(flags.out), data.test)
