"""Train a causal language model on the characters of a text, and measure it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models import DeepImplicitAttentionTransformer
from ..solvers._validate import check_count, check_number
from ._plan import Plan
from ._task import Outcome, Task
from ._text import TextData, check_parts, random_batch, windows

# Windows whose spectral radius is looked at: each costs thirty products with the Jacobian.
_RADII = 8


@dataclass(frozen=True)
class LanguagePlan(Plan):
    """A plan whose learning rate ends at a tenth of the largest."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0, as a fraction of the largest.

        With i = step + 1 of n steps, w = warmup · n of them to rise in, and
        c = cos(π max(0, i − w)/(n − w)): the smaller of i/w and 0.55 + 0.45 c.
        """
        i, rise = step + 1, round(self.warmup * self.steps)
        cosine = math.cos(math.pi * max(0, i - rise) / max(1, self.steps - rise))
        return min(i / rise if rise else 1.0, 0.55 + 0.45 * cosine)


class Language(Task):
    """Learn to foretell the next character: random stretches of a text, cross-entropy in nats.

    Each batch relaxes some steps without a gradient, a number drawn from 0 to `relax`, then takes
    `learn` steps with one: the gradient of a truncated network, whose memory does not grow with
    `relax`. Since every number occurs, the network must be right early and stay right, which makes
    it settle. With ``learn=None`` the equilibrium is solved for, from the relaxed state, and has
    its exact implicit gradient.

    An epoch is as many batches as hold the characters of the training text once.

    Args:
        data: the text.
        length: characters of a stretch and of a window of validation.
        batch_size: stretches in a batch.
        relax: steps without a gradient, at most.
        learn: steps with a gradient, or None.
        jacobian_penalty: weight of `model.jacobian_penalty` in the loss. It is computed outside
            the wrapped model, so not under FSDP.
        evaluate_windows: windows of the validation text, evenly spaced, that an evaluation
            measures; all, if there are fewer.
    """

    advice = "lower --learning-rate, or add --jacobian-penalty"

    def __init__(
        self,
        data: TextData,
        length: int,
        batch_size: int,
        *,
        relax: int = 2,
        learn: int | None = 4,
        jacobian_penalty: float = 0.0,
        evaluate_windows: int = 100,
    ) -> None:
        check_count("batch_size", batch_size)
        check_count("evaluate_windows", evaluate_windows)
        check_count("relax", relax, minimum=0)
        check_number("jacobian_penalty", jacobian_penalty, minimum=0.0)
        if learn is not None:
            check_count("learn", learn)
        check_parts(data, length)
        inputs, targets = windows(data.validation, length)
        count = min(evaluate_windows, len(inputs))
        last = len(inputs) - 1
        chosen = torch.linspace(0, last, count, dtype=torch.float64, device="cpu").round().long()
        self.inputs, self.targets = inputs[chosen], targets[chosen]
        self.data, self.length, self.batch_size = data, length, batch_size
        self.relax, self.learn, self.jacobian_penalty = relax, learn, jacobian_penalty
        self.batches = max(1, len(data.train) // (length * batch_size))

    def batch(
        self, epoch: int, index: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets, and the steps to relax, the same for all rows."""
        inputs, targets = random_batch(self.data.train, self.length, self.batch_size, generator)
        relax = torch.randint(self.relax + 1, (1,), generator=generator, device="cpu")
        return inputs, targets, relax.expand(self.batch_size)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Outcome:
        inputs, targets, drawn = batch
        relax = int(drawn[0])
        states = self._relaxed(model, inputs, relax) if relax else None
        logits, solutions = model(inputs, state=states, steps=self.learn, return_solution=True)
        plain = cast(DeepImplicitAttentionTransformer, getattr(model, "module", model))
        loss = plain.loss(logits, targets)
        means: dict[str, Tensor | float] = {}
        if self.jacobian_penalty:
            penalty = plain.jacobian_penalty(inputs, solutions)
            means = {"cross_entropy": loss.detach(), "jacobian_penalty": penalty.detach()}
            loss = loss + self.jacobian_penalty * penalty
        taken = tuple(replace(solution, steps=solution.steps + relax) for solution in solutions)
        return Outcome(loss, means, taken)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What `measure_language` finds at equilibrium, and the spectral radius.

        That is the mean over a few windows, of the block in which it is largest.
        """
        model = cast(DeepImplicitAttentionTransformer, model)
        found = measure_language(model, self.inputs, self.targets)
        some = self.inputs[:: math.ceil(len(self.inputs) / _RADII)].to(_device(model))
        with torch.no_grad():
            _, solutions = model(some, return_solution=True)
        radii = model.spectral_radius(some, solutions)
        return {**found, "spectral_radius": radii.mean(dim=1).max().item()}

    def sample(self, model: nn.Module) -> str:
        """One window of text after the first character of the validation text."""
        model = cast(DeepImplicitAttentionTransformer, model)
        first = self.data.validation[None, :1].to(_device(model))
        return self.data.vocabulary.decode(model.generate(first, self.length)[0].cpu())

    def _relaxed(self, model: nn.Module, inputs: Tensor, relax: int) -> tuple[Any, ...]:
        """The states after the steps without a gradient, under the dropout of those with one."""
        cuda = [inputs.device] if inputs.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(cuda):
            return model(inputs, steps=relax, return_solution=True, measure=False)[1]


@torch.no_grad()
def measure_language(
    model: DeepImplicitAttentionTransformer,
    inputs: Tensor,
    targets: Tensor,
    batch_size: int = 64,
) -> dict[str, float]:
    """Loss in nats per character of windows `(n, T)` at equilibrium, and the solver's work.

    Returns:
        ``validation_loss``; over the windows, the mean of the ``validation_solver_steps`` of a
        block, the mean ``validation_residual`` and the ``validation_worst_residual`` (both of the
        block where it is larger); ``validation_windows``, their number.
    """
    if not len(inputs):
        raise ValueError("inputs must hold at least one window, got none")
    model.eval()
    device = _device(model)
    loss, steps, residuals = 0.0, 0.0, []
    for some, following in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits, solutions = model(some.to(device), return_solution=True)
        loss += model.loss(logits, following.to(device)).item() * len(some)
        steps += torch.stack([s.steps.double() for s in solutions]).mean(dim=0).sum().item()
        residuals.append(torch.stack([s.residual for s in solutions]).amax(dim=0).cpu())
    residual = torch.cat(residuals)
    return {
        "validation_loss": loss / len(inputs),
        "validation_solver_steps": steps / len(inputs),
        "validation_residual": residual.mean().item(),
        "validation_worst_residual": residual.max().item(),
        "validation_windows": len(inputs),
    }


def language_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW with β = (0.9, 0.99), which decays matrices and leaves vectors alone."""
    check_number("learning_rate", learning_rate, minimum=0.0)
    check_number("weight_decay", weight_decay, minimum=0.0)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99))


def _device(model: DeepImplicitAttentionTransformer) -> torch.device:
    return model.tokens.weight.device
