"""The command `dia`."""

# No `from __future__ import annotations`: tyro evaluates annotations that name local recipes.

import sys
from typing import Annotated

from .training import require

_DESCRIPTION = """Deep implicit attention: attention as the collective response of a spin system.

  dia train digits      a minute on a laptop, nothing to download
  dia train mnist       the 2021 project's task, at its size and schedule
  dia ising             mean-field methods beside the exact answer, on a system drawn or your own
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `dia`; returns the exit status."""
    try:
        tyro = require("tyro", "train")
        for module in ("sklearn", "rich", "matplotlib"):
            require(module, "train")
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    from . import recipes

    digits = Annotated[recipes.Digits, tyro.conf.subcommand("digits")]
    mnist = Annotated[recipes.Mnist, tyro.conf.subcommand("mnist")]

    def train(recipe: tyro.conf.OmitSubcommandPrefixes[digits | mnist]) -> int:  # type: ignore
        """Train a model by a recipe: solver steps, residual and spectral radius are shown live.

        The folder of the run holds config.json, metrics.jsonl (one line an epoch, the test last),
        model.safetensors (the best epoch) and pictures. Ctrl-C tests and draws what was learned
        so far.
        """
        return 130 if recipes.run_images(recipe)["interrupted"] else 0

    def ising(recipe: tyro.conf.OmitArgPrefixes[recipes.Ising]) -> int:  # type: ignore
        """Compare mean-field methods with the exact answer on a system of Ising spins, or with a
        Gibbs sampler where there are too many states to enumerate.

        The folder of the run holds config.json, metrics.jsonl (one line for each method and beta),
        answers.npz (couplings, fields, magnetizations and covariances of the table) and ising.png
        (magnetizations and covariances against the exact ones, error against beta).
        """
        recipes.run_ising(recipe)
        return 0

    app = tyro.extras.SubcommandApp()
    app.command(train)
    app.command(ising)
    try:
        return app.cli(args=arguments, prog="dia", description=_DESCRIPTION)
    except (ModuleNotFoundError, OSError, ValueError, FloatingPointError) as error:
        named = isinstance(error, OSError) and error.strerror and error.filename
        message = f"{error.filename}: {error.strerror}" if named else str(error)  # type: ignore
        print(f"dia: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dia: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
