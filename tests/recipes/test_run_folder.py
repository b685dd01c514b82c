"""Whose a folder is: what an earlier run drew is cleared away, another process is refused."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from deep_implicit_attention.training import Run

from .conftest import TINY, Outcome, invoke


@pytest.mark.quick("run", "ising")
@pytest.mark.parametrize("kind", ["run", "said", "machines", "ising"])
def test_no_picture_of_an_earlier_run_stays(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "ising":
        dia: Callable[..., Outcome] = request.getfixturevalue("ising")
        folder = dia("--num-spins", "3", "--betas", "0.5").folder
        assert invoke(folder, "report", str(folder)).status == 0
    else:
        folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy"))

    def drawn() -> set[str]:
        return {p.name for p in folder.iterdir() if p.suffix in (".png", ".gif", ".html")}

    assert drawn()
    (folder / "holiday.png").write_text("mine")
    Run(folder).start({})
    assert drawn() == {"holiday.png"}


@pytest.mark.parametrize(
    ("where", "command"),
    [
        (Figure, f"train digits {TINY} --epochs 1"),
        (np, "ising --num-spins 3 --betas 0.5 --methods naive"),
        (Figure, "boltzmann --methods naive --l2 0.1"),
    ],
)
def test_what_is_killed_while_it_draws_leaves_nothing_half_drawn(
    command: str, where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(*arguments: Any, **_: Any) -> None:
        target = next(a for a in arguments if isinstance(a, Path | io.BytesIO))
        (target.write_bytes if isinstance(target, Path) else target.write)(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(where, "savefig" if where is Figure else "savez", half)
    folder = tmp_path / "run"
    invoke(folder, *command.split(), "--run-dir", str(folder))
    assert not [
        path for path in folder.iterdir() if path.is_file() and path.read_bytes() == b"half"
    ]


@pytest.mark.parametrize(
    "command", [f"train digits {TINY}", "ising --num-spins 3 --betas 0.5", "boltzmann"]
)
def test_only_one_process_writes_to_a_folder(command: str, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system locks no folders")
    folder = tmp_path / "run"
    run = Run(folder)
    flags = (*command.split(), "--run-dir", str(folder))
    with run.alone():
        run.start({"recipe": "mine"})
        assert f"another process writes to {folder}" in invoke(folder, *flags).complaint()
    assert run.config() == {"recipe": "mine"}
    with run.alone():  # it ends with the process that had it
        pass


@pytest.mark.parametrize("command", ["train digits", "ising", "boltzmann"])
def test_a_file_is_no_folder(command: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, there in (
        (file, "a file"),
        (file / "run", "a file"),
        (tmp_path / "link", "a link that leads nowhere"),
    ):
        flags = (*command.split(), "--run-dir", str(folder))
        told = invoke(folder, *flags).complaint()
        assert f"{folder} cannot be a folder: there is {there}" in told
    assert file.read_text() == "mine"
