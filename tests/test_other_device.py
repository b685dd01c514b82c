"""Nothing that a layer, a method or a model makes stays behind on the host."""

import subprocess
import sys
from pathlib import Path


def test_everything_runs_on_another_device():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.other_device"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("ok\n"), run.stderr
