"""`dia train --resume` and `dia evaluate`: runs that are killed, changed, finished, or none."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deep_implicit_attention import recipes
from deep_implicit_attention.training import Progress, Run

from .conftest import TINY, invoke

ROOT = Path(__file__).parents[2]
Dia = Callable[..., Any]


def assert_same_end(one: Path, other: Path) -> None:
    """The same weights, last checkpoint and metrics, but for the time."""
    assert load_file(one / "model.safetensors").keys()
    for name in ("model.safetensors", f"checkpoints/{newest(one)}"):
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert newest(one) == newest(other)
    assert records(one) == records(other)


def newest(folder: Path) -> str:
    return max(path.name for path in (folder / "checkpoints").glob("*.safetensors"))


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]


# --- resume ---------------------------------------------------------------------------------


def test_interrupted_and_resumed(dia: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    flags = ["--epochs", "4", "--dropout", "0.1", "--shift", "1"]
    assert dia("digits", *flags).status == 0
    (tmp_path / "run").rename(tmp_path / "whole")

    def pressed(self: Progress, epoch: int, *_: Any) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "batch", pressed)
        assert dia("digits", *flags).status == 130
    assert Run(tmp_path / "run").metrics()[-1]["interrupted"] is True
    run = dia("digits", *flags, "--resume")
    assert run.status == 0, run.err
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    shown = [line.split()[0] for line in run.out.splitlines() if line and line.split()[0].isdigit()]
    assert shown[1:] == ["3", "4"]  # after the line that says how many images there are


def test_a_finished_run_says_so(finished: Any) -> None:
    before = {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file()}
    flags = [*TINY.split(), "--batch-size", "128", "--seed", "3", "--resume"]
    run = invoke(finished.folder, "train", "digits", "--run-dir", str(finished.folder), *flags)
    assert run.status == 0, run.err
    assert "is finished, with test accuracy" in run.out
    assert {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file()} == before


def test_nothing_to_resume_is_a_start(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    run = dia("digits", "--resume")
    assert run.status == 0
    assert [r.get("epoch") for r in records(run.folder)] == [1, 2, None]


def test_an_earlier_run_survives_settings_that_do_not_fit(
    dia: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    assert dia("digits").status == 0
    before = records(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "comet_ml", None)  # not installed
    for flags, part in (
        ("--accumulate 5", "32 rows cannot be cut"),
        ("--precision fp16", "fp16 needs an accelerator"),
        ("--ema 1", "ema must be"),
        ("--clip 0", "clip must be"),
        ("--trackers no_such_tracker", "unknown tracker 'no_such_tracker'; there are "),
        ("--trackers comet_ml", "pip install comet_ml"),
        ("--keep-checkpoints 0", "keep_checkpoints must be at least 1, got 0"),
    ):
        run = dia("digits", *flags.split())
        assert run.status == 1
        assert part in run.err
        assert records(tmp_path / "run") == before


def test_other_settings_are_refused(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    assert dia("digits").status == 0
    line = dia("digits", "--resume", "--dropout", "0.5", "--widths", "5").complaint()
    assert "started with dim" not in line
    for part in ("widths [4] (now [5])", "dropout 0.0 (now 0.5)", "leave out --resume"):
        assert part.split(" (")[0] in line
    assert "seed 0 (now 9)" in dia("digits", "--resume", "--seed", "9").complaint()
    run = dia("digits", "--resume", "--checkpoint-every", "1", "--keep-checkpoints", "9")
    assert run.status == 0


def test_a_run_of_another_recipe_is_named(dia: Dia, tmp_path: Path) -> None:
    Run(tmp_path / "run").start({"recipe": "ising"})
    line = dia("digits", "--resume").complaint()
    assert "is a run of ising, not of digits" in line
    assert "(now" not in line


@pytest.mark.quick("0-{*", "2-7")
@pytest.mark.parametrize("torn", ['{"epoch": 3, "st', '{"epoch": 3, "step": 9}\n[1', "\0" * 9, "7"])
@pytest.mark.parametrize("whole", [0, 2])
def test_a_last_line_of_metrics_that_is_torn(
    whole: int, torn: str, dia: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill or a power failure leaves it, after so many of the two epochs."""
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    assert dia("digits", "--keep-checkpoints", "9").status == 0
    expected = records(tmp_path / "run")
    run = Run(tmp_path / "run")
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "metrics.jsonl").write_text("".join(lines[:whole]) + torn)
    for step in run.checkpoints.steps()[whole:]:
        run.checkpoints.path(step).unlink()
    line = invoke(run.folder, "evaluate", str(run.folder)).complaint()
    assert "is not finished: dia train digits --resume" in line
    resumed = dia("digits", "--resume", "--keep-checkpoints", "9")
    assert resumed.status == 0, resumed.err
    assert records(run.folder) == expected


