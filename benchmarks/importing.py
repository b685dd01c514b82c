"""Time of importing the package beside `import torch`.

    python -m benchmarks.importing

Each import runs in a process of its own, all kinds in turns; the least CPU time of each counts,
since other work on the machine and cold caches only add.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from .page import machine, parse_out, provenance, write_results, write_section

TURNS = 5
# CPU time of importing the package over that of torch, at most; `.models` also loads
# huggingface_hub, whose class its models extend.
BAR = 1.2
NAMES = ("attention", "spins", "models")
STATEMENTS = {
    "torch": "import torch",
    "deep_implicit_attention": "import deep_implicit_attention",
    **{f".{name}": f"import deep_implicit_attention.{name}" for name in NAMES},
}


def seconds(statement: str) -> float:
    """CPU seconds of a fresh interpreter that runs `statement`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def least(turns: int) -> dict[str, float]:
    """The least time of each statement, without that of an interpreter that does nothing."""
    times = {name: float("inf") for name in STATEMENTS}
    nothing = min(seconds("pass") for _ in range(turns))
    for _ in range(turns):
        for name, statement in STATEMENTS.items():
            times[name] = min(times[name], seconds(statement) - nothing)
    return times


def main() -> None:
    page = parse_out(__doc__)
    times = least(TURNS)
    ratios = {name: max(taken, 0.0) / times["torch"] for name, taken in times.items()}
    lines = ["| import | time / `import torch` |", "|---|---|"]
    lines += [f"| `{name}` | {ratio:.2f} |" for name, ratio in ratios.items()]
    print(*lines, sep="\n")
    write_section(
        page,
        "Importing",
        f"{provenance()}. {machine()}.\n\nCPU time of an import in a fresh process, over that of "
        f"torch, least of {TURNS} turns. Names with a dot are subpackages; `.models` "
        "also loads huggingface_hub.\n\n" + "\n".join(lines),
    )
    write_results(page, "Importing", times)
    # What huggingface_hub takes, whose mixin models inherit from, is its own affair.
    if slow := [n for n, ratio in ratios.items() if ratio > BAR and n != ".models"]:
        raise SystemExit(f"{', '.join(slow)}: import takes more than {BAR} times `import torch`")


if __name__ == "__main__":
    main()
