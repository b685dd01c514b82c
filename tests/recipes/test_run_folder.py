"""A run that starts anew clears away what an earlier one drew, whatever it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deep_implicit_attention.training import Run

from .conftest import Outcome, invoke


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