@pytest.mark.parametrize("case", ["truncated", "other model", "weights"])
def test_checkpoints_that_do_not_fit(
    case: str, dia: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    assert dia("digits", "--widths", "5").status == 0
    foreign = (tmp_path / "run" / "checkpoints" / newest(tmp_path / "run")).read_bytes()
    assert dia("digits").status == 0
    run = Run(tmp_path / "run")
    run.cut_metrics(run.metrics_size() - 5)  # not finished
    path = run.folder / "checkpoints" / newest(run.folder)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif case == "other model":
        path.write_bytes(foreign)
    else:
        save_file(load_file(run.folder / "model.safetensors"), path)
    (run.folder / "metrics.jsonl").write_text('{"epoch": 1}\n' * 100)
    line = dia("digits", "--resume").complaint()
    assert str(path) in line
    expected = {"truncated": "damaged", "other model": "another model", "weights": "not a check"}
    assert expected[case] in line


# --- evaluate -------------------------------------------------------------------------------


def test_evaluate_measures_what_was_logged(finished: Any) -> None:
    result = records(finished.folder)[-1]
    run = invoke(finished.folder, "evaluate", str(finished.folder))
    assert run.status == 0, run.err
    shown = {line.split()[0]: line.split()[1:] for line in run.out.splitlines()}
    assert set(shown) == {name for name in result if name.startswith("test_")}
    for name, (measured, _, logged) in shown.items():
        assert measured == logged
        assert float(measured) == pytest.approx(result[name], rel=1e-5)


def test_evaluate_notices_other_weights(finished: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["head.1.bias"] += torch.arange(10.0)
    save_file(weights, path)
    run = invoke(folder, "evaluate", str(folder))
    assert run.status == 1
    assert "do not do what its metrics say" in run.err
    shown = {line.split()[0]: line.split()[1:] for line in run.out.splitlines()}
    measured, _, logged = shown["test_loss"]
    assert float(logged) == pytest.approx(records(folder)[-1]["test_loss"], rel=1e-5)
    assert float(measured) > 2 * float(logged)


def test_measurements_agree_but_for_rounding() -> None:
    logged = {"test_loss": 0.5, "test_accuracy": 1.0, "test_residual": 1e-4}
    for change, same in (
        ({"test_loss": 0.50001}, True),
        ({"test_loss": 0.501}, False),
        ({"test_accuracy": 1 - 1 / 360}, False),
        ({"test_residual": 2e-4}, True),  # of the last digits of the state
    ):
        assert recipes.agree({**logged, **change}, logged) is same


def test_evaluate_what_is_no_finished_run(finished: Any, dia: Dia, tmp_path: Path) -> None:
    line = invoke(tmp_path, "evaluate", str(tmp_path / "nothing")).complaint()
    assert "holds no run" in line
    folder = tmp_path / "some"
    Run(folder).start({"recipe": "ising"})
    assert "a run of ising" in invoke(folder, "evaluate", str(folder)).complaint()
    Run(folder).start(Run(finished.folder).config())
    assert "is not finished" in invoke(folder, "evaluate", str(folder)).complaint()
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in invoke(folder, "evaluate", str(folder)).complaint()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[1]", "it must be an object, got list"),
        ("null", "it must be an object, got NoneType"),
        ("\xff", "utf-8"),
        ({"dim": "x"}, "setting dim must be int, got 'x'"),
        ({"widths": 4}, "setting widths must be tuple[int, ...], got 4"),
        ({"tol": None}, "setting tol must be float, got None"),
    ],
)
def test_settings_that_are_damaged(content: Any, part: str, finished: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    path = folder / "config.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_bytes(content.encode("latin-1"))
    line = invoke(folder, "evaluate", str(folder)).complaint()
    assert f"{path} is damaged" in line
    assert part in line


@pytest.mark.parametrize("value", ["0.9", [1], True])
def test_a_metric_that_is_no_number(value: object, finished: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    path = folder / "metrics.jsonl"
    *before, last = path.read_text().splitlines()
    last = json.dumps({**json.loads(last), "test_accuracy": value})
    path.write_text("\n".join([*before, last]))
    line = invoke(folder, "evaluate", str(folder)).complaint()
    assert (
        f"last line of metrics.jsonl is damaged: test_accuracy must be a number, got {value!r}"
        in line
    )


@pytest.mark.parametrize(
    ("name", "damage", "part"),
    [
        ("seconds", '"a"', "line 1 of metrics.jsonl is damaged: seconds must be a number, got 'a'"),
        ("train_loss", None, "train_loss must be a number, got 'nothing'"),
        ("epoch", "9", "no line of epoch 1, the best"),
    ],
)
def test_an_evaluation_that_was_changed_before_the_end(
    name: str, damage: str | None, part: str, dia: Dia, tmp_path: Path
) -> None:
    dia("digits", "--epochs", "1")
    path = tmp_path / "run" / "metrics.jsonl"
    line = path.read_text().splitlines()[0]
    number = re.escape(json.dumps(json.loads(line)[name]))
    # Of the same length, since the checkpoint knows where the metrics ended.
    new = f'"{name}": {damage}' if damage else f'"x{name[1:]}": 1'
    changed = re.sub(f'"{name}": {number}', new, line).ljust(len(line))
    path.write_text(changed + "\n")
    assert part in dia("digits", "--epochs", "1", "--resume").complaint()


# --- generate -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Echo:
    """A recipe whose model repeats the prompt."""

    run_dir: Path
    sizes: tuple[int, ...] = (1,)

    def generate(self, run: Run, prompt: str, **options: Any) -> str:
        assert run.folder == self.run_dir
        assert self.sizes == (3, 4)
        return f"{prompt} {prompt} {sorted(options.items())}"


def test_generate_asks_the_recipe_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipes._saved.RECIPES, "echo", Echo)
    Run(tmp_path).start({"recipe": "echo", "run_dir": tmp_path, "sizes": (3, 4)})
    run = invoke(tmp_path, "generate", str(tmp_path), "--prompt", "To be", "--top-k", "5")
    assert run.status == 0, run.err
    options = "('max_new_tokens', 200), ('seed', 0), ('temperature', 1.0), ('top_k', 5)"
    assert run.out == f"To be To be [{options}]\n"


def test_generate_by_a_classifier(finished: Any) -> None:
    run = invoke(finished.folder, "generate", str(finished.folder), "--prompt", "x")
    assert "a run of digits: dia generate needs a run of a language model" in run.complaint()


@pytest.mark.parametrize("recipe", ["ising", "boltzmann", ["digits"]])
def test_generate_by_what_is_no_training(recipe: object, tmp_path: Path) -> None:
    Run(tmp_path).start({"recipe": recipe})
    line = invoke(tmp_path, "generate", str(tmp_path), "--prompt", "x").complaint()
    assert f"a run of {recipe}: dia generate needs a run of a language model" in line


# --- SIGKILL --------------------------------------------------------------------------------


def launch(folder: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "deep_implicit_attention.cli", "train", "digits", *flags]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--run-dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def killed(folder: Path, flags: list[str], head: bool, delay: float) -> bool:
    """Kill a run `delay` seconds after its start, or after the head of its table; was it alive?"""
    process = launch(folder, flags)
    assert process.stdout
    if head:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
    time.sleep(delay)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert alive or process.returncode == 0, output
    return alive


def finish(folder: Path, flags: list[str]) -> str:
    process = launch(folder, flags)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*TINY.split(), "--epochs", "6", "--dropout", "0.1", "--checkpoint-every", "7"]
    flags += ["--validation", "0.8"]
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    whole = invoke(tmp_path, "train", "digits", *flags, "--run-dir", str(tmp_path / "whole"))
    assert whole.status == 0
    assert killed(tmp_path / "run", flags, True, 0.2)
    finish(tmp_path / "run", [*flags, "--resume"])
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    flags = ["--epochs", "80", "--dropout", "0.1", "--ema", "0.9", "--checkpoint-every", "9"]
    finish(tmp_path / "whole", flags)
    chance = random.Random(0)
    kills = 0
    for _ in range(20):
        # A fifth of the kills fall into the start, the others into the training.
        head = chance.random() > 0.2
        delay = chance.uniform(0.0, 1.5 if head else 4.0)
        kills += killed(tmp_path / "run", [*flags, "--resume"], head, delay)
    assert kills == 20  # the run is long enough for all of them
    finish(tmp_path / "run", [*flags, "--resume"])
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_evaluate_reads_what_is_not_finite(finished: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    *lines, last = (folder / "metrics.jsonl").read_text().splitlines()
    record = json.loads(last)
    for change, said in (
        ({"test_residual": None}, ""),
        ({"test_loss": None}, "do not do what its metrics say"),
        ({"test_loss": ...}, "the last line of metrics in .* lacks test_loss"),
    ):
        changed = {k: v for k, v in {**record, **change}.items() if v is not ...}
        (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(changed)]) + "\n")
        run = invoke(folder, "evaluate", str(folder))
        assert run.status == bool(said)
        assert re.search(said, run.err)
        assert "Traceback" not in run.err


def test_folders_may_be_strings(finished: Any) -> None:
    measured, logged = recipes.evaluate_run(str(finished.folder))
    assert recipes.agree(measured, logged)
    assert Run(str(finished.folder)).folder == finished.folder
