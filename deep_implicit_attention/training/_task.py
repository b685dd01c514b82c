"""What a `Trainer` asks of a problem, of images or text alike: batches, a loss, measurements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..solvers import Solution, Status


@dataclass(frozen=True)
class Outcome:
    """What a model did on a batch.

    Attributes:
        loss: mean over the rows of the batch, with its graph.
        means: further means over the rows, to be shown; numbers or tensors without dimensions.
        solutions: of the equilibrium layers.
    """

    loss: Tensor
    means: dict[str, Tensor | float] = field(default_factory=dict)
    solutions: tuple[Solution, ...] = ()

    def statistics(self) -> dict[str, float]:
        """Loss, means, and what the solvers did: steps, worst residual, share of failed solves."""
        found = {
            name: value.item() if isinstance(value, Tensor) else float(value)
            for name, value in {"loss": self.loss, **self.means}.items()
        }
        if self.solutions:
            found["solver_steps"] = _mean([s.steps.double() for s in self.solutions])
            found["residual"] = worst_of(*(s.residual.max().item() for s in self.solutions))
            found["failed"] = _mean([_failed(s).double() for s in self.solutions])
        return found


class Task(ABC):
    """A problem to learn.

    Attributes:
        batches: batches in an epoch.
        monitor: name, in what `evaluate` returns, of the number that is to become small.
        advice: what to do about a training that diverges.
    """

    batches: int
    monitor = "validation_loss"
    advice = "lower the learning rate, or make the couplings weaker"

    @abstractmethod
    def batch(self, epoch: int, index: int, generator: torch.Generator) -> Any:
        """Batch `index` of `epoch`, both counted from 0: tensors on the CPU, rows first, in any
        structure of tuples, lists and dicts.

        `generator` is for all that is random, order and augmentation; its state is in the
        checkpoint. Batches are asked for one after the other, each once, also when a training is
        resumed; what is drawn for several of them belongs in `state`. Every process asks for the
        whole batch, gets the same, and takes its rows.
        """

    def state(self) -> dict[str, Tensor]:
        """What has been drawn and is needed for further batches, for the checkpoint."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Put back what `state` gave."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Outcome:
        """The loss on the rows of `batch`, on the model's device. `model` may be wrapped for
        several processes: call it, and nothing else of it."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure `model`, which is in eval mode, on data that it does not learn from.

        A "spectral_radius" among the numbers is watched for divergence.
        """

    def sample(self, model: nn.Module) -> str | None:
        """Something the model makes, to be looked at after each evaluation."""
        return None


def worst_of(*residuals: float) -> float:
    """The largest; NaN if any is, for no residual is worse than one that is no number."""
    return math.nan if any(map(math.isnan, residuals)) else max(residuals)


def _mean(values: list[Tensor]) -> float:
    return torch.stack([value.mean() for value in values]).mean().item()


def _failed(solution: Solution) -> Tensor:
    return ~solution.accepting(solution.codes == Status.FIXED_STEPS.code).converged
