"""`dia train shakespeare`, evaluate and generate, on a text of a few hundred characters."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch.nn import functional as F

from deep_implicit_attention import plots, training
from deep_implicit_attention.cli import main
from deep_implicit_attention.recipes import Shakespeare, _language, load_recipe
from deep_implicit_attention.training import Progress, Run
from examples import shakespeare as example

from .conftest import TEXT, Dia, Outcome, call_on_text, invoke
from .test_resume import assert_same_end, records


def loaded(folder: Path) -> Any:
    """The model of a run, with its weights, from its files."""
    run = Run(folder)
    model = load_recipe(run).model(len(set(TEXT)))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def ids(text: str) -> torch.Tensor:
    return torch.tensor([sorted(set(TEXT)).index(character) for character in text])


# --- training -------------------------------------------------------------------------------


@pytest.mark.quick("3-2")
@pytest.mark.parametrize(("relax", "learn"), [(3, 2), (0, 0), (2, 0)])
def test_the_same_batches_and_gradients_as_the_example(
    relax: int, learn: int, train: Dia, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--relax", str(relax), "--learn", str(learn), "--seed", "5"]
    run = train(*flags, "--iterations", "4")
    assert run.status == 0, run.err
    for name, value in {"LENGTH": 12, "BATCH": 4, "WARMUP": 2}.items():
        monkeypatch.setattr(example, name, value)
    torch.manual_seed(5)
    model = load_recipe(Run(run.folder)).model(len(set(TEXT)))
    example.train(model, ids(TEXT)[: int(len(TEXT) * 0.9)], 4, 5, relax, learn or None)
    last = Run(run.folder).checkpoints.read(4).parts["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(last[name], value), name


def test_the_metrics_are_those_of_the_saved_weights(trained: Outcome) -> None:
    *lines, last = records(trained.folder)
    assert [line["step"] for line in lines] == [2, 4, 6]
    model, validation = loaded(trained.folder), ids(TEXT)[int(len(TEXT) * 0.9) :]
    count = (len(validation) - 1) // 12
    losses, residuals = [], []
    with torch.no_grad():
        for k in range(count):
            seen = validation[12 * k : 12 * k + 12][None]
            scores, (solution,) = model(seen, return_solution=True, solver_fwd_tol=1e-6)
            losses.append(F.cross_entropy(scores[0], validation[12 * k + 1 : 12 * k + 13]))
            (f, _), *_ = model.maps(seen, (solution,))
            z = solution.value
            residuals.append((f(z) - z).norm() / f(z).norm())
    mean = torch.stack(losses).mean().item()
    assert last["validation_windows"] == count == len(losses) > 3
    assert last["validation_loss"] == pytest.approx(mean, rel=1e-4)
    assert 0 < last["validation_residual"] < last["validation_worst_residual"] <= 1e-5
    assert max(residuals) < 2e-6
    best = min(lines, key=lambda line: line["validation_loss"])
    assert last["best_step"] == best["step"]
    chosen = torch.stack([losses[k] for k in (0, round((count - 1) / 2), count - 1)])
    assert best["validation_windows"] == 3
    assert best["validation_loss"] == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert last["parameters"] == sum(p.numel() for p in model.parameters())
    assert all(2 <= line["solver_steps"] <= 5 for line in lines)  # 0 to 3, and 2
    assert all(0 < line["spectral_radius"] < 2 for line in lines)


def test_the_folder_of_a_run(trained: Outcome) -> None:
    assert trained.status == 0, trained.err
    assert trained.files() == {
        *("config.json", "metrics.jsonl", "model.safetensors", "checkpoints"),
        *("vocabulary.json", "sample.txt", "learning_curves.png"),
    }
    assert json.loads((trained.folder / "config.json").read_text())["recipe"] == "shakespeare"
    sample = (trained.folder / "sample.txt").read_text()
    assert len(sample) == 1 + 14 + 1
    vocabulary = json.loads((trained.folder / "vocabulary.json").read_text())
    assert vocabulary["characters"] == "".join(sorted(set(TEXT)))
    for line in records(trained.folder)[:-1]:
        assert len(line["sample"]) == 1 + 12
        assert line["sample"] in trained.out


def test_interrupted_and_resumed(
    train: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--dropout", "0.2", "--learn", "0", "--weight-norm", "--ema", "0.5"]
    assert train(*flags).status == 0
    (tmp_path / "run").rename(tmp_path / "whole")

    def pressed(self: Progress, now: int, *_: Any) -> None:
        if now == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "batch", pressed)
        run = train(*flags)
    assert run.status == 130
    assert "interrupted: testing the best weights so far" in run.out
    assert Run(run.folder).metrics()[-1]["interrupted"] is True
    run = train(*flags, "--resume")
    assert run.status == 0, run.err
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    for name in ("sample.txt", "vocabulary.json"):
        assert (run.folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_parts_of_a_batch_learn_the_same(train: Dia) -> None:
    whole = records(train("--relax", "0", "--learn", "0").folder)
    parts = records(train("--relax", "0", "--learn", "0", "--accumulate", "2").folder)
    for name in ("train_loss", "validation_loss"):
        for one, other in zip(whole[:-1], parts[:-1], strict=True):
            assert other[name] == pytest.approx(one[name], rel=1e-4)


def test_a_finished_run_says_so(trained: Outcome, text: Path) -> None:
    before = {path: path.read_bytes() for path in trained.folder.rglob("*") if path.is_file()}
    run = call_on_text(trained.folder, text, "--seed", "3", "--resume")
    assert run.status == 0, run.err
    assert "is finished, with validation loss" in run.out
    assert {path: path.read_bytes() for path in before} == before


def test_penalty_lowers_the_jacobian(train: Dia) -> None:
    flags = ["--iterations", "30", "--evaluate-every", "30", "--learning-rate", "0.01"]
    without = train(*flags)
    radius = records(without.folder)[0]["spectral_radius"]
    run = train(*flags, "--jacobian-penalty", "100")
    assert run.status == 0, run.err
    line = records(run.folder)[0]
    assert line["spectral_radius"] < 0.7 * radius
    total = line["train_cross_entropy"] + 100 * line["train_jacobian_penalty"]
    assert line["train_loss"] == pytest.approx(total, rel=1e-5)


def test_relaxation_and_learning_see_the_same_dropout() -> None:
    recipe = Shakespeare(dim=8, depth=1, heads=2, length=12, dropout=0.5, relax=300, learn=1)
    torch.manual_seed(0)
    model = recipe.model(len(set(TEXT))).train()
    task = recipe.task(training.text_data(TEXT))
    inputs, targets, drawn = task.batch(0, 0, torch.Generator().manual_seed(0))
    (solution,) = task.loss(model, (inputs, targets, torch.full_like(drawn, 300))).solutions
    assert solution.steps.unique().tolist() == [301]
    assert solution.residual.max() < 1e-4  # under another draw the state is no equilibrium


@pytest.mark.parametrize(
    "flags", ["--attention softmax", "--attention vector-spin", "--relax 0 --learn 0"]
)
def test_divergence_is_told_before_the_loss_is_no_number(flags: str, train: Dia) -> None:
    long = ["--iterations", "60", "--evaluate-every", "60", "--max-iter", "20"]
    run = train(*long, "--learning-rate", "1000", *flags.split())
    ended = re.search(r"not finite in step (\d+) .*--learning-rate", run.complaint())
    told = re.search(r"step (\d+) \(epoch .*lower --learning-rate", run.out)
    assert ended
    assert told
    assert int(told[1]) < int(ended[1])


def test_divergence_can_end_the_training(train: Dia) -> None:
    flags = "--learning-rate 30 --on-divergence stop --evaluate-every 1 --iterations 60"
    run = train(*flags.split())
    assert run.status == 0, run.err
    *lines, last = records(run.folder)
    assert last["ending"] == "diverged"
    assert len(lines) < 30
    assert lines[-1]["signs_of_divergence"]
    assert "the training diverges and is ended" in run.out


def test_learning_rates() -> None:
    plan = Shakespeare().plan()
    assert plan.rate(0) == pytest.approx(0.01)
    assert plan.rate(99) == 1
    assert plan.rate(1049) == pytest.approx(0.55)  # half way between 100 and 2000
    assert plan.rate(1999) == pytest.approx(0.1)
    assert Shakespeare(warmup=0, iterations=3).plan().rate(0) < 1


def test_settings_reach_the_model() -> None:
    recipe = Shakespeare(
        dim=12, depth=2, heads=3, attention="vector-spin", positions="rotary", length=7,
        dropout=0.3, weight_norm=True, rotary_base=50.0, solver="broyden", tol=0.01, max_iter=9,
    )  # fmt: skip
    config = recipe.model(5)._hub_mixin_config  # what `save_pretrained` keeps
    names = ("dim", "depth", "heads", "attention", "positions", "dropout", "weight_norm", "solver")
    for name in (*names, "rotary_base"):
        assert config[name] == getattr(recipe, name)
    assert (config["num_tokens"], config["max_seq_len"]) == (5, 7)
    for direction in ("fwd", "bwd"):
        assert config[f"solver_{direction}_tol"] == 0.01
        assert config[f"solver_{direction}_max_iter"] == 9


def test_the_sample_is_drawn_with_the_seed_of_the_run(trained: Outcome) -> None:
    sample = (trained.folder / "sample.txt").read_text()
    flags = ["--prompt", TEXT[int(len(TEXT) * 0.9)], "--max-new-tokens", "14", "--seed"]
    said = [invoke(trained.folder, "generate", str(trained.folder), *flags, seed).out
            for seed in ("3", "0")]  # fmt: skip
    assert said[0] == sample != said[1]


def test_the_curves_are_the_columns_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels: list[plots.Panel] = []
    monkeypatch.setattr(plots, "curves", lambda *given: panels.extend(given) or Figure((1, 1)))
    history = [
        {"step": 5 * k, "train_loss": 3.0, "validation_loss": 2.0 / k, "validation_residual": 1e-3}
        for k in (1, 2)
    ]
    _language._draw(Run(tmp_path), history)
    loss, residual = panels
    assert loss.lines == {"training": ([5, 10], [3.0, 3.0]), "validation": ([5, 10], [2.0, 1.0])}
    assert residual.lines == {"validation": ([5, 10], [1e-3, 1e-3])}
    assert (loss.yscale, residual.yscale) == ("linear", "log")
    panels.clear()
    _language._draw(Run(tmp_path), [{**record, "train_cross_entropy": 1.5} for record in history])
    assert panels[0].lines["training"] == ([5, 10], [1.5, 1.5])  # without the penalty


@pytest.mark.parametrize(("worst", "solved"), [(1e-3, True), (2e-3, False), (math.nan, False)])
def test_what_is_said_at_the_end(worst: float, solved: bool) -> None:
    result = {
        "validation_loss": 2.0, "validation_windows": 7, "best_step": 4, "training_seconds": 1.0,
        "validation_solver_steps": 5.0, "validation_residual": 3e-4,
        "validation_worst_residual": worst,
    }  # fmt: skip
    first, *others = _language._report(Shakespeare(tol=1e-3), result)
    assert "2.0000 nats per character over all 7 windows, weights of step 4" in first
    assert f"steps 5.0, mean residual 3.0e-04, worst {worst:.1e}" in first
    assert ("not every window reached equilibrium" in others[0]) is not solved


# --- evaluate and generate ------------------------------------------------------------------


def test_evaluate(trained: Outcome) -> None:
    run = invoke(trained.folder, "evaluate", str(trained.folder))
    assert run.status == 0, run.err
    (line,) = [line for line in run.out.splitlines() if line.startswith("validation_loss")]
    measured, logged = (float(number) for number in re.findall(r"\d\.\d+", line))
    assert measured == logged == pytest.approx(records(trained.folder)[-1]["validation_loss"], 1e-4)


@pytest.mark.parametrize("length", [5, 15])
def test_generate_says_what_the_model_says(length: int, trained: Outcome) -> None:
    """Within the window of 12, and beyond it; solved anew at every token, without a cache."""
    flags = ["--prompt", "one ", "--max-new-tokens", str(length), "--top-k", "7", "--seed", "4"]
    run = invoke(trained.folder, "generate", str(trained.folder), *flags, "--temperature", "0.8")
    assert run.status == 0, run.err
    model, said = loaded(trained.folder), ids("one ")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _ in range(length):
            scores = model(said[None, -12:], solver_fwd_tol=1e-6)[0, -1] / 0.8
            scores[scores < scores.sort().values[-7]] = -torch.inf
            chosen = torch.multinomial(scores.softmax(0)[None], 1, generator=generator)
            said = torch.cat([said, chosen[0]])
    assert run.out == "".join(sorted(set(TEXT))[k] for k in said.tolist()) + "\n"
    again = invoke(trained.folder, "generate", str(trained.folder), *flags, "--temperature", "0.8")
    assert again.out == run.out


def test_seeds_differ_and_temperature_zero_does_not(trained: Outcome) -> None:
    def said(*flags: str) -> str:
        options = ["--prompt", "t", "--max-new-tokens", "10", *flags]
        return invoke(trained.folder, "generate", str(trained.folder), *options).out

    assert said("--seed", "1") != said("--seed", "2")
    assert said("--seed", "1", "--temperature", "0") == said("--seed", "2", "--temperature", "0")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--prompt", "tÉn\n$"], "unknown characters '$É'"),
        (["--prompt", ""], "prompt must hold at least one character"),
        (["--prompt", "t", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "t", "--temperature", "-1"], "temperature"),
        (["--prompt", "t", "--top-k", "0"], "top_k"),
    ],
)
def test_generate_refuses(flags: list[str], part: str, trained: Outcome) -> None:
    run = invoke(trained.folder, "generate", str(trained.folder), *flags)
    assert part in run.complaint()


# --- what goes wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--heads 3", "heads"),
        ("--warmup 6", "warmup must be at least 0 and below iterations = 6"),
        ("--iterations 0 --warmup 0", "iterations must be at least 1, got 0"),
        ("--learn -1", "learn"),
        ("--relax -1", "relax must be at least 0, got -1"),
        ("--jacobian-penalty -1", "jacobian_penalty"),
        ("--evaluate-windows 0", "evaluate_windows"),
        ("--sample 0", "sample"),
        ("--positions learned --rotary-base 50", "--rotary-base has no meaning for positions le"),
        ("--learning-rate -1", "learning_rate"),
        ("--weight-decay -1", "weight_decay"),
        ("--dropout 1", "dropout"),
        ("--length 0", "dia: length must be at least 1, got 0"),
        (
            "--length 700",
            "bottles.txt: a training part of 562 characters is too short",
        ),
        (
            "--length 70",
            "bottles.txt: a validation part of 63 characters is too short",
        ),
        ("--batch-size 0", "batch_size"),
        ("--accumulate 3", "4 rows cannot be cut"),
        ("--seed -1", "seed must be"),
        ("--threads -1", "threads must be"),
        ("--text nowhere.txt", "nowhere.txt"),
    ],
)
def test_settings_out_of_range(flags: str, part: str, train: Dia, tmp_path: Path) -> None:
    assert part in train(*flags.split()).complaint()
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_earlier_version_may_have_idle_settings(train: Dia, tmp_path: Path) -> None:
    assert train("--positions", "learned").status == 0
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rotary_base": 50.0}))
    flags = ["--positions", "learned", "--rotary-base", "50"]
    assert "--rotary-base has no meaning" in train(*flags).complaint()
    resumed = train(*flags, "--resume")
    assert resumed.status == 0, resumed.err
    assert "is finished" in resumed.out


def test_help_reads_like_a_manual(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def told(*command: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    text = told("train", "shakespeare")
    for field in dataclasses.fields(Shakespeare):
        flag = re.escape("--" + field.name.replace("_", "-"))
        # The flag, what it takes or its negation, and then words on it.
        assert re.search(rf"{flag}\b[^\n]*\n?[^\n]*[a-z]{{2,}} [a-z]{{2,}}", text), field.name
    assert "without it Tiny Shakespeare" in text
    assert "--iterations INT" in text
    assert "(default: 2000)" in text
    assert "dia train shakespeare" in told()
    assert "the beginning of the text" in told("generate")
