"""Training learns, keeps the best epoch, reports what it did; measuring agrees with counting."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.models import DeepImplicitAttentionViT, SiteClassifier
from deep_implicit_attention.training import (
    ImageData,
    Measured,
    Progress,
    Run,
    Schedule,
    Split,
    _classify,
    batch_spectral_radius,
    measure,
    train_classifier,
)

Build = Callable[..., SiteClassifier]
Plan = Callable[..., Schedule]


class Spy(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.batches: list[tuple[int, dict[str, float], float]] = []

    def batch(self, epoch: int, means: Any, residual: float) -> None:
        self.batches.append((epoch, dict(means), residual))
        super().batch(epoch, means, residual)


def train(
    model: SiteClassifier, data: ImageData, schedule: Schedule, folder: Path, **options: Any
) -> Run:
    run = Run(folder)
    run.start({})
    with Progress(quiet=True) as progress:
        train_classifier(model, data, schedule, run, progress, **options)
    return run


def weights(model: SiteClassifier) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor], part: str = "") -> bool:
    return all(torch.equal(one[k], other[k]) for k in one if part in k)


def test_learns_what_can_be_learned(
    small_model: Build, problem: ImageData, plan: Plan, quadrants: Callable, tmp_path: Path
) -> None:
    model = small_model()
    fresh = quadrants(200, 9)
    assert measure(model, fresh).accuracy < 0.5
    run = train(model, problem, plan(epochs=8), tmp_path)
    records = run.metrics()
    run.load_weights(model)
    assert measure(model, fresh).accuracy > 0.9  # chance is 0.25
    assert records[-1]["train_loss"] < records[0]["train_loss"] / 2
    assert records[-1]["train_accuracy"] > 0.9


def test_learns_with_augmentation_and_smoothing(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    moving = {"shift": 1.0, "rotation": 10.0, "zoom": 0.1, "smoothing": 0.1}
    run = train(small_model(), problem, plan(epochs=8, **moving), tmp_path)
    assert max(record["validation_accuracy"] for record in run.metrics()) > 0.8


def test_metrics_of_every_epoch(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.start({})
    with Spy() as spy:
        train_classifier(small_model(), problem, plan(epochs=3, batch_size=20), run, spy)
    records = run.metrics()
    assert [r["epoch"] for r in records] == [1, 2, 3]
    for record in records:
        assert {
            "train_loss",
            "train_accuracy",
            "validation_loss",
            "validation_accuracy",
            "solver_steps",
            "residual",
            "spectral_radius",
            "seconds",
        } <= set(record)
        assert all(math.isfinite(value) for value in record.values())
        own = [means for epoch, means, _ in spy.batches if epoch == record["epoch"]]
        assert len(own) == 96 // 20
        # The last running means are those of the epoch, as is the worst residual.
        assert own[-1]["loss"] == pytest.approx(record["train_loss"])
        assert own[-1]["accuracy"] == pytest.approx(record["train_accuracy"])
        assert own[-1]["solver_steps"] == pytest.approx(record["solver_steps"])
        assert record["residual"] == max(r for e, _, r in spy.batches if e == record["epoch"])


def test_only_the_training_loss_is_smoothed(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    model = small_model().train()
    with torch.no_grad():
        logs = model(problem.train.images).log_softmax(dim=1)
    right = logs[torch.arange(96), problem.train.labels]
    expected = -(0.7 * right + 0.3 * logs.mean(dim=1)).mean().item()
    frozen = plan(epochs=1, batch_size=96, learning_rate=0.0, smoothing=0.3)
    (record,) = train(model, problem, frozen, tmp_path).metrics()
    assert record["train_loss"] == pytest.approx(expected, rel=1e-4)
    model.eval()
    with torch.no_grad():
        logs = model(problem.validation.images).log_softmax(dim=1)
    expected = -logs[torch.arange(40), problem.validation.labels].mean().item()
    assert record["validation_loss"] == pytest.approx(expected, rel=1e-4)


def test_batches_are_whole_shuffled_and_without_repetition(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path, monkeypatch: Any
) -> None:
    model, schedule = small_model().eval(), plan(epochs=2, batch_size=20, shift=1.0)
    seen: list[list[float]] = []

    def note(images: Tensor, *settings: Any) -> Tensor:
        assert settings[:2] == (schedule, -1.25)
        assert isinstance(settings[2], torch.Generator)
        seen.append(images[:, 0, 0, 0].tolist())
        return images

    monkeypatch.setattr(_classify, "augment", note)
    train(model, replace(problem, background=-1.25), schedule, tmp_path)
    assert [len(batch) for batch in seen] == [20] * 8
    first, second = ([x for batch in part for x in batch] for part in (seen[:4], seen[4:]))
    own = set(problem.train.images[:, 0, 0, 0].tolist())
    for epoch in (first, second):
        assert len(set(epoch)) == 80
        assert set(epoch) <= own
        assert epoch != problem.train.images[:80, 0, 0, 0].tolist()
    assert first != second


def test_the_best_epoch_is_kept(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    # Validation labels that are wrong by design: the better the model, the worse it does there.
    right = problem.validation
    data = ImageData(problem.train, Split(right.images, (right.labels + 1) % 4), None, 0.0)  # type: ignore[arg-type]
    model = small_model()
    run = train(model, data, plan(epochs=6), tmp_path)
    records = run.metrics()
    best = min(records, key=lambda r: r["validation_loss"])
    assert best["validation_loss"] < records[-1]["validation_loss"]
    run.load_weights(model)
    again = measure(model, data.validation)
    assert again.accuracy == best["validation_accuracy"]
    assert again.loss == pytest.approx(best["validation_loss"], rel=1e-6)


@pytest.mark.quick("script[03]-*")
@pytest.mark.parametrize(
    ("script", "best"),
    [
        ([(0.5, 1.0), (0.7, 0.9), (0.6, 0.1), (0.5, 0.2)], 3),
        ([(0.7, 0.9), (0.7, 0.8), (0.9, 0.85)], 2),
        ([(0.9, 0.3), (0.8, 0.4)], 1),
        ([(0.9, 0.3), (0.95, 0.3)], 1),
    ],
)
def test_best_is_the_lowest_loss(
    script: list[tuple[float, float]],
    best: int,
    small_model: Build,
    problem: ImageData,
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = []

    def scripted(model: SiteClassifier, _: Split) -> Measured:
        states.append(weights(model))
        accuracy, loss = script[len(states) - 1]
        return Measured(loss, accuracy, torch.zeros(0), 1.0, 0.0)

    monkeypatch.setattr(_classify, "measure", scripted)
    model = small_model()
    run = train(model, problem, plan(epochs=len(script)), tmp_path)
    run.load_weights(model)
    kept = [k for k, state in enumerate(states, start=1) if equal(weights(model), state)]
    assert kept == [best]


def test_the_same_seed_gives_the_same_weights(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    ends = []
    for seed in (0, 0, 1):
        model = small_model(0, dropout=0.1)
        torch.manual_seed(seed)
        train(model, problem, plan(shift=1.0, rotation=5.0, zoom=0.1), tmp_path)
        ends.append(weights(model))
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2])


def test_the_coupling_rate_is_that_of_the_equilibrium_layer(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    model = small_model()
    before = weights(model)
    train(model, problem, plan(coupling_rate=0.0, weight_decay=0.5), tmp_path)
    after = weights(model)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("attention."), name


def test_learning_rates_warm_up_and_follow_a_cosine(
    small_model: Build,
    problem: ImageData,
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[dict[int, float]] = []

    class Noted(torch.optim.AdamW):
        def step(self, *arguments: Any) -> Any:
            groups = self.param_groups
            rates.append({id(p): group["lr"] for group in groups for p in group["params"]})
            assert {group["weight_decay"] for group in groups} == {0.07}
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    model = small_model()
    schedule = plan(epochs=5, batch_size=12, learning_rate=2e-3, weight_decay=0.07)
    train(model, problem, schedule, tmp_path)
    assert len(rates) == 40
    assert all(set(r) == {id(p) for p in model.parameters()} for r in rates)
    inside = {id(p) for p in model.attention.parameters()}
    outside = [next(v for k, v in r.items() if k not in inside) / 2e-3 for r in rates]
    for step, of_step in enumerate(rates):
        for key, rate in of_step.items():
            factor = 0.3 if key in inside else 1.0
            assert rate == pytest.approx(factor * outside[step] * 2e-3)
    assert 0 < outside[0] < 0.1
    assert outside[1:5] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    # Of the 36 steps down a quarter, a half, three quarters are done here.
    root = math.sqrt(0.5)
    assert [outside[k] for k in (13, 22, 31)] == pytest.approx(
        [(1 + root) / 2, 0.5, (1 - root) / 2]
    )
    assert 0 < outside[39] < 0.005


def test_a_loss_that_is_not_finite(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    model = small_model()
    with torch.no_grad():
        model.head[1].bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="lower --learning-rate or --coupling-rate"):
        train(model, problem, plan(), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_solves_that_fail_are_told_before_the_loss_is_no_number(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    class Listener(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    run = Run(tmp_path)
    run.start({})
    schedule = plan(epochs=20, learning_rate=1e4, coupling_rate=1.0)
    with (
        Listener(quiet=True) as progress,
        pytest.raises(FloatingPointError, match=r"not finite in step (\d+)") as caught,
    ):
        train_classifier(small_model(), problem, schedule, run, progress)
    (told,) = (text for text in said if "equilibria of the last" in text)
    assert "lower --learning-rate or --coupling-rate" in told
    first, last = (int(re.search(r"step (\d+)", str(t))[1]) for t in (told, caught.value))  # type: ignore
    assert 3 <= first < last


def test_a_sound_training_has_no_sign_of_divergence(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    records = train(small_model(), problem, plan(epochs=8), tmp_path).metrics()
    assert not any("signs_of_divergence" in record for record in records)


def test_too_few_images_for_a_batch(
    small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"96 .* 97"):
        train(small_model(), problem, plan(batch_size=97), tmp_path)
    train(small_model(), problem, plan(batch_size=96, epochs=1), tmp_path)


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 0}, {"epochs": -1}, {"zoom": 1.0}, {"zoom": -0.1}]
)
def test_settings_out_of_range(
    change: dict[str, Any], small_model: Build, problem: ImageData, plan: Plan, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).replace("_", ".")):
        train(small_model(), problem, plan(**change), tmp_path)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_measure_against_one_image_at_a_time(
    batch_size: int, small_model: Build, quadrants: Callable
) -> None:
    model, split = small_model(dropout=0.5), quadrants(30, 3)
    model.train()
    measured = measure(model, split, batch_size)
    model.eval()
    right, loss, steps, worst, predictions = 0, 0.0, 0.0, 0.0, []
    with torch.no_grad():
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            scores, (solution,) = model(image[None], return_solution=True)
            values = scores[0].tolist()
            predictions.append(values.index(max(values)))
            right += predictions[-1] == label
            loss += math.log(sum(math.exp(v) for v in values)) - values[label]
            steps += int(solution.steps)
            worst = max(worst, float(solution.residual))
    assert measured.predictions.tolist() == predictions
    assert measured.accuracy == right / 30
    assert measured.loss == pytest.approx(loss / 30, rel=1e-5)
    assert measured.steps == pytest.approx(steps / 30, rel=0.02)
    assert measured.residual == pytest.approx(worst, rel=0.05)


def test_steps_are_those_of_one_layer(quadrants: Callable) -> None:
    model = DeepImplicitAttentionViT(
        image_size=8, patch_size=4, num_classes=4, channels=1, dim=8, depth=2, steps=3
    )
    assert measure(model, quadrants(6, 3), 4).steps == 3


def test_measure_nothing(small_model: Build, quadrants: Callable) -> None:
    with pytest.raises(ValueError, match="at least one image, got none"):
        measure(small_model(), quadrants(0, 3))


def test_measure_shows_an_image_that_could_not_be_solved(
    small_model: Build, quadrants: Callable
) -> None:
    model, split = small_model(), quadrants(6, 3)
    split.images[4] = torch.nan
    for batch_size in (6, 1):
        assert not math.isfinite(measure(model, split, batch_size).residual)


@pytest.mark.parametrize("symmetric", [True, False])
def test_spectral_radius_against_eigenvalues(
    symmetric: bool, small_model: Build, quadrants: Callable
) -> None:
    exact = {"solver_fwd_tol": 1e-11, "solver_fwd_max_iter": 200}
    model = small_model(2, dim=3, symmetric=symmetric, **exact).double()
    images = quadrants(5, 4).images.double()
    model.train()
    found = batch_spectral_radius(model, images)
    model.eval()
    layer = model.attention.fun
    raw = layer._weight.detach()
    pairs = (raw + raw.transpose(0, 1)) / 2 if symmetric else raw
    couplings = (pairs + pairs.mT) / 2
    for site in range(5):
        couplings[site, site] = 0
    radii = []
    with torch.no_grad():
        _, (solution,) = model(images, return_solution=True)
    for z in solution.value:

        def update(state: Tensor) -> Tensor:  # but for the field, which is constant
            return torch.einsum("ijab,jb->ia", couplings, state) - layer.correction(state)

        jacobian = torch.autograd.functional.jacobian(update, z).reshape(15, 15)
        radii.append(torch.linalg.eigvals(jacobian).abs().max().item())
    assert max(radii) > 1.001 * min(radii)  # a mean over unlike numbers
    assert found == pytest.approx(sum(radii) / 5, rel=1e-6)
