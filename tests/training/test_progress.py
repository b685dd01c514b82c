"""What a run says: whole lines to files, a live line to terminals."""

from __future__ import annotations

import pytest

from deep_implicit_attention.training import Progress

RECORD = {
    "epoch": 12,
    "train_loss": 0.12345,
    "train_accuracy": 0.9876,
    "validation_loss": 0.2,
    "validation_accuracy": 0.8765,
    "solver_steps": 9.34,
    "residual": 9.4e-4,
    "spectral_radius": 0.714,
    "seconds": 61.23,
}
MEANS = {"loss": 0.5, "accuracy": 0.25, "solver_steps": 7.0, "failed": 0.0}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_one_line_an_epoch_where_there_is_no_terminal(capsys: pytest.CaptureFixture) -> None:
    with Progress() as progress:
        progress.start(2, 3)
        for epoch in (1, 2):
            for _ in range(3):
                progress.batch(epoch, MEANS, 1e-3)
            progress.epoch({**RECORD, "epoch": epoch})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert [line.split()[0] for line in lines] == ["epoch", "1", "2"]
    assert len({len(line) for line in lines}) == 1  # right-aligned columns


def test_the_line_of_an_epoch_holds_its_numbers(capsys: pytest.CaptureFixture) -> None:
    with Progress() as progress:
        progress.start(20, 3)
        progress.epoch(RECORD)
    head, line = capsys.readouterr().out.splitlines()
    shown = line.split()
    assert shown[0] == "12"
    numbers = [float(s.rstrip("%")) / (100 if s.endswith("%") else 1) for s in shown[1:]]
    expected = [0.12345, 0.9876, 0.8765, 9.34, 9.4e-4, 0.714, 61.23]
    assert numbers == pytest.approx(expected, rel=1e-2)
    for title in ("loss", "accuracy", "validation", "solver steps", "residual", "spectral radius"):
        assert title in head


@pytest.mark.parametrize(
    "text", ["word " * 60, "in runs/[lr=0.1]/", "in runs/[bold]x[/bold]/", "a[/b]", "runs/:smile:"]
)
def test_text_is_said_as_it_is(text: str, capsys: pytest.CaptureFixture) -> None:
    with Progress() as progress:
        progress.say(text)
    assert capsys.readouterr().out == text + "\n"


def test_quiet(capsys: pytest.CaptureFixture) -> None:
    with Progress(quiet=True) as progress:
        progress.start(1, 1)
        progress.batch(1, MEANS, 1e-3)
        progress.epoch(RECORD)
        progress.say("hello")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_terminal_sees_the_running_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with Progress() as progress:
        progress.start(7, 3)
        progress.batch(5, MEANS, 3e-2)
        progress._bar.refresh()
    shown = capsys.readouterr().out
    for part in ("epoch 5/7", "1/3", "loss 0.500", "25.0%", "steps 7.0", "3e-02"):
        assert part in shown


def test_failed_solves_are_shown_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    for share, shown in ((0.0, False), (0.31, True)):
        with Progress() as progress:
            progress.start(1, 3)
            progress.batch(1, {**MEANS, "failed": share}, 3e-2)
            progress._bar.refresh()
        assert ("failed 31%" in capsys.readouterr().out) == shown


def test_other_columns_and_a_resumed_epoch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    columns = (("step", "{:>6d}", "step"), ("validation_perplexity", "{:>10.2f}", "perplexity"))
    with Progress(columns=columns, unit="round") as progress:
        progress.start(4, 30, 12)
        progress.batch(2, {"loss": 1.0, "bits": 1.25}, 0.0)
        progress._bar.refresh()
        progress.epoch({"step": 60, "validation_perplexity": 7.531})
    shown = capsys.readouterr().out
    for part in ("round 2/4", "13/30", "bits 1.25", "perplexity", "60        7.53"):
        assert part in shown


def test_columns_that_a_task_does_not_give_are_empty(capsys: pytest.CaptureFixture) -> None:
    with Progress() as progress:
        progress.start(2, 3)
        progress.epoch({"epoch": 1, "train_loss": 0.5, "seconds": 1.0})
    head, line = capsys.readouterr().out.splitlines()[:2]
    assert len(line) == len(head)
    assert "0.5" in line
    assert line.split().count("-") == len(Progress.COLUMNS) - 3
