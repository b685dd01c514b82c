"""A training that is killed and resumed ends with the same weights, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deep_implicit_attention.training import Checkpoints, Plan, Run, Trainer
from deep_implicit_attention.training._course import Course

Build = Callable[..., Any]


class Killed(BaseException):
    """Nothing catches it."""


def snapshot(folder: Path) -> dict[str, Any]:
    """All that a training leaves, without times."""
    run = Run(folder)
    last = run.checkpoints.read(run.checkpoints.steps()[-1])
    state = json.loads(json.dumps(last.state))
    for name in ("seconds", "metrics_size"):
        state["course"].pop(name)
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in run.metrics()]
    return {
        "records": records,
        "state": state,
        "tensors": last.parts,
        "best": (folder / "model.safetensors").read_bytes(),
        "steps": run.checkpoints.steps(),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part, tensors in one.pop("tensors").items():
        assert all(torch.equal(v, other["tensors"][part][k]) for k, v in tensors.items()), part
    other.pop("tensors")
    assert one == other


@pytest.fixture
def whole(regression: Build, trainer: Build, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What a training that nobody kills leaves."""

    def run(**settings: Any) -> dict[str, Any]:
        trainer(regression(), **settings).train()
        found = snapshot(tmp_path)
        Run(tmp_path).start({})
        return found

    return run


OPTIONS: list[dict[str, Any]] = [
    {},
    {"ema": 0.7, "clip": 0.5, "accumulate": 2},
    {"patience": 2, "warmup": 0.0},
]


@pytest.mark.quick("*-options2", "4-2-*")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kill", "every"), [(1, None), (4, 2), (7, None), (11, 2)])
def test_killed_in_a_step(
    kill: int,
    every: int | None,
    options: dict[str, Any],
    whole: Build,
    regression: Build,
    trainer: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**options, "checkpoint_every": every}
    expected = whole(**settings)
    step = Trainer._step

    def deadly(self: Trainer) -> None:
        if self.course.step == kill:
            raise Killed
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", deadly)
        with pytest.raises(Killed):
            trainer(regression(), **settings).train()
    torch.manual_seed(1234)
    build = trainer(regression(), **settings)
    build.train(resume=True)
    assert_same(snapshot(tmp_path), expected)


WRITES = [(Run, "log"), (Checkpoints, "write"), (Run, "save_weights"), (Checkpoints, "prune")]


@pytest.mark.quick("1-True-*", "3-False-*")
@pytest.mark.parametrize(("owner", "name"), WRITES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_killed_between_two_files(
    count: int,
    after: bool,
    owner: type,
    name: str,
    whole: Build,
    regression: Build,
    trainer: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = whole()
    write, calls = getattr(owner, name), 0

    def deadly(*arguments: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            raise Killed
        write(*arguments, **named)
        if calls == count:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            trainer(regression()).train()
    trainer(regression()).train(resume=True)
    assert_same(snapshot(tmp_path), expected)


def test_the_loss_scale_is_restored(regression: Build, trainer: Build) -> None:
    first, second = trainer(regression()), trainer(regression())
    for build, scale in ((first, 512.0), (second, 4.0)):
        build.devices.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    first.train()
    assert second.devices.accelerator.scaler.get_scale() == 4.0
    second.train(resume=True)
    assert second.devices.accelerator.scaler.get_scale() == 512.0


def test_a_half_written_line_of_metrics(
    whole: Build, regression: Build, trainer: Build, tmp_path: Path
) -> None:
    expected = whole()
    build = trainer(regression())
    build._begin()
    for _ in range(3):
        build._step()
    build._evaluate()
    build._save()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "st')
    trainer(regression()).train(resume=True)
    assert_same(snapshot(tmp_path), expected)


def test_a_finished_training_trains_no_further(
    regression: Build, trainer: Build, tmp_path: Path
) -> None:
    trainer(regression()).train()
    before = snapshot(tmp_path)
    build = trainer(regression())
    build._step = None  # type: ignore[method-assign]
    assert build.train(resume=True) == "finished"
    assert_same(snapshot(tmp_path), before)


def test_without_resume_it_starts_anew(regression: Build, trainer: Build, tmp_path: Path) -> None:
    trainer(regression(), steps=24).train()
    trainer(regression()).train()
    assert [r["step"] for r in Run(tmp_path).metrics()] == [3, 6, 9, 12]
    assert Run(tmp_path).checkpoints.steps()[-1] == 12


def test_the_newest_is_damaged_and_deleted(
    whole: Build, regression: Build, trainer: Build, tmp_path: Path
) -> None:
    expected = whole(keep=3)
    trainer(regression(), keep=3).train()
    checkpoints = Run(tmp_path).checkpoints
    newest = checkpoints.path(12)
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"step-00000012\.safetensors is damaged"):
        trainer(regression(), keep=3).train(resume=True)
    newest.unlink()
    trainer(regression(), keep=3).train(resume=True)
    assert_same(snapshot(tmp_path), expected)


@pytest.mark.parametrize(("keep", "kill"), [(2, 15), (3, 18)])
def test_the_best_is_deleted(
    keep: int,
    kill: int,
    whole: Build,
    regression: Build,
    trainer: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, deadly = {3: 2.0, 6: 4.0, 9: 3.0, 12: 1.0, 15: 0.5, 18: 5.0}, set()
    evaluate = Trainer._evaluate

    def scripted(self: Trainer) -> None:
        step = self.course.step
        if step in deadly:
            raise Killed
        self.task.evaluate = lambda model: {"validation_loss": losses[step]}
        evaluate(self)

    monkeypatch.setattr(Trainer, "_evaluate", scripted)
    expected = whole(steps=18, keep=keep)
    deadly.add(kill)
    with pytest.raises(Killed):
        trainer(regression(), steps=18, keep=keep).train()
    deadly.clear()
    checkpoints = Run(tmp_path).checkpoints
    assert checkpoints.steps() == [3, 9, 12, 15][: keep + 1]
    for step in checkpoints.steps()[2:]:
        checkpoints.path(step).unlink()
    trainer(regression(), steps=18, keep=keep).train(resume=True)
    assert_same(snapshot(tmp_path), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 24},
        {"seed": 1},
        {"ema": 0.5},
        {"clip": 1.0},
        {"accumulate": 2},
        {"patience": 3},
        {"evaluate_every": 4},
        {"warmup": 0.2},
        {"precision": "bf16"},
    ],
)
def test_other_settings(change: dict[str, Any], regression: Build, trainer: Build) -> None:
    trainer(regression()).train()
    (name,) = change
    with pytest.raises(ValueError, match=f"with {name} .*, now it is .*settings of the start"):
        trainer(regression(), **change).train(resume=True)


def test_another_learning_rate(regression: Build, trainer: Build, network: Build) -> None:
    trainer(regression()).train()
    other = trainer(regression())
    other.rates = [0.5]
    with pytest.raises(ValueError, match=r"learning rates \[0\.02\], now it is \[0\.5\]"):
        other.train(resume=True)


def test_another_model(regression: Build, trainer: Build) -> None:
    trainer(regression()).train()
    wider = nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.1), nn.Tanh(), nn.Linear(9, 1)).double()
    with pytest.raises(ValueError, match=r"of another model: .*0\.weight is float64 \(5, 3\)"):
        trainer(regression(), wider).train(resume=True)


