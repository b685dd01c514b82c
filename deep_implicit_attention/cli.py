"""The command `dia`."""

# No `from __future__ import annotations`: tyro evaluates annotations that name local recipes.

import io
import os
import re
import sys
from pathlib import Path
from typing import Annotated

# What takes seconds to import is imported in `_run`, where an interruption is caught.

_DESCRIPTION = """Deep implicit attention: attention as the collective response of a spin system.

  dia train digits       a minute on a laptop, nothing to download
  dia train mnist        the 2021 project's task, at its size and schedule
  dia train mnist-vit    a vision transformer on MNIST, by any of the mechanisms
  dia train shakespeare  a language model of characters, of Tiny Shakespeare or a text of your own
  dia evaluate RUN       measures a finished run again, from its folder
  dia generate RUN       continues a text with the language model of a run
  dia report RUN         one HTML page on a run: curves, convergence, couplings, relaxation
  dia ising              mean-field methods beside the exact answer, on a system drawn or your own
  dia boltzmann          machines that learn binarised digits, and complete the lower half
"""
_TOO_MUCH = "allocate memory|out of memory|size calculation overflowed"
_TOO_LARGE = "int too (large|big) to convert|Overflow when unpacking|to type .* without overflow"


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `dia`; returns the exit status."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("dia: interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str] | None) -> int:
    from .training import require
    from .training._extras import check_installed

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the output cannot show must not end a training.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for library in ("accelerate", "sklearn", "rich", "matplotlib"):
            check_installed(library, "train")
        tyro = require("tyro", "train")
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    from . import recipes

    digits = Annotated[recipes.Digits, tyro.conf.subcommand("digits")]
    mnist = Annotated[recipes.Mnist, tyro.conf.subcommand("mnist")]
    shakespeare = Annotated[recipes.Shakespeare, tyro.conf.subcommand("shakespeare")]
    mnist_vit = Annotated[recipes.MnistViT, tyro.conf.subcommand("mnist-vit")]
    every = digits | mnist | mnist_vit | shakespeare
    # Without a name of its own the recipe's group of flags does not repeat its description.
    nameless = tyro.conf.arg(name="")

    def train(
        recipe: Annotated[tyro.conf.OmitSubcommandPrefixes[every], nameless],  # type: ignore
    ) -> int:
        """Train a model by a recipe: solver steps, residual and spectral radius are shown live.

        The folder of the run holds config.json, metrics.jsonl (one line an evaluation, the test
        last), model.safetensors (the best weights), checkpoints and pictures; of a language model
        also vocabulary.json and sample.txt. Ctrl-C tests and draws what
        was learned so far. A run that was interrupted or killed goes on with --resume and the same
        settings, to the same weights on a CPU. For several processes or devices:
        accelerate launch -m deep_implicit_attention.cli train RECIPE --device auto
        """
        if isinstance(recipe, recipes.Shakespeare):
            result = recipes.run_shakespeare(recipe)
        else:
            result = recipes.run_images(recipe)
        return 130 if result["interrupted"] else 0

    def evaluate(run: tyro.conf.Positional[Path]) -> int:  # type: ignore
        """Measure the test metrics of a finished run again, from the files in its folder.

        Prints them beside those that were logged; the exit status is 1 if they differ.

        Args:
            run: folder of the run
        """
        measured, logged = recipes.evaluate_run(run)
        for name, value in measured.items():
            print(f"{name:25} {value:<12.6g} logged {logged[name]:.6g}")
        if recipes.agree(measured, logged):
            return 0
        print(f"dia: the weights in {run} do not do what its metrics say", file=sys.stderr)
        return 1

    def generate(
        run: tyro.conf.Positional[Path],  # type: ignore
        prompt: str,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> int:
        """Continue a text with the language model of a run, from its best weights.

        Args:
            run: folder of the run
            prompt: the beginning of the text
            max_new_tokens: length of the continuation
            temperature: divides the logits; 0 takes the likeliest token, whatever top_k and seed
            top_k: draw from so many of the likeliest tokens only
            seed: random seed of the draws
        """
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        print(recipes.generate_run(run, prompt, **options, top_k=top_k, seed=seed))
        return 0

    def report(run: tyro.conf.Positional[Path], out: Path | None = None) -> int:  # type: ignore
        """Write what a run's folder tells as one HTML page that needs no network: configuration,
        results, curves, convergence, couplings, and a part in which one picks an example and moves
        through the relaxation steps.

        What is missing (no weights yet, data not there, settings of another version) is named in
        the page, and the rest is shown. It takes some seconds, for adaptive TAP a minute or more.

        Args:
            run: folder of the run
            out: where the page is written, by default report.html in the folder of the run
        """
        console = require("rich.console", "train").Console(stderr=True)
        with console.status("reading the run") as status:
            path = recipes.report_run(run, out, tell=lambda title: status.update(title))
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        return 0

    def ising(recipe: tyro.conf.OmitArgPrefixes[recipes.Ising]) -> int:  # type: ignore
        """Compare mean-field methods with the exact answer on a system of Ising spins, or with a
        Gibbs sampler where there are too many states to enumerate.

        The folder of the run holds config.json, metrics.jsonl (one line for each method and beta),
        answers.npz (couplings, fields, magnetizations and covariances of the table) and
        ising.png (magnetizations and covariances against the exact ones, error against beta).
        """
        recipes.run_ising(recipe)
        return 0

    def boltzmann(recipe: tyro.conf.OmitArgPrefixes[recipes.Boltzmann]) -> int:  # type: ignore
        """Let Boltzmann machines learn binarised digits by several methods, complete the lower half
        of held-out ones, and draw digits.

        The folder of the run holds config.json, metrics.jsonl (one line a method),
        machine.npz (couplings and fields of the best machine), completions.png and samples.png.
        """
        recipes.run_boltzmann(recipe)
        return 0

    app = tyro.extras.SubcommandApp()
    app.command(train)
    app.command(evaluate)
    app.command(generate)
    app.command(report)
    app.command(ising)
    app.command(boltzmann)
    try:
        try:
            return app.cli(args=arguments, prog="dia", description=_DESCRIPTION)
        finally:
            print(end="", flush=True)  # what fails at exit only is told in two lines
    except BrokenPipeError:
        # Who reads the output, as head does, has read enough: no complaint, not at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as rich ends a command
    except (ModuleNotFoundError, OSError, ValueError, FloatingPointError) as error:
        named = isinstance(error, OSError) and error.strerror and error.filename
        message = f"{error.filename}: {error.strerror}" if named else str(error)  # type: ignore
        print(f"dia: {message}", file=sys.stderr)
        return 1
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        # torch has no errors of its own for the memory of the host, and numbers that none holds.
        told = str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or re.search(_TOO_MUCH, str(error)):
            print(f"dia: too large for the memory here: {told}", file=sys.stderr)
        elif re.search(_TOO_LARGE, told):
            print(f"dia: a number is too large to compute with: {told}", file=sys.stderr)
        else:
            raise
        return 1


if __name__ == "__main__":
    sys.exit(main())
