"""Whose a folder is: what an earlier run drew is cleared away, another process is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

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
    for folder in (file, file / "run"):
        flags = (*command.split(), "--run-dir", str(folder))
        assert f"{folder} cannot be a folder" in invoke(folder, *flags).complaint()
    assert file.read_text() == "mine"
