"""Missing libraries are named with the line that installs them, and the core needs none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deep_implicit_attention.training import require

INSTALL = "pip install -c constraints.txt -e '.[train]'"


def test_a_module_that_is_there() -> None:
    import json.decoder

    assert require("json.decoder", "train") is json.decoder


@pytest.mark.parametrize("name", ["no_such_library_a", "no_such_library_b.part"])
def test_a_missing_module(name: str) -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        require(name, "train")
    assert name in str(caught.value)
    assert INSTALL in str(caught.value)


def test_a_broken_library_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library_with_a_gap.py").write_text("import the_gap_in_the_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as caught:
        require("library_with_a_gap", "train")
    assert caught.value.name == "the_gap_in_the_library"
    assert INSTALL not in str(caught.value)


def test_what_works_without_the_extras_and_brings_nothing_heavy() -> None:
    """All but machines, which are scikit-learn's; these say what installs it.

    What takes time to import the core is torch; its compiler comes when it is used.
    """
    blocked = ["accelerate", "tyro", "rich", "sklearn", "matplotlib", "pooch"]
    blocked += ["transformers", "scipy", "pandas", "torchvision"]
    program = "import sys\n"
    program += f"sys.modules.update(dict.fromkeys({blocked}))\n"
    for room in ["solvers", "deq", "attention", "models", "spins"]:
        program += f"import deep_implicit_attention.{room}\n"
    program += "assert 'torch._dynamo' not in sys.modules\n"
    for room in ["training", "recipes", "cli"]:
        program += f"import deep_implicit_attention.{room}\n"
    program += "print('all but machines', flush=True)\nimport deep_implicit_attention.boltzmann"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "all but machines\n", done.stderr
    assert done.returncode == 1
    assert "pip install -c constraints.txt -e '.[boltzmann]'" in done.stderr.splitlines()[-1]
