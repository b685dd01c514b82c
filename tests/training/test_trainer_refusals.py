"""What a trainer refuses, because it would be lost, trained for nothing, or wrong unsaid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deep_implicit_attention.training import Checkpoints, Outcome, Plan, Run

Build = Callable[..., Any]


def test_a_trainer_trains_once(regression: Build, trainer: Build, tmp_path: Path) -> None:
    build = trainer(regression())
    build.train()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    steps = Run(tmp_path).checkpoints.steps()
    for resume in (False, True):
        with pytest.raises(RuntimeError, match="has trained already: make another one"):
            build.train(resume=resume)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert Run(tmp_path).checkpoints.steps() == steps


def test_autocast_ends_with_a_training_that_could_not_begin(
    network: Build, regression: Build, trainer: Build
) -> None:
    trainer(regression(), network()).train()
    model = network().float()
    with pytest.raises(ValueError, match="precision"):
        trainer(regression(), model, precision="bf16").train(resume=True)
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    model(torch.randn(2, 3))
    assert seen == [torch.float32]


def test_the_precision_is_that_of_the_trainer_that_trains(
    network: Build, regression: Build, trainer: Build
) -> None:
    class Single(regression):  # type: ignore[valid-type, misc]
        def loss(self, model: nn.Module, batch: Any) -> Outcome:
            return Outcome((model(batch["x"].float()) - batch["y"].float()).square().mean())

        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"validation_loss": 1.0}

    model = network().float()
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    trainer(Single(), model, precision="bf16")
    trainer(Single(), model, precision="no", steps=2).train()
    assert set(seen) == {torch.float32}


def test_parameters_that_are_not_the_models(
    network: Build, regression: Build, trainer: Build
) -> None:
    model = network()
    beside = nn.Parameter(torch.ones(3))
    for others in (network().parameters(), [*model.parameters(), beside]):
        with pytest.raises(ValueError, match="parameters that are not the model's"):
            trainer(regression(), model, torch.optim.AdamW(others))


def test_an_optimizer_that_needs_a_closure(
    network: Build, regression: Build, trainer: Build
) -> None:
    model = network()
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times"):
        trainer(regression(), model, torch.optim.LBFGS(model.parameters()))


def test_a_learning_rate_may_be_a_tensor(
    network: Build, regression: Build, trainer: Build, tmp_path: Path
) -> None:
    found = []
    for rate in (0.02, torch.tensor(0.02, dtype=torch.float64)):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        assert trainer(regression(), model, optimizer).train() == "finished"
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert Run(tmp_path).checkpoints.read(12).state["fixed"]["learning rates"] == [0.02]


def test_a_batch_with_a_tensor_without_rows(regression: Build, trainer: Build) -> None:
    task = regression()
    whole = task.batch
    task.batch = lambda *a: {**whole(*a), "weight": torch.tensor(2.0)}
    with pytest.raises(ValueError, match="must have rows, got one without dimensions"):
        trainer(task).train()


def test_a_clip_that_is_no_number() -> None:
    for clip, kind in (("a", TypeError), (True, TypeError), (0.0, ValueError)):
        with pytest.raises(kind, match="clip must be"):
            Plan(steps=1, evaluate_every=1, clip=clip)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["course", "entry", "fixed", "generator", "random", "state"])
def test_a_checkpoint_of_another_version(
    regression: Build, trainer: Build, tmp_path: Path, damage: str
) -> None:
    trainer(regression()).train()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    read = checkpoints.read(12)
    parts, state = dict(read.parts), dict(read.state)
    if damage == "course":
        state["course"] = {**state["course"], "of_a_later_version": 1}
    elif damage == "entry":
        del state["watch"]
    elif damage == "fixed":
        state["fixed"] = None
    elif damage == "random":
        parts["random"] = {"0/another": torch.zeros(1)}
    elif damage == "state":
        state = []  # type: ignore[assignment]
    else:
        del parts[damage]
    checkpoints.write(12, parts, state)
    with pytest.raises(ValueError, match=r"step-00000012\.safetensors is damaged, or of another"):
        trainer(regression()).train(resume=True)


def test_metrics_are_json_whatever_is_in_them(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start({})
    given = {"radii": [0.5, float("nan")], "of": {"block": (float("inf"), 2)}, "name": "x"}
    run.log(**given)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(line, parse_constant=refuse)
    assert found == {"radii": [0.5, None], "of": {"block": [None, 2]}, "name": "x"}
    assert given["radii"][1] != given["radii"][1]  # type: ignore[index]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_checkpoint_of_weights_that_are_no_numbers(
    regression: Build, trainer: Build, tmp_path: Path, clip: float | None
) -> None:
    """The square root of 0 is a number; its derivative times 0 is none."""

    class Kinked(regression):  # type: ignore[valid-type, misc]
        count = 0

        def loss(self, model: nn.Module, batch: Any) -> Outcome:
            outcome = super().loss(model, batch)
            self.count += 1
            kink = (0 * outcome.loss).sqrt() if self.count == 10 else 0.0
            return Outcome(outcome.loss + kink)

    task = Kinked()
    build = trainer(task, steps=20, evaluate_every=5, checkpoint_every=5, clip=clip)
    with pytest.raises(
        FloatingPointError, match=r"not finite after step 10 .*its gradient was not"
    ):
        build.train()
    assert Run(tmp_path).checkpoints.steps() == [5]
    assert [record["step"] for record in Run(tmp_path).metrics()] == [5]
