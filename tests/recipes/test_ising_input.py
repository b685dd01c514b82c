"""`dia ising` with systems and settings that it cannot use: one line says why."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_implicit_attention.recipes import Ising, _compare, run_ising

Command = Callable[..., Any]
FRUSTRATED = np.array([[0, 1, -1, 0], [1, 0, 1, 1], [-1, 1, 0, 0], [0, 1, 0, 0]])


def asymmetric() -> np.ndarray:
    J = FRUSTRATED.astype(float)
    J[1, 3] += 0.5
    return J


def spoilt(index: tuple[int, ...], value: float, array: Any = FRUSTRATED) -> np.ndarray:
    array = np.array(array, dtype=float)
    array[index] = value
    return array


FOUR = np.zeros(4)


@pytest.mark.parametrize(
    ("couplings", "x", "file", "says"),
    [
        (asymmetric(), FOUR, "J", r"symmetric.*J\[1, 3\]"),
        (spoilt((2, 3), np.nan), FOUR, "J", r"finite.*J\[2, 3\]"),
        (spoilt((2, 2), 1.0), FOUR, "J", "self-coupling.*i = 2"),
        (FRUSTRATED, spoilt((2,), np.inf, FOUR), "x", r"finite.*x\[2\]"),
        (FRUSTRATED, np.zeros(5), "x", r"\(4,\).*\(5,\)"),
        (FRUSTRATED, np.zeros((1, 4)), "x", r"\(4,\).*\(1, 4\)"),
        (FRUSTRATED[:3], FOUR, "J", r"\(N, N\).*\(3, 4\)"),
        (np.zeros((4, 4, 2, 2)), FOUR, "J", r"\(N, N\).*\(4, 4, 2, 2\)"),
        (np.zeros((0, 0)), np.zeros(0), "J", r"\(N, N\).*\(0, 0\)"),
        (np.float64(1.0), FOUR, "J", r"\(N, N\).*\(\)"),
        (FRUSTRATED.astype(complex), FOUR, "J", "complex128"),
        (FRUSTRATED.astype(bool), FOUR, "J", "bool"),
        (FRUSTRATED, np.array(list("abcd")), "x", "<U1"),
        (FRUSTRATED, np.array([None] * 4), "x", "[Oo]bject"),
        (FRUSTRATED * 1e308, FOUR, "", "beta 1.*not a finite number"),
    ],
)
def test_systems_that_are_none(
    couplings: Any, x: Any, file: str, says: str, ising: Command, saved: Callable
) -> None:
    run = ising(*saved(couplings, x), "--betas")
    line = run.complaint()
    assert re.search(says, line), line
    if file:
        assert f"{file}.npy" in line
        assert not run.folder.exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "header", "npz"])
def test_files_that_are_no_arrays(
    damage: str, ising: Command, saved: Callable, tmp_path: Path
) -> None:
    flags, path = saved(FRUSTRATED, FOUR), tmp_path / "J.npy"
    whole = path.read_bytes()
    path.unlink()
    if damage == "npz":
        np.savez(tmp_path / "J.npz", FRUSTRATED)
        (tmp_path / "J.npz").rename(path)
    elif damage != "missing":
        header = whole.replace(b"(4, 4)", b"(4, 4,")
        content = {"empty": b"", "text": b"0 1\n1 0\n", "truncated": whole[:-9], "header": header}
        path.write_bytes(content[damage])
    run = ising(*flags)
    assert str(path) in run.complaint()
    assert not run.folder.exists()


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.mkdir, (self.path,)


def test_files_are_never_executed(ising: Command, saved: Callable, tmp_path: Path) -> None:
    made = tmp_path / "made"
    run = ising(*saved(np.array([[Payload(made)]], dtype=object), np.zeros(1)))
    assert "J.npy" in run.complaint()
    assert not made.exists()


def test_a_run_that_fails_leaves_nothing_of_the_one_before(ising: Command, saved: Callable) -> None:
    assert ising("--num-spins", "4", "--betas", "--methods", "naive").status == 0
    failed = ising(*saved(FRUSTRATED * 1e308, FOUR))
    assert failed.complaint()
    assert failed.files() == {"config.json"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--couplings J.npy", "--fields"),
        ("--fields x.npy", "--couplings"),
        ("--couplings J.npy --fields x.npy --num-spins 4", "--num-spins"),
        ("--couplings J.npy --fields x.npy --field 1", "--field"),
        ("--couplings J.npy --fields x.npy --ensemble lattice", "--ensemble"),
        ("--patterns 3", "--patterns"),
        ("--samples 30", "--samples has no meaning for 12 spins that are enumerated"),
        ("--ensemble lattice --field 0 --seed 1", "--seed has no meaning for 12 spins"),
        ("--methods gibbs --tol 1e-3", "--tol has no meaning for gibbs, which is not iterated"),
        ("--methods gibbs --max-iter 9", "--max-iter has no meaning for gibbs"),
        ("--num-spins 3 4", "num_spins"),
        ("--num-spins 0", "num_spins"),
        ("--num-spins 1000000", "num_spins must be at most 5000, got 1000000"),
        ("--ensemble lattice --num-spins 1000 1000 1000", "num_spins .* got 1000000000"),
        ("--samples 3", "samples"),
        ("--num-spins", "num_spins"),
        ("--ensemble lattice --num-spins 3 0", "num_spins"),
        ("--ensemble hopfield --patterns 0", "patterns"),
        ("--field -1", "field"),
        ("--field inf", "field"),
        ("--seed -1", "seed"),
        ("--beta 0", "beta"),
        ("--beta nan", "beta"),
        ("--betas 1 -1", "betas"),
        ("--methods naive bethe", "'bethe'.*naive, tap, adaptive-tap"),
        ("--methods", "at least one"),
        ("--methods tap naive tap", "methods must differ, got tap naive tap"),
        ("--tol -1", "tol must be above 0, got -1.0"),
        ("--tol 0", "tol must be above 0, got 0.0"),
        ("--max-iter 0", "max_iter"),
        ("--threads -1", "threads"),
        ("--threads 9999", "threads must be from 0 to [0-9]+, the CPU cores here, got 9999"),
    ],
)
def test_settings_out_of_range(flags: str, says: str, ising: Command) -> None:
    run = ising(*flags.split())
    assert re.search(says, run.complaint())
    assert not run.folder.exists()


def test_an_ensemble_that_is_none() -> None:
    with pytest.raises(ValueError, match="sk, ferromagnet, hopfield, lattice"):
        run_ising(Ising(ensemble="bethe"))  # type: ignore[arg-type]


def test_a_run_folder_that_is_a_file(ising: Command, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert str(tmp_path / "run") in ising().complaint()
    assert (tmp_path / "run").read_text() == "mine"


def test_interrupt(ising: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_compare, "_ask", pressed)
    run = ising()
    assert run.status == 130
    assert run.err == "dia: interrupted\n"


@pytest.mark.parametrize("flags", ["--ensemble bethe", "--no-such-flag 1", "--num-spins many"])
def test_what_is_not_understood(flags: str, ising: Command) -> None:
    run = ising(*flags.split())
    assert run.status == 2
    assert run.err
    assert not run.folder.exists()