def test_metrics_that_are_lost(regression: Build, trainer: Build, tmp_path: Path) -> None:
    trainer(regression()).train()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 0 bytes, fewer than"):
        trainer(regression()).train(resume=True)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (torch.optim.RMSprop, {}, "AdamW, now it is RMSprop"),
        (torch.optim.AdamW, {"amsgrad": True}, "AdamW, now it is AdamW with amsgrad"),
        (torch.optim.SGD, {"momentum": 0.9}, "AdamW, now it is SGD with momentum"),
    ],
)
def test_another_optimizer(
    kind: type, options: dict[str, Any], said: str, regression: Build, trainer: Build,
    network: Build, tmp_path: Path,
) -> None:  # fmt: skip
    trainer(regression()).train()
    model = network()
    optimizer = kind(model.parameters(), lr=0.02, **options)
    plan = Plan(steps=12, evaluate_every=3, device="cpu")
    other = Trainer(model, optimizer, regression(), plan, Run(tmp_path))
    with pytest.raises(ValueError, match=f"with optimizer {said}: resume"):
        other.train(resume=True)


def test_the_average_of_narrow_weights_is_resumed_with_all_its_digits(
    regression: Build, trainer: Build, network: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(regression):  # type: ignore[valid-type, misc]
        def batch(self, *given: Any) -> dict[str, Any]:
            return {name: value.bfloat16() for name, value in super().batch(*given).items()}

        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"validation_loss": 1.0}

    whole = trainer(Narrow(), network().bfloat16(), ema=0.9)
    whole.train()
    expected = {name: value.clone() for name, value in whole.average.wide().items()}
    assert any((value != value.bfloat16()).any() for value in expected.values())
    again = trainer(Narrow(), network(3).bfloat16(), ema=0.9)
    again.train(resume=True)
    assert again.average.wide().keys() == expected.keys()
    for name, value in again.average.wide().items():
        assert torch.equal(value, expected[name]), name


def test_means_go_on_from_sums_that_a_version_without_counts_has_written() -> None:
    """Three steps of mean 2, then one of 4 that gives another name as well."""
    course = Course(step=3, sums={"loss": 6.0}, batches=3)
    assert course.means() == {"loss": 2.0}
    course.add({"loss": 4.0, "other": 1.0})
    assert course.means() == {"loss": 2.5, "other": 1.0}
    course.start_anew()
    course.add({"other": 3.0})
    assert course.means() == {"other": 3.0}


def test_a_checkpoint_of_an_earlier_version_names_its_best() -> None:
    course = Course(best_step=4)  # which knows no others
    course.bests.append(12)
    assert [course.best_until(step) for step in (9, 12)] == [4, 12]
