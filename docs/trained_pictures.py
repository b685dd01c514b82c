"""Pictures of a trained model, of solvers and of a phase diagram, for `pictures.py`."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from deep_implicit_attention import plots, solvers
from deep_implicit_attention.attention import DEQMeanFieldAttention
from deep_implicit_attention.deq import DEQFixedPoint, spectral_radius
from deep_implicit_attention.models import ImageClassifier
from deep_implicit_attention.recipes import Digits, run_images
from deep_implicit_attention.recipes._images import sites_of, until_solved
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    Exact,
    GibbsSampler,
    IsingPrior,
    NaiveMeanField,
    SpinSystem,
    sherrington_kirkpatrick,
)
from deep_implicit_attention.training import Run, Split

STEPS = (1, 2, 3, 5, 8, 12)


@functools.cache
@torch.enable_grad()
def trained() -> tuple[ImageClassifier, Split]:
    """The classifier of `dia train digits --epochs 12`, and the test images."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Digits(run_dir=Path(folder), epochs=12)
        run_images(recipe)
        data = recipe.load()
        model = recipe.model(data)
        Run(recipe.run_dir).load_weights(model)
    return model.eval(), data.test


def from_black_to_white(images: torch.Tensor) -> np.ndarray:
    """The first image, from 0 to 1."""
    pixels = images[0, 0].numpy()
    return (pixels - pixels.min()) / (pixels.max() - pixels.min())


@torch.no_grad()
def graph() -> Figure:
    """The couplings that were learned, over a test image."""
    model, test = trained()
    image = test.images[:1]
    _, solutions = model(image, return_solution=True)
    strengths = model.couplings(image, solutions)[0, 0].mean(dim=0).numpy()
    pixels = from_black_to_white(image)
    places = (sites_of(model)[0] + 0.5) * model.image_size / model.grid - 0.5
    return plots.couplings_over_image(strengths, pixels, places)


@torch.no_grad()
def settling() -> Figure:
    """Magnetizations and residual of one test image, step by step."""
    model, test = trained()
    states, residuals = [], []
    for steps in range(1, 19):
        _, (solution,) = model(test.images[:1], steps=steps, return_solution=True)
        states.append(solution.value[0].numpy())
        residuals.append(solution.residual.item())
    return plots.relaxation(
        np.stack(states), residuals, emphasised=0, name="class token", tolerance=1e-3
    )


@torch.no_grad()
def maps() -> Figure:
    """How far each patch is from its equilibrium, step by step."""
    model, test = trained()
    image = test.images[:1]
    _, (solution,) = model(image, return_solution=True, solver_fwd_tol=1e-6)
    drawn = []
    for steps in STEPS:
        _, (relaxed,) = model(image, steps=steps, return_solution=True)
        gap = (relaxed.value - solution.value)[0, 1:].norm(dim=-1)
        drawn.append(gap.view(model.grid, model.grid).numpy())
    label = "distance of z_i from equilibrium (dimensionless)"
    return plots.magnetization_maps(
        np.stack(drawn), [f"step {k}" for k in STEPS], image=from_black_to_white(image), label=label
    )


@torch.no_grad()
def horizon() -> Figure:
    """Error of the trained weights as an explicit network of K steps."""
    model, test = trained()

    def error(**overrides: int) -> float:
        read = model(test.images, **overrides).argmax(dim=1)
        return 100 * (read != test.labels).double().mean().item()

    return plots.relaxation_horizon(
        STEPS,
        {"explicit steps": [error(steps=steps) for steps in STEPS]},
        {"equilibrium": error()},
        "error on the test images (%)",
    )


def solver_race() -> Figure:
    """The four solvers, without a preconditioner, on a layer whose update contracts slowly."""
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(16, 8, weight_sym_internal=True, weight_sym_sites=True)
    with torch.no_grad():
        module._weight.mul_(2.4)
    x = torch.randn(64, 16, 8) / 8**0.5
    traces, radii = {}, {}
    for name in ("picard", "anderson", "broyden", "newton_krylov"):
        layer = DEQFixedPoint(
            module, getattr(solvers, name), solver_fwd_tol=1e-6, solver_fwd_max_iter=40,
            solver_fwd_preconditioner=None, on_failure="ignore",
        )  # fmt: skip
        with torch.no_grad():
            z, solution = layer(x, return_solution=True)
        traces[name] = until_solved(solution)
        radii[name] = spectral_radius(layer.map(x), z).numpy()
    return plots.solver_comparison(traces, radii, 1e-6)


def phases() -> Figure:
    """Mean |m| of a Sherrington–Kirkpatrick system over temperature and field."""
    temperatures, fields = np.linspace(0.3, 2.0, 12), np.linspace(0.0, 1.0, 11)
    couplings, _ = sherrington_kirkpatrick(12, 1.0, 0.0, 1)
    methods: dict[str, Callable] = {
        "exact": Exact(),
        "naive mean field": NaiveMeanField(on_failure="ignore"),
        "TAP": TAP(on_failure="ignore"),
        "adaptive TAP": AdaptiveTAP(on_failure="ignore"),
    }
    answers, converged = {}, {}
    for name, method in methods.items():
        found = np.empty((len(temperatures), len(fields)))
        fine = np.ones_like(found, dtype=bool)
        for row, temperature in enumerate(temperatures):
            system = SpinSystem(couplings / temperature, IsingPrior())
            x = torch.from_numpy(np.tile(fields[:, None], 12)) / temperature
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                response = method(system, x)
            found[row] = response.magnetization.abs().mean(dim=-1).numpy()
            if response.solution is not None:
                fine[row] = response.solution.converged.numpy()
        answers[name] = found
        if name != "exact":
            converged[name] = fine
    return plots.phase_diagram(temperatures, fields, answers, converged)


def sampled() -> Figure:
    """Magnetizations by adaptive TAP and by a Gibbs sampler, which knows its own error."""
    couplings, x = sherrington_kirkpatrick(16, 0.9, 0.5, 2)
    system = SpinSystem(couplings, IsingPrior())
    gibbs = GibbsSampler(num_samples=300, num_chains=2, seed=0)(system, x)
    estimates = {
        "adaptive TAP": AdaptiveTAP()(system, x).magnetization,
        "Gibbs sampling": gibbs.magnetization,
    }
    assert gibbs.sampling is not None
    bars = {"Gibbs sampling": gibbs.sampling.standard_error}
    return plots.against_exact(Exact()(system, x).magnetization, estimates, bars)


PICTURES: dict[str, Callable[[], Figure]] = {
    "graph": graph,
    "settling": settling,
    "maps": maps,
    "horizon": horizon,
    "solvers": solver_race,
    "phases": phases,
    "sampled": sampled,
}
