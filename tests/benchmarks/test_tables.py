"""Lines of the tables of benchmarks: figures in their columns, ratios the right way up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import cuda, evaluations, horizon, importing, scaling, speed, trained
from benchmarks.page import command_line, write_results
from deep_implicit_attention.attention import DEQMeanFieldAttention
from deep_implicit_attention.training import Split

PEERS = {"anderson": 6.0, "broyden": 3.0, "fixed_point_iter": 9.0}
FORWARD = {"ours": 1.0, "literal": 8.0, "lean": 7.0, **PEERS, "explicit 1": 0.5, "explicit 6": 2.5}
BOTH = {"ours": 2.0, "literal": 8.0, "lean": 10.0, **PEERS, "explicit 1": 0.4, "explicit 6": 3.0}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def under(head: str, line: str) -> dict[str, str]:
    """The figures of a line by the heads of their columns."""
    return dict(zip(cells(head.splitlines()[0]), cells(line), strict=True))


def test_speed_is_the_time_of_rivals_over_ours() -> None:
    seconds = {"forward": {**FORWARD, "floor": 0.3}, "both": {**BOTH, "floor": 0.8}}
    found = {"seconds": seconds, "saved bytes": 3.21e6, "peak bytes": 4.4e7}
    workload = speed.Workload("some layer", lambda: None, (4, 5, 6), (8, 5))  # type: ignore
    assert under(speed.HEAD, speed.row(workload, found)) == {
        "layer": "some layer",
        "B, N, d": "4, 5, 6",
        "literal / ours, forward (bar)": "**8.0 (8)**",  # bold: the bar is reached
        "literal / ours, both (bar)": "4.0 (5)",
        "lean / ours, forward, both": "7.0, 5.0",
        "TorchDEQ / ours, forward, both": "3.0, 1.5",  # the best of three
        "explicit 1, 6 layers / ours, both": "0.2, 1.5",
        "floor / ours, forward": "0.3",
        "saved, MB": "3.2",
        "peak, MB": "44",
    }
    few = {way: {"ours": 1.0, "literal": 4.0, "explicit 1": 1.0, "explicit 6": 1.0}
           for way in seconds}  # fmt: skip
    line = under(speed.HEAD, speed.row(workload, {**found, "seconds": few, "peak bytes": None}))
    assert line["TorchDEQ / ours, forward, both"] == "–, –"
    assert line["lean / ours, forward, both"] == "–, –"
    assert line["peak, MB"] == "–"


def test_evaluations_residuals_and_errors_have_their_columns() -> None:
    counts = {"ours": 3, "plain": 4, "literal": 31, "anderson": 7, "broyden": 8}
    solves = {who: {"evaluations": number} for who, number in counts.items()}
    solves["ours"] |= {"residual": 1e-5, "error": 2e-5}
    solves["literal"] |= {"residual": 3e-4, "error": 4e-4}
    line = cells(speed.counts(speed.WORKLOADS[0], {"solves": solves}))
    assert len(line) == len(cells(speed.COUNTS_HEAD.splitlines()[0]))
    assert line[2:8] == ["3", "4", "31", "7", "8", "–"]
    assert line[8:] == ["1e-05", "3e-04", "2e-05", "4e-04"]


def test_speed_on_a_gpu() -> None:
    found = {
        "name": "some layer", "size": (4, 5, 6), "seconds": {"ours": 2.0, "literal": 9.0, **PEERS},
        "evaluations": 11, "residual": 2e-5, "synchronisations": [3, 5],
    }  # fmt: skip
    expected = ["some layer", "4, 5, 6", "4.5", "1.5", "11", "2e-05", "3, 5"]
    assert cells(cuda.row(found)) == expected


def test_speed_with_trained_weights() -> None:
    found = {
        "model": "vit", "tolerance": 1e-3, "seconds": {"ours": 2.0, "floor": 0.5, **PEERS},
        "evaluations": 11, "backward evaluations": 12, "plain evaluations": 13, "residual": 9e-4,
    }  # fmt: skip
    assert under(trained.HEAD, trained.row(found)) == {
        "model": "vit",
        "tolerance": "0.001",
        "TorchDEQ's best / ours, both": "1.5 (broyden)",
        "TorchDEQ's best / floor": "6.0",
        "evaluations, forward + backward": "11 + 12",
        "without preconditioner, forward": "13",
        "residual": "9e-04",
    }


@pytest.mark.parametrize(("rival", "good"), [(8, True), (6, False)])
def test_evaluations_are_means_over_seeds_and_held_against_the_best_peer(
    rival: int, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(_: Any, seed: int) -> dict[str, int | None]:
        ours = {"anderson": 4 + seed, "broyden": 7, "picard": None if seed == 3 else 9}
        peers = {"TorchDEQ anderson": rival, "TorchDEQ broyden": 5 + seed % 2}
        return {**ours, **peers, "TorchDEQ fixed_point_iter": 30}

    one = evaluations.Workload("some map", lambda: None, 2, 3, 4)  # type: ignore
    monkeypatch.setattr(evaluations, "WORKLOADS", [one])
    monkeypatch.setattr(evaluations, "count", count)
    body, (result,), verdict = evaluations.table()
    head, _, line = body.splitlines()
    assert under(head, line) == {
        "map": "some map", "B, N, d": "2, 3, 4", "anderson": "6.0", "broyden": "7.0",
        "picard": "> 100", "TorchDEQ anderson": f"{rival:.1f}", "TorchDEQ broyden": "5.4",
        "TorchDEQ fixed_point_iter": "30.0", "ours / best peer": "1.11",
    }  # fmt: skip
    assert verdict is good
    assert [found["anderson"] for found in result["evaluations"]] == [4, 5, 6, 7, 8]  # type: ignore


def test_exponents_of_growth() -> None:
    sizes = np.array([1, 2, 4, 8])
    assert scaling.slope(list(sizes), list(3.0 * sizes**2.5)) == pytest.approx(2.5)
    for layer, axis, exponent in (
        ("mean-field", 0, 1), ("mean-field", 1, 2), ("softmax, fused", 1, 2),
        ("softmax, as a matrix", 0, 1), ("adaptive TAP", 1, 3),
    ):  # fmt: skip
        large = [(1 << 20) if place == axis else 2 for place in range(3)]
        larger = [2 * size if place == axis else size for place, size in enumerate(large)]
        counts = [scaling.operations(layer, tuple(size)) for size in (large, larger)]  # type: ignore
        assert counts[1] / counts[0] == pytest.approx(2**exponent, rel=1e-3)


def test_operations_are_those_of_an_update() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module, x = DEQMeanFieldAttention(6, 4), torch.randn(3, 6, 4)
    with torch.no_grad():
        context = module.prepare(x)
        with FlopCounterMode(display=False) as counter:
            module.update(x, context)
    assert scaling.operations("mean-field", (3, 6, 4)) == counter.get_total_flops()


def test_imports_are_beside_that_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = {"pass": 0.5, "torch": 2.5, "deep_implicit_attention": 2.7, ".attention": 2.6}
    taken |= {".spins": 3.3, ".models": 4.5}
    statements = {"pass": "pass", **importing.STATEMENTS}
    of = {statement: taken[name] for name, statement in statements.items()}
    cold = set(of)

    def seconds(statement: str) -> float:
        slow = statement in cold
        cold.discard(statement)
        return of[statement] + slow  # the first time

    monkeypatch.setattr(importing, "seconds", seconds)
    assert importing.least(2) == pytest.approx(
        {n: s - 0.5 for n, s in taken.items() if n != "pass"}
    )
    monkeypatch.setattr(importing, "seconds", of.__getitem__)
    monkeypatch.setattr("sys.argv", ["importing", "--out", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit, match=r"^\.spins: import takes more than 1\.2"):
        importing.main()
    lines = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    ratios = ["1.00", "1.10", "1.05", "1.40", "2.00"]
    assert lines == [[f"`{name}`", r] for name, r in zip(importing.STATEMENTS, ratios, strict=True)]


def test_results_stand_under_their_titles(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    for title, result in (("First", [1]), ("Second", [2]), ("First", [3])):
        write_results(page, title, result, "make it")
    found = json.loads((tmp_path / "benchmarks.json").read_text())
    assert {title: made["results"] for title, made in found.items()} == {
        "First": [3],
        "Second": [2],
    }
    assert found["First"]["provenance"].startswith("`make it`; torch")


@pytest.mark.parametrize("steps", [4, None])
def test_a_horizon_is_measured_over_all_images(steps: int | None) -> None:
    """Six hundred images, in parts of 500 and 100: what each part gives counts by its size."""

    def model(images: torch.Tensor, **options: Any) -> Any:
        assert options["steps"] == steps
        count = len(images)
        scores = torch.eye(10)[torch.full((count,), 3 if count == 500 else 4)]
        residual = torch.full((count,), 1e-3 if count == 500 else 1e-1)
        taken = torch.full((count,), 2 if count == 500 else 8)
        least = SimpleNamespace(residual=residual / 10, steps=taken)
        return scores, [SimpleNamespace(residual=residual, steps=taken), least]

    model.loss = lambda scores, labels: torch.tensor(1.0 if len(labels) == 500 else 4.0)  # type: ignore
    split = Split(torch.zeros(600, 1, 1, 1), torch.full((600,), 3))
    name = "4" if steps else "equilibrium (6.0 solver steps)"  # of two blocks
    line = horizon.row(model, split, steps)  # type: ignore
    assert cells(line) == [name, "83.33%", "1.5000", "1.0e-03", "1.0e-01"]


@pytest.mark.parametrize("there", ["folder", "no/folder/page.md"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    there: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit):
        command_line("").parse_args(["--out", str(tmp_path / there)])
    assert str(tmp_path / there) in capsys.readouterr().err
    kept = command_line("").parse_args(["--out", str(tmp_path / "page.md")]).out
    assert kept == tmp_path / "page.md"
    assert not kept.exists()
