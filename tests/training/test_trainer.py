"""The training loop against loops written out by hand."""

from __future__ import annotations

import importlib.machinery
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deep_implicit_attention.training import (
    DivergenceWarning,
    Outcome,
    Plan,
    Run,
    Trainer,
    derived_seed,
)

Build = Callable[..., Any]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def by_hand(
    model: nn.Module, task: Any, steps: int, *, clip: float | None = None, seed: int = 0
) -> list[list[Tensor]]:
    """The weights after each step of AdamW on whole batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    plan = Plan(steps=steps, evaluate_every=steps)
    generator = torch.Generator().manual_seed(derived_seed(seed, 0))
    torch.manual_seed(derived_seed(seed, 1, 0))
    history = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * plan.rate(step)
        batch = task.batch(step // task.batches, step % task.batches, generator)
        model.train()
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            gradients = [p.grad for p in model.parameters()]
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))  # type: ignore
            for g in gradients:
                g *= min(1.0, clip / (norm + 1e-6))  # type: ignore[operator]
        optimizer.step()
        history.append(weights(model))
    return history


@pytest.mark.parametrize("seed", [0, 5])
def test_the_weights_are_those_of_a_plain_loop_bit_for_bit(
    seed: int, regression: Build, network: Build, trainer: Build
) -> None:
    model = network()
    assert trainer(regression(), model, seed=seed).train() == "finished"
    other = network()
    by_hand(other, regression(), 12, seed=seed)
    assert same(weights(model), weights(other))
    assert not same(weights(model), weights(network()))


def test_a_batch_in_parts_is_the_batch(regression: Build, network: Build, trainer: Build) -> None:
    model, other = network(dropout=0.0), network(dropout=0.0)
    trainer(regression(), model, accumulate=4).train()
    by_hand(other, regression(), 12)
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_clipping(regression: Build, network: Build, trainer: Build) -> None:
    model, other, free = network(), network(), network()
    trainer(regression(), model, clip=0.3).train()
    by_hand(other, regression(), 12, clip=0.3)
    by_hand(free, regression(), 12)
    for a, b, c in zip(weights(model), weights(other), weights(free), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(a, c, rtol=1e-6)


def test_gradients_of_what_is_not_trained_do_not_add_up(
    regression: Build, network: Build, trainer: Build
) -> None:
    """They count in the norm that is clipped, those of the step and no others."""
    model, other = network(dropout=0.0), network(dropout=0.0)
    task = regression()
    optimizer, by_hand = (
        torch.optim.SGD([*part.parameters()][-2:], 0.1) for part in (model, other)
    )
    trainer(task, model, optimizer=optimizer, clip=0.3).train()
    plan = Plan(steps=12, evaluate_every=12)
    generator = torch.Generator().manual_seed(derived_seed(0, 0))
    for step in range(12):
        by_hand.param_groups[0]["lr"] = 0.1 * plan.rate(step)
        batch = task.batch(step // task.batches, step % task.batches, generator)
        other.zero_grad()
        (other(batch["x"]) - batch["y"]).square().mean().backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        by_hand.step()
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_average_is_evaluated_and_kept(
    regression: Build, network: Build, trainer: Build, tmp_path: Path
) -> None:
    model, other, task = network(), network(), regression()
    trainer(task, model, ema=0.8, evaluate_every=12).train()
    average = weights(other)
    history = by_hand(other, regression(), 12)
    for step, now in enumerate(history, start=1):
        kept = min(0.8, step / (9 + step))
        average = [kept * e + (1 - kept) * p for e, p in zip(average, now, strict=True)]
    assert same(weights(model), history[-1])  # training goes on from the weights themselves
    best = network()
    Run(tmp_path).load_weights(best)
    for a, b in zip(weights(best), average, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    (record,) = Run(tmp_path).metrics()
    with torch.no_grad():
        loss = (best.eval()(task.x) - task.y).square().mean().item()
    assert record["validation_loss"] == pytest.approx(loss, rel=1e-12)


def test_how_often_it_is_looked_at_does_not_change_the_training(
    regression: Build, network: Build, trainer: Build
) -> None:
    ends = []
    for every in (1, 5, 12):
        model = network(dropout=0.4)
        trainer(regression(), model, evaluate_every=every, checkpoint_every=2).train()
        ends.append(weights(model))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_the_metrics_are_means_since_the_last_evaluation(
    regression: Build, trainer: Build, tmp_path: Path
) -> None:
    class Noted(regression):  # type: ignore[valid-type, misc]
        def loss(self, model: nn.Module, batch: Any) -> Outcome:
            outcome = super().loss(model, batch)
            seen.append(outcome.statistics())
            return outcome

    seen: list[dict[str, float]] = []
    trainer(Noted(), evaluate_every=5).train()
    records = Run(tmp_path).metrics()
    assert [(r["step"], r["epoch"]) for r in records] == [(5, 1), (10, 2), (12, 2)]
    for record, (start, end) in zip(records, [(0, 5), (5, 10), (10, 12)], strict=True):
        for name in ("loss", "error"):
            mean = sum(s[name] for s in seen[start:end]) / (end - start)
            assert record[f"train_{name}"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    ("script", "patience", "last", "best"),
    [
        ([5.0, 4.0, 4.5, 4.2, 4.1, 1.0], 3, 5, 2),
        ([5.0, 4.0, 4.5, 4.2, 3.0, 3.5, 3.5, 3.5, 1.0], 3, 8, 5),
        ([3.0, 3.0, 3.0, 1.0], 2, 3, 1),
        ([math.nan, 2.0, math.nan, math.nan, 1.0], 2, 4, 2),
    ],
)
def test_early_stopping(
    script: list[float],
    patience: int,
    last: int,
    best: int,
    regression: Build,
    trainer: Build,
    tmp_path: Path,
) -> None:
    class Scripted(regression):  # type: ignore[valid-type, misc]
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"validation_loss": next(losses)}

    losses = iter(script)
    settings = {"steps": 40, "evaluate_every": 1, "patience": patience}
    assert trainer(Scripted(), **settings).train() == "early"
    assert [r["step"] for r in Run(tmp_path).metrics()] == list(range(1, last + 1))
    assert Run(tmp_path).saved_step() == best
    assert trainer(Scripted(), **settings).train(resume=True) == "early"  # and trains no further
    assert Run(tmp_path).metrics()[-1]["step"] == last


def test_a_sample_is_said_and_logged(
    regression: Build, trainer: Build, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    class Talking(regression):  # type: ignore[valid-type, misc]
        def sample(self, model: nn.Module) -> str:
            assert not model.training
            return f"a number: {torch.rand(1).item():.3f}"

    trainer(Talking()).train()
    first = [r["sample"] for r in Run(tmp_path).metrics()]
    assert len(set(first)) == 4
    trainer(Talking()).train()
    assert [r["sample"] for r in Run(tmp_path).metrics()] == first


class Rising:
    """Makes the loss grow from step to step, without end."""

    @staticmethod
    def of(regression: type, base: float = 1.1) -> Any:
        class Task(regression):  # type: ignore[valid-type, misc]
            count = 0

            def loss(self, model: nn.Module, batch: Any) -> Outcome:
                self.count += 1
                outcome = super().loss(model, batch)
                return Outcome(outcome.loss * base**self.count)

        return Task()


def test_divergence_is_told_before_the_loss_is_no_number(
    regression: Build, trainer: Build, tmp_path: Path
) -> None:
    task = Rising.of(regression, base=3.0)
    build = trainer(task, steps=6000, evaluate_every=25)
    with (
        pytest.warns(DivergenceWarning, match=r"step \d+ .*jumps.*lower the learning rate"),
        pytest.raises(
            FloatingPointError, match=r"not finite in step \d+ .*lower the learning rate"
        ),
    ):
        build.train()
    records = Run(tmp_path).metrics()
    told = next(r["step"] for r in records if "signs_of_divergence" in r)
    assert told < records[-1]["step"]


def test_divergence_can_end_the_training(regression: Build, trainer: Build, tmp_path: Path) -> None:
    build = trainer(Rising.of(regression), steps=600, evaluate_every=10, on_divergence="stop")
    with pytest.warns(DivergenceWarning):
        assert build.train() == "diverged"
    assert build.course.step < 100
    *_, last = Run(tmp_path).metrics()
    assert last["step"] == build.course.step
    assert last["signs_of_divergence"]
    assert Run(tmp_path).saved_step() is not None
    again = trainer(Rising.of(regression), steps=600, evaluate_every=10, on_divergence="stop")
    assert again.train(resume=True) == "diverged"  # and trains no further
    assert Run(tmp_path).metrics()[-1] == last


def test_a_spectral_radius_near_one_is_told(regression: Build, trainer: Build) -> None:
    class Edge(regression):  # type: ignore[valid-type, misc]
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {**super().evaluate(model), "spectral_radius": 0.995}

    with pytest.warns(DivergenceWarning, match=r"spectral radius of the update is 0\.9"):
        trainer(Edge()).train()


def test_a_batch_that_cannot_be_cut(regression: Build, trainer: Build) -> None:
    with pytest.raises(ValueError, match=r"8 rows .*accumulate 3"):
        trainer(regression(), accumulate=3).train()


def test_no_data(regression: Build, trainer: Build) -> None:
    task = regression()
    task.batches = 0
    with pytest.raises(ValueError, match=r"at least one batch, got 0"):
        trainer(task)


def test_rows_that_do_not_match(regression: Build, trainer: Build) -> None:
    task = regression()
    whole = task.batch
    task.batch = lambda *a: {**whole(*a), "weights": torch.ones(7)}
    with pytest.raises(ValueError, match=r"same rows, got \[7, 8\]"):
        trainer(task).train()


def test_an_evaluation_without_the_monitor(regression: Build, trainer: Build) -> None:
    task = regression()
    task.monitor = "validation_bits"
    with pytest.raises(
        ValueError, match=r"'validation_bits', the monitor; it gave validation_loss"
    ):
        trainer(task).train()


def test_autocast_and_back(network: Build, regression: Build, trainer: Build) -> None:
    seen = []

    class Noted(regression):  # type: ignore[valid-type, misc]
        def loss(self, model: nn.Module, batch: Any) -> Outcome:
            seen.append(model(batch["x"].float()).dtype)
            return Outcome((model(batch["x"].float()) - batch["y"].float()).square().mean())

        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"validation_loss": 1.0}

    model = network().float()
    inner: list[torch.dtype] = []
    model[0].register_forward_hook(lambda m, i, o: inner.append(o.dtype))
    trainer(Noted(), model, precision="bf16", steps=3).train()
    assert set(inner) == {torch.bfloat16}
    assert set(seen) == {torch.float32}  # outputs are widened for the loss
    inner.clear()
    model(torch.randn(2, 3))
    assert inner == [torch.float32]
    trainer(Noted(), model, precision="no", steps=3).train()
    assert set(inner) == {torch.float32}


def test_what_would_do_nothing_is_refused(
    regression: Build, trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="fp16 needs an accelerator"):
        trainer(regression(), precision="fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="use accumulate"):
        trainer(regression())


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed(
    name: str, regression: Build, trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=f"{name}.* is not installed; pip install {name}"):
        trainer(regression(), trackers=(name,))


@pytest.mark.parametrize("name", ["no_such_tracker", "json"])
def test_a_tracker_that_is_unknown(name: str, regression: Build, trainer: Build) -> None:
    with pytest.raises(ValueError, match=f"unknown tracker '{name}'; there are .*tensorboard"):
        trainer(regression(), trackers=(name,))


def test_trackers_get_every_record(
    regression: Build, trainer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import GeneralTracker

    class Memory(GeneralTracker):
        name, requires_logging_directory = "memory", False
        tracker = None
        ended = False

        def __init__(self) -> None:
            super().__init__()
            self.records: list[tuple[int | None, dict[str, Any]]] = []

        def store_init_configuration(self, values: dict) -> None:
            self.config = values

        def log(self, values: dict, step: int | None = None, **_: Any) -> None:
            self.records.append((step, values))

        def finish(self) -> None:
            self.ended = True

    memory = Memory()
    build: Trainer = trainer(regression())
    build.devices.accelerator.log_with = [memory]
    build.train()
    assert [step for step, _ in memory.records] == [3, 6, 9, 12]
    assert [r for _, r in memory.records] == Run(tmp_path).metrics()
    assert memory.ended


def test_a_resumed_training_goes_on_in_its_wandb_run(
    regression: Build, trainer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import tracking
    from accelerate.utils import LoggerType

    asked: list[dict[str, Any]] = []
    logged: dict[str, list[int]] = {}

    class Tracked:
        def __init__(self, options: dict[str, Any]) -> None:
            self.id = options["id"]

        def log(self, values: dict[str, Any], step: int) -> None:
            logged.setdefault(self.id, []).append(step)

        def finish(self) -> None:
            pass

    def init(**options: Any) -> Tracked:
        asked.append(options)
        return Tracked(options)

    fake: Any = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = init
    fake.config = types.SimpleNamespace(update=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.WANDB])

    class Stopped(regression):  # type: ignore[valid-type, misc]
        def batch(self, epoch: int, index: int, generator: torch.Generator) -> Any:
            if 6 * epoch + index == 7:
                raise KeyboardInterrupt
            return super().batch(epoch, index, generator)

    with pytest.raises(KeyboardInterrupt):
        trainer(Stopped(), trackers=("wandb",)).train()
    trainer(regression(), trackers=("wandb",)).train(resume=True)
    first, second = asked
    assert first == second
    assert (first["resume"], first["dir"], first["name"]) == ("allow", str(tmp_path), tmp_path.name)
    assert logged == {first["id"]: [3, 6, 9, 12]}
    trainer(regression(), trackers=("wandb",)).train()  # anew, in the same folder
    assert asked[2]["id"] != first["id"]
    assert logged[asked[2]["id"]] == [3, 6, 9, 12]


def test_means_are_over_the_steps_that_gave_them(
    regression: Build, trainer: Build, tmp_path: Path
) -> None:
    class Sometimes(regression):  # type: ignore[valid-type, misc]
        count = 0

        def loss(self, model: nn.Module, batch: Any) -> Outcome:
            self.count += 1
            outcome = super().loss(model, batch)
            return Outcome(outcome.loss, {"odd": float(self.count)} if self.count % 2 else {})

    trainer(Sometimes()).train()
    records = Run(tmp_path).metrics()
    assert [record["train_odd"] for record in records] == [2.0, 5.0, 8.0, 11.0]
    with pytest.raises(ValueError, match=r"must give means of the same names, got loss.*; loss"):
        trainer(Sometimes(), accumulate=2).train()


def test_a_model_that_is_lost_is_logged_and_not_sampled(
    regression: Build, trainer: Build, tmp_path: Path
) -> None:
    class Lost(regression):  # type: ignore[valid-type, misc]
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"validation_loss": math.nan}

        def sample(self, model: nn.Module) -> str:
            pytest.fail("asked of a model that is lost")

    trainer(Lost()).train()
    assert [record["validation_loss"] for record in Run(tmp_path).metrics()] == [None] * 4


def test_trackers_are_names_in_a_tuple() -> None:
    with pytest.raises(TypeError, match="trackers must be a tuple of names, got the string"):
        Plan(steps=1, evaluate_every=1, trackers="tensorboard")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be an integer"):
        Plan(steps=1, evaluate_every=1, seed=1.5)  # type: ignore[arg-type]
