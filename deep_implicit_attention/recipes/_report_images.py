"""What the report says of a run that learned from images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import plots
from ..models import ImageClassifier
from ..plots._page import Section, explorer, image, packed, paragraph
from ..training import ImageData, Measured, Split, measure
from ..training._state import weights
from ._image_recipe import ImageRecipe
from ._images import sites_of, until_solved
from ._report_page import CURVES, Story, pictures

NAMES = [str(digit) for digit in range(10)]
_LOOKED_AT = 1000  # test images from which figures are made
_HORIZON_IMAGES = 400  # every step of adaptive TAP costs the cube of all components
_MOST_STEPS = 24
_HORIZON = (1, 2, 3, 4, 6, 8, 12, 16, 24)
_NUMBERS = 400_000  # magnetizations in the page at most, 2 bytes each
_COMPONENTS = 16  # of a site that are shown
_SHOWN = 24  # examples at most
_FRAMES, _FEWEST = 40, 3  # of the animation


def image_sections(story: Story, recipe: ImageRecipe) -> list[Section]:
    """Relaxation, curves, convergence, couplings and errors, as far as they can be had."""
    sections = [story.attempt(CURVES, lambda: _curves(story)) or Section("Training")]
    model, data = _model(story, recipe)
    if model is None or data is None:
        return sections
    test = data.test[torch.arange(min(_LOOKED_AT, len(data.test)))]
    first = Section("Watch it settle")
    measured = measure(model, test)
    story.data = explored(model, test, measured.predictions, recipe.tol)
    first.add(paragraph(_EXPLANATION), explorer("image"))
    return [
        first,
        *sections,
        _convergence(model, test, measured, recipe),
        _couplings(story, model, test),
        _errors(test, measured, len(data.test)),
    ]


_EXPLANATION = (
    "Pick a test image and move through the relaxation: the same weights after 1, 2, … plain steps "
    "of z ← F(z; x), and, last, at the equilibrium that the solver finds. In the first step every "
    "site answers what it starts from; with more steps sites hear of each other. Of several blocks "
    "the last one's magnetizations are shown. Arrow keys move the slider."
)


def _model(story: Story, recipe: ImageRecipe) -> tuple[ImageClassifier | None, ImageData | None]:
    data = story.attempt("The images cannot be read, so figures that need them are missing",
                         recipe.load)  # fmt: skip
    if data is None:
        return None, None

    def build() -> ImageClassifier:
        model = recipe.model(data)
        story.run.load_weights(model)
        return model.eval()

    model = story.attempt("The model cannot be looked into", build)
    return model, data


def _curves(story: Story) -> Section:
    section, history = Section("Training"), story.history
    if not history:
        return section

    def column(name: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
        values = [record.get(name) for record in history]
        numbers = [math.nan if value is None else scale * value for value in values]
        return [record.get("epoch", record["step"]) for record in history], numbers

    def error(name: str) -> tuple[list[float], list[float]]:
        epochs, accuracies = column(name, 100)
        return epochs, [100 - accuracy for accuracy in accuracies]

    loss = plots.Panel(
        "epoch", "cross-entropy (nats)",
        {"training": column("train_loss"), "validation": column("validation_loss")}, yscale="log",
    )  # fmt: skip
    wrong = plots.Panel(
        "epoch", "error (%)",
        {"training": error("train_accuracy"), "validation": error("validation_accuracy")},
    )  # fmt: skip
    steps = plots.Panel("epoch", "solver steps (mean)", {"training": column("solver_steps")})
    radius = plots.Panel(
        "epoch", "spectral radius of ∂F/∂z (dimensionless)",
        {"validation": column("spectral_radius"), "plain iteration contracts below":
         ([column("step")[0][0], column("step")[0][-1]], [1.0, 1.0])},
    )  # fmt: skip
    section.add(
        pictures(
            (plots.curves(loss), "Loss by epoch; training images are augmented"),
            (plots.curves(wrong), "Error by epoch"),
            (plots.curves(steps), "How many steps the solver takes"),
            (
                plots.curves(radius, reference=("plain iteration contracts below",)),
                "How close the update is to not contracting",
            ),
        )
    )
    return section


@torch.no_grad()
def explored(model: ImageClassifier, test: Split, read: Tensor, tol: float) -> dict[str, Any]:
    """What the moving part shows: test images after 1, 2, ... steps and at equilibrium; `read` are
    the classes that were read."""
    sites = len(sites_of(model)[1])
    parts = min(model.dim, _COMPONENTS)
    count = max(1, min(_SHOWN, _NUMBERS // (sites * parts * (_MOST_STEPS + 1))))
    chosen = _examples(test.labels, read, count)
    images = test.images[chosen]

    def frame(**overrides: Any) -> tuple[Tensor, Tensor, Tensor]:
        scores, solutions = model(images, return_solution=True, **overrides)
        residual = torch.stack([solution.residual for solution in solutions]).amax(dim=0)
        return solutions[-1].value, scores.softmax(dim=1), residual

    frames = [frame(steps=1)]
    while len(frames) < _MOST_STEPS and bool((frames[-1][2] > tol).any()):
        frames.append(frame(steps=len(frames) + 1))
    frames.append(frame())
    z, p, residual = (torch.stack(some, dim=1) for some in zip(*frames, strict=True))
    z = z.nan_to_num(0.0, 0.0, 0.0)
    lengths = z.norm(dim=-1)
    distance = (z - z[:, -1:]).flatten(2).norm(dim=2) / z[:, -1:].flatten(2).norm(dim=2)
    size, length = z.abs().max().item() or 1.0, lengths.max().item() or 1.0
    return {
        "kind": "image",
        "grid": model.grid,
        "token": model.token is not None,
        "dim": model.dim,
        "classes": NAMES,
        "steps": list(range(1, len(frames))),
        "tol": tol,
        "size": size,
        "length": length,
        "examples": [
            {"index": int(i), "label": int(test.labels[i]), "read": int(read[i])} for i in chosen
        ],
        "pixels": packed(_grey(images).permute(0, 2, 3, 1).numpy()),
        "z": packed((z[..., :parts] / size).numpy()),
        "lengths": packed((lengths / length).numpy()),
        "probabilities": packed(p.nan_to_num(0.0).numpy()),
        "residuals": [[float(f"{r:.3g}") for r in row] for row in residual.tolist()],
        "distances": [[float(f"{d:.4g}") for d in row] for row in distance.tolist()],
    }


def _examples(labels: Tensor, read: Tensor, count: int) -> Tensor:
    """Numbers of images: some that were read wrongly, then the first ones of each class."""
    wrong = (labels != read).nonzero().flatten().tolist()[: max(1, count // 4)]
    seen = [0] * len(NAMES)
    turns = []
    for index, label in enumerate(labels.tolist()):
        turns.append((seen[label], label, index))
        seen[label] += 1
    rest = [index for _, _, index in sorted(turns) if index not in wrong]
    return torch.tensor(sorted((wrong + rest)[:count]))


def _grey(images: Tensor) -> Tensor:
    """From standardised values to 0, the darkest of all, to 1."""
    low, high = images.min(), images.max()
    return (images - low) / (high - low).clamp_min(1e-12)


@torch.no_grad()
def _convergence(
    model: ImageClassifier, test: Split, measured: Measured, recipe: ImageRecipe
) -> Section:
    section = Section("Convergence")
    some = test[torch.arange(min(200, len(test)))]
    _, solutions = model(some.images, return_solution=True)
    radii = model.spectral_radius(some.images[:32], [solution.value[:32] for solution in solutions])
    for number, solution in enumerate(solutions):
        name = f"block {number + 1}: " if len(solutions) > 1 else ""
        section.add(
            paragraph(
                f"{name}{int(solution.converged.sum())} of {len(some)} test images reach the "
                f"tolerance {recipe.tol:g}, in {solution.steps.double().mean():.1f} steps on "
                f"average; worst residual {solution.residual.max():.1e}; spectral radius of the "
                f"update at the equilibria {radii[number].mean():.2f} (largest "
                f"{radii[number].max():.2f})."
            )
        )
    figures = [
        (plots.convergence(until_solved(s), recipe.tol),
         f"Residuals of {len(some)} solves" + (f", block {k + 1}" if len(solutions) > 1 else ""))
        for k, s in enumerate(solutions)
    ]  # fmt: skip
    section.add(pictures(*figures, _horizon(model, test, measured)))
    return section


def _horizon(model: ImageClassifier, test: Split, measured: Measured) -> tuple[Any, str]:
    some = test[torch.arange(min(_HORIZON_IMAGES, len(test)))]

    def error(read: Tensor) -> float:
        return 100 * (read != some.labels).double().mean().item()

    errors = [error(model(some.images, steps=steps).argmax(dim=1)) for steps in _HORIZON]
    last = error(measured.predictions[: len(some)])
    figure = plots.relaxation_horizon(
        _HORIZON, {"explicit steps": errors}, {"equilibrium": last}, "error (%)"
    )
    what = f"Error on {len(some)} test images when the weights are used as an explicit network"
    return figure, f"{what} of so many steps"


@torch.no_grad()
def _couplings(story: Story, model: ImageClassifier, test: Split) -> Section:
    section = Section("Couplings")
    images = test.images[:1]
    _, solutions = model(images, return_solution=True)
    strengths = model.couplings(images, solutions).mean(dim=2)[:, 0].numpy()
    if strengths.shape[-1] < 2:
        return section
    section.add(
        paragraph(
            "Sites are the patches of the image and, at the left, the class token if there is one. "
            "The wider a line, the stronger the coupling ‖J_ij‖ (the mean over heads), for the "
            "first test image."
        )
    )
    drawn = _grey(images)[0].permute(1, 2, 0).squeeze(-1).numpy()
    for number, block in enumerate(strengths):
        name = f", block {number + 1}" if len(strengths) > 1 else ""
        section.add(
            pictures(
                (plots.couplings_over_image(block, drawn, pixel_places(model)),
                 f"Couplings between patches{name}"),
                (plots.coupling_graph(block, *sites_of(model)), f"The same as a matrix{name}"),
            )
        )  # fmt: skip
    animated = coupling_film(story, model, images)
    if animated is not None:
        content, steps = animated
        (story.run.folder / "couplings.gif").write_bytes(content)
        section.add(
            image(content, "gif", f"The couplings in training, from {len(steps)} checkpoints, step "
                  f"{steps[0]} to {steps[-1]}; also in couplings.gif")
        )  # fmt: skip
    else:
        section.add(
            paragraph(
                f"For an animation of the couplings in training at least {_FEWEST} checkpoints "
                "have to be kept: dia train ... --keep-checkpoints 40."
            )
        )
    return section


def pixel_places(model: ImageClassifier) -> np.ndarray:
    """The sites `(N, 2)` in pixels: centres of the patches, the class token at the left."""
    size = model.image_size / model.grid
    return (sites_of(model)[0] + 0.5) * size - 0.5


def coupling_film(
    story: Story, model: ImageClassifier, images: Tensor
) -> tuple[bytes, list[int]] | None:
    """A GIF of the first block's couplings at the checkpoints that were kept, and their steps.

    None with fewer than three. Leaves other weights in `model`, which are put back at the end.
    """
    every = story.run.checkpoints.steps()
    if len(every) < _FEWEST:
        return None
    best = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = np.unique(np.linspace(0, len(every) - 1, _FRAMES).round().astype(int))
    found: dict[int, np.ndarray] = {}
    for step in (every[k] for k in chosen):

        def couplings(step: int = step) -> np.ndarray:
            model.load_state_dict(weights(story.run.checkpoints.read(step).parts))
            _, solutions = model(images, return_solution=True)
            return model.couplings(images, solutions)[0, 0].mean(dim=0).numpy()

        strengths = story.attempt(f"The checkpoint of step {step} is left out", couplings)
        if strengths is not None:
            found[step] = strengths
    model.load_state_dict(best)
    if len(found) < _FEWEST:
        return None
    apart = ~np.eye(len(next(iter(found.values()))), dtype=bool)
    weakest = min(strengths[apart].min() for strengths in found.values())
    strongest = max(strengths[apart].max() for strengths in found.values())
    drawn = _grey(images)[0].permute(1, 2, 0).squeeze(-1).numpy()
    figures = (
        plots.couplings_over_image(
            strengths, drawn, pixel_places(model), f"step {step}", weakest, strongest
        )
        for step, strengths in found.items()
    )
    return plots.animation(figures, seconds=0.3, dpi=72), list(found)


def _errors(test: Split, measured: Measured, all_images: int) -> Section:
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (test.labels.numpy(), measured.predictions.numpy()), 1)
    which = "all" if len(test) == all_images else "the first"
    section = Section("Errors")
    section.add(
        pictures(
            (plots.confusion_matrix(counts, NAMES),
             f"True and predicted classes of {which} {len(test)} test images, accuracy "
             f"{measured.accuracy:.2%}"),
        )
    )  # fmt: skip
    return section
