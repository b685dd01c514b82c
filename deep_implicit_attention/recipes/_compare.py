"""What the recipe `ising` does: ask the methods, measure their errors, print, save and draw."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..deq import ConvergenceWarning
from ..solvers import Status
from ..spins import Exact, GibbsSampler, IsingPrior, Sampling, SpinSystem
from ..training import Run, require
from ._flags import refuse
from ._ising import Ising, Method
from ._made import save_arrays, save_figure

ANSWERS, FIGURE = "answers.npz", "ising.png"
EXACT, SAMPLED = "exact", "gibbs reference"
Answers = dict[str, "Answer"]


@dataclass(frozen=True)
class Answer:
    """What a method says of a system; the numbers are NaN where it did not converge.

    `note` is what a warning said of it.
    """

    status: str
    steps: int | None
    residual: float | None
    seconds: float
    magnetization: Tensor
    covariance: Tensor
    log_partition: float
    sampling: Sampling | None = None
    note: str = ""

    @property
    def sound(self) -> bool:
        """Whether there are numbers."""
        return math.isfinite(self.log_partition)

    def sizes(self) -> tuple[float, float, float]:
        """Mean |m_i|, mean |C_ij| for i ≠ j, and log Z."""
        return _sizes(self.magnetization, self.covariance, self.log_partition)

    def errors(self, reference: Answer) -> tuple[float, float, float]:
        """Mean |error| of m_i, of C_ij for i ≠ j, and |error| of log Z."""
        return _sizes(
            self.magnetization - reference.magnetization,
            self.covariance - reference.covariance,
            abs(self.log_partition - reference.log_partition),
        )


def run_ising(recipe: Ising) -> list[dict[str, Any]]:
    """Ask the methods, print the table, draw the figure; returns the lines of `metrics.jsonl`.

    Beyond the 2^24 states that can be enumerated errors are measured against a Gibbs sampler. Where
    its chains do not agree there is nothing to compare with: the table shows the methods' answers.
    """
    recipe.check()
    methods = recipe.build()
    couplings, x = recipe.load()
    reference = _reference(len(x), recipe)
    if EXACT in reference and "gibbs" not in methods:
        idle = ["samples"] if recipe.draws() else ["samples", "seed"]
        refuse(recipe, f"{len(x)} spins that are enumerated, without gibbs", *idle)
    methods = {**reference, **methods}
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    run = Run(recipe.run_dir)
    with run.alone():
        return _compare(recipe, run, methods, couplings, x)


def _compare(
    recipe: Ising, run: Run, methods: dict[str, Method], couplings: Tensor, x: Tensor
) -> list[dict[str, Any]]:
    run.start({"recipe": "ising", **vars(recipe)})

    console = require("rich.console", "train").Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, 100)  # a pipe has no width, and a table must not be cut
    betas = sorted({*recipe.betas, recipe.beta})
    answers: dict[float, Answers] = {}
    with console.status("") as status:
        for beta in betas:
            system, fields = _at(recipe, beta, couplings, x)
            answers[beta] = {}
            for name, method in methods.items():
                status.update(f"beta {beta:g}: {name}")
                answers[beta][name] = answer = _ask(method, system, fields)
                if name == EXACT and not answer.sound:
                    raise ValueError(f"at beta {beta:g} the exact answer is not a finite number")

    records = [_record(beta, name, answers[beta]) for beta in betas for name in answers[beta]]
    for record in records:
        run.log(**record)
    _save(run.folder / ANSWERS, *_at(recipe, recipe.beta, couplings, x), answers[recipe.beta])
    _print(console, recipe, answers[recipe.beta])
    contents = "metrics and answers"
    if _true(answers[recipe.beta]):
        _draw(run.folder / FIGURE, recipe, answers, magnetized=bool(x.any()))
        contents = "metrics, answers and figure"
    console.print(f"{contents} are in {run.folder}/", soft_wrap=True)
    return records


def _at(recipe: Ising, beta: float, couplings: Tensor, x: Tensor) -> tuple[SpinSystem, Tensor]:
    """The system at inverse temperature β: fields of an ensemble stay, those of a file do not."""
    return SpinSystem(beta * couplings, IsingPrior()), x if recipe.couplings is None else beta * x


def _reference(num_spins: int, recipe: Ising) -> dict[str, Method]:
    """What errors are measured against: enumeration, as far as it goes, then sampling.

    The sampler's seed is not that of the method "gibbs", whose errors are then honest ones.
    """
    exact = Exact()
    if 2**num_spins <= exact.max_states:
        return {EXACT: exact}
    return {SAMPLED: GibbsSampler(num_samples=recipe.samples, seed=recipe.seed + 1)}


def _true(answers: Answers) -> Answer | None:
    """The reference, which comes first, or None if it has no numbers."""
    reference = next(iter(answers.values()))
    return reference if reference.sound else None


def _ask(method: Method, system: SpinSystem, x: Tensor) -> Answer:
    """The answer of one method; of one that did not converge only the evidence."""
    start = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        response = method(system, x)
        solution = response.solution
        status = "done" if solution is None else str(solution.status[0])
        failed = solution is not None and not bool(solution.converged[0])
        m, log = response.magnetization, response.log_partition.item()
        covariance = torch.full_like(system.couplings, math.nan)
        if not failed:
            covariance = response.covariance
    seconds, note = time.perf_counter() - start, ""
    for warning in said:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        else:
            note = str(warning.message)
            if not failed:  # the response, or a method without a solution to tell of
                failed, status = True, "not converged" if solution is None else "no covariance"
    finite = bool(torch.isfinite(m).all() & torch.isfinite(covariance).all())
    if not failed and not (finite and math.isfinite(log)):
        failed, status = True, str(Status.NONFINITE)
    if failed:
        m, covariance, log = m * math.nan, covariance * math.nan, math.nan
    return Answer(
        status=status,
        steps=None if solution is None else int(solution.steps[0]),
        residual=None if solution is None else solution.residual[0].item(),
        seconds=seconds,
        magnetization=m,
        covariance=covariance,
        log_partition=log,
        sampling=response.sampling,
        note=note,
    )


def _pairs(covariance: Tensor) -> Tensor:
    """C_ij for i < j."""
    rows, columns = torch.triu_indices(*covariance.shape, offset=1)
    return covariance[rows, columns]


def _sizes(m: Tensor, covariance: Tensor, log: float) -> tuple[float, float, float]:
    return m.abs().mean().item(), _pairs(covariance).abs().mean().item(), log


def _noise(sampled: Answer) -> float:
    """Mean standard error of the magnetizations, NaN for an answer that was not sampled."""
    sampling = sampled.sampling
    return math.nan if sampling is None else sampling.standard_error.mean().item()


def _record(beta: float, name: str, answers: Answers) -> dict[str, Any]:
    """A line of `metrics.jsonl`."""
    answer, true, sampling = answers[name], _true(answers), answers[name].sampling
    m, covariance, log = (math.nan,) * 3 if true is None else answer.errors(true)
    record = {
        "beta": beta,
        "method": name,
        "status": answer.status,
        "log_partition": answer.log_partition,
        "magnetization_error": m,
        "covariance_error": covariance,
        "log_partition_error": log,
        "steps": answer.steps,
        "residual": answer.residual,
        "seconds": round(answer.seconds, 4),
    }
    if answer.note:
        record["note"] = answer.note
    if sampling is not None:
        record["r_hat"] = sampling.worst_r_hat.item()
        record["magnetization_standard_error"] = _noise(answer)
        record["log_partition_standard_error"] = sampling.log_partition_standard_error.item()
    return record


def _save(path: Path, system: SpinSystem, x: Tensor, answers: Answers) -> None:
    """The system of the table, and what each method says of it."""
    arrays: dict[str, Any] = {"couplings": system.couplings.numpy(), "fields": x.numpy()}
    for name, answer in answers.items():
        arrays[f"{name} magnetization"] = answer.magnetization.numpy()
        arrays[f"{name} covariance"] = answer.covariance.numpy()
    save_arrays(path, **arrays)


def _print(console: Any, recipe: Ising, answers: Answers) -> None:
    true = _true(answers)
    size = len(next(iter(answers.values())).magnetization)
    table = require("rich.table", "train").Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for head in ("m", "C", "log Z", "steps", "residual"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    for name, answer in answers.items():
        if name in (EXACT, SAMPLED):
            continue
        numbers = answer.sizes() if true is None else answer.errors(true)
        table.add_row(
            name,
            *(_show(number, ".4g" if true is None else ".1e") for number in numbers),
            _show(answer.steps, "d"),
            _show(answer.residual, ".1e"),
            answer.status,
            f"{answer.seconds:.2f}",
            style=None if answer.sound else "red",
        )
    for line in (recipe.describe(size), *_about(size, next(iter(answers.values())))):
        console.print(line, soft_wrap=True)
    console.print(table)
    failed = {n: answer for n, answer in answers.items() if n != SAMPLED and not answer.sound}
    if any(answer.status != "no covariance" for answer in failed.values()):
        console.print(
            "a method that did not converge has no numbers: for max_iter raise --max-iter or "
            "loosen --tol, for gibbs raise --samples, for anything else lower --beta",
            soft_wrap=True,
        )
    for name, answer in failed.items():
        if answer.status == "no covariance":
            console.print(f"{name}: {answer.note}", soft_wrap=True)


def _about(size: int, reference: Answer) -> list[str]:
    """What the errors of the table are measured against, and how far it can be trusted."""
    lines, sampling = [], reference.sampling
    if sampling is None:
        source = f"exact answer from 2^{size} states in {reference.seconds:.2f} s"
    else:
        lines.append(
            f"2^{size} states are too many to enumerate; Gibbs sampling instead: worst R-hat "
            f"{sampling.worst_r_hat.item():.3f}, standard errors of m {_noise(reference):.1e}, "
            f"of log Z {sampling.log_partition_standard_error.item():.1e}"
        )
        source = f"answer of the sampler in {reference.seconds:.1f} s"
    if not reference.sound:
        lines.append("its chains do not agree: raise --samples")
        return [*lines, "no errors; what the methods say, mean |m|, mean |C| and log Z:"]
    m, covariance, log = (_show(number, ".4g") for number in reference.sizes())
    lines.append(f"{source}: mean |m| {m}, mean |C| {covariance}, log Z {log}")
    return [*lines, "mean |error| of m and of C, and |error| of log Z:"]


def _show(number: float | None, pattern: str) -> str:
    return "-" if number is None or math.isnan(number) else format(number, pattern)


def _draw(path: Path, recipe: Ising, answers: dict[float, Answers], magnetized: bool) -> None:
    """Without fields all magnetizations vanish by symmetry, and their errors would be rounding or
    noise: the figure shows errors of covariances instead."""
    from .. import plots  # matplotlib takes a second to import

    here = answers[recipe.beta]
    reference, *names = here
    true = here[reference]
    sound = {name: here[name] for name in names if here[name].sound}
    index = 0 if magnetized else 1
    figure = plots.approximation_errors(
        true.magnetization.numpy(),
        {name: answer.magnetization.numpy() for name, answer in sound.items()},
        _pairs(true.covariance).numpy(),
        {name: _pairs(answer.covariance).numpy() for name, answer in sound.items()},
        list(answers),
        {
            name: [at[name].errors(at[reference])[index] for at in answers.values()]
            for name in names
        },
        beta=recipe.beta,
        reference="exact" if reference == EXACT else "Gibbs sampling",
        reference_error=[_noise(at[reference]) for at in answers.values()]
        if magnetized and reference != EXACT
        else (),
        error_label=f"mean |error| of {'magnetizations' if magnetized else 'covariances'}",
        beta_label="inverse temperature β (dimensionless, fields fixed)"
        if recipe.couplings is None
        else "inverse temperature β (dimensionless, 1 as loaded)",
        title=recipe.describe(len(true.magnetization)),
    )
    save_figure(path, figure)
