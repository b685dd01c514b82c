"""What the report says of a run that learned from images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import plots
from ..models import ImageClassifier
from ..plots._page import Section, explorer, packed, paragraph
from ..training import ImageData, Split, measure
from ._image_recipe import ImageRecipe
from ._images import sites_of
from ._report_curves import training_section
from ._report_film import add_film
from ._report_page import Story, add_convergence, alone
from ._report_settling import MOST_STEPS, Settling, distances, rounded, scaled, settle

NAMES = [str(digit) for digit in range(10)]
_LOOKED_AT = 1000  # test images from which figures are made
_CONVERGENCE_IMAGES, _RADII = 200, 32
_HORIZON_IMAGES = 400  # every step of adaptive TAP costs the cube of all components
_HORIZON = (1, 2, 3, 4, 6, 8, 12, 16, 24)
_NUMBERS = 400_000  # magnetizations in the page at most, 2 bytes each
_COMPONENTS = 16  # of a site that are shown
_SHOWN = 24  # examples at most

_EXPLANATION = (
    "Pick a test image and move through the relaxation: the same weights after 1, 2, … plain steps "
    "of z ← F(z; x), and, last, at the equilibrium that the solver finds. In the first step every "
    "site answers what it starts from; with more steps sites hear of each other. Of several blocks "
    "the last one's magnetizations are shown. Arrow keys move the slider."
)


@dataclass(frozen=True)
class Looked:
    """The test images that are looked at, and the class read for each: −1 where scores are not
    finite, which is no class and counts as wrong."""

    test: Split
    read: Tensor
    whole: int  # images in the whole test set


def image_sections(story: Story, recipe: ImageRecipe) -> list[Section]:
    """Relaxation, curves, convergence, couplings and errors, as far as they can be had."""
    curves = training_section(story)
    model, data = _model(story, recipe)
    if model is None or data is None:
        return [curves]
    test = data.test[torch.arange(min(_LOOKED_AT, len(data.test)))]
    read = story.attempt("The test images cannot be read by the model", lambda: _read(model, test))
    looked = Looked(test, read, len(data.test)) if read is not None else None
    return [
        story.section(
            "Watch it settle", "The relaxation cannot be shown",
            lambda part: looked and _add_explorer(story, part, model, looked, recipe.tol),
        ),
        curves,
        story.section(
            "Convergence", "The convergence cannot be shown",
            lambda part: _add_convergence(story, part, model, test, looked, recipe),
        ),
        story.section(
            "Couplings", "The couplings cannot be shown",
            lambda part: _add_couplings(story, part, model, test),
        ),
        story.section(
            "Errors", "The errors cannot be shown",
            lambda part: looked and _add_errors(part, looked),
        ),
    ]  # fmt: skip


def _model(story: Story, recipe: ImageRecipe) -> tuple[ImageClassifier | None, ImageData | None]:
    data = story.attempt("The images cannot be read, so figures that need them are missing",
                         lambda: recipe.load(download=False))  # fmt: skip
    if data is None:
        return None, None

    def build() -> ImageClassifier:
        model = recipe.model(data)
        story.run.load_weights(model)
        return model.eval()

    model = story.attempt("The model cannot be looked into", build)
    return model, data


def _read(model: ImageClassifier, test: Split) -> Tensor:
    measured = measure(model, test)
    if math.isfinite(measured.loss):
        return measured.predictions
    with torch.no_grad():
        scores = torch.cat([model(images) for images in test.images.split(500)])
    return measured.predictions.where(scores.isfinite().all(dim=1), -1)


def _add_explorer(
    story: Story, section: Section, model: ImageClassifier, looked: Looked, tol: float
) -> None:
    parts = min(model.dim, _COMPONENTS)
    sites = len(sites_of(model)[1])
    count = max(1, min(_SHOWN, _NUMBERS // (sites * parts * (MOST_STEPS + 1))))
    chosen = _examples(looked.test.labels, looked.read, count)
    images = looked.test.images[chosen]
    settling = settle(lambda **given: model(images, return_solution=True, **given), tol)
    data = explored(model, looked, chosen, settling, tol)
    section.add(
        paragraph(_EXPLANATION), *map(paragraph, settling.said("images")), explorer("image")
    )
    story.data = data


def explored(
    model: ImageClassifier, looked: Looked, chosen: Tensor, settling: Settling, tol: float
) -> dict[str, Any]:
    """What the moving part shows: the test images `chosen` after 1, 2, ... steps and, last, as the
    solver answers."""
    z, test = settling.states.double(), looked.test
    shown, size, clipped = scaled(z[..., :_COMPONENTS])
    lengths, length, longer = scaled(z.norm(dim=-1))
    p = settling.scores.softmax(dim=-1)
    examples = zip(chosen.tolist(), test.labels[chosen], looked.read[chosen], strict=True)
    return {
        "kind": "image",
        "grid": model.grid,
        "token": model.token is not None,
        "dim": model.dim,
        "classes": NAMES,
        "steps": settling.steps,
        "tol": tol,
        "solved": settling.solved.tolist(),
        "size": size,
        "length": length,
        "clipped": clipped or longer,
        "broken": not bool(settling.finite.all()),
        "examples": [
            {"index": index, "label": int(label), "read": int(read) if read >= 0 else None}
            for index, label, read in examples
        ],
        "pixels": packed(_grey(test.images[chosen]).permute(0, 2, 3, 1).numpy()),
        "z": packed(shown),
        "lengths": packed(lengths),
        "probabilities": packed(p.numpy()),
        "residuals": rounded(settling.residuals, 3),
        "distances": rounded(distances(settling.states), 4),
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
def _add_convergence(
    story: Story,
    section: Section,
    model: ImageClassifier,
    test: Split,
    looked: Looked | None,
    recipe: ImageRecipe,
) -> None:
    some = test.images[:_CONVERGENCE_IMAGES]
    _, solutions = model(some, return_solution=True)

    def radii() -> Tensor:
        return model.spectral_radius(some[:_RADII], [s.value[:_RADII] for s in solutions])

    add_convergence(
        story, section, solutions, radii, recipe.tol, "test images",
        lambda: _horizon(model, looked) if looked else None,
    )  # fmt: skip


def _horizon(model: ImageClassifier, looked: Looked) -> tuple[Any, str]:
    some = looked.test[torch.arange(min(_HORIZON_IMAGES, len(looked.test)))]

    def error(right: Tensor) -> float:
        return 100 * (~right).double().mean().item()

    errors = []
    for steps in _HORIZON:
        scores = model(some.images, steps=steps)
        # Scores that are not finite are no answer, whatever their largest is said to be.
        right = (scores.argmax(dim=1) == some.labels) & scores.isfinite().all(dim=1)
        errors.append(error(right))
    last = error(looked.read[: len(some)] == some.labels)
    figure = plots.relaxation_horizon(
        _HORIZON, {"explicit steps": errors}, {"equilibrium": last}, "error (%)"
    )
    what = f"Error on {len(some)} test images when the weights are used as an explicit network"
    return figure, f"{what} of so many steps"


@torch.no_grad()
def _add_couplings(story: Story, section: Section, model: ImageClassifier, test: Split) -> None:
    images = test.images[:1]
    _, solutions = model(images, return_solution=True)
    strengths = model.couplings(images, solutions).mean(dim=2)[:, 0].numpy()
    if strengths.shape[-1] < 2:
        return
    section.add(
        paragraph(
            "Sites are the patches of the image and, at the left, the class token if there is one. "
            "The wider a line, the stronger the coupling ‖J_ij‖ (the mean over heads), for the "
            "first test image."
        )
    )
    drawn = _grey(images)[0].permute(1, 2, 0).squeeze(-1).numpy()
    places = pixel_places(model)
    for number, block in enumerate(strengths):
        name = f", block {number + 1}" if len(strengths) > 1 else ""
        story.add_pictures(
            section,
            (f"The couplings{name} cannot be drawn over the image",
             lambda block=block, name=name: (
                 plots.couplings_over_image(block, drawn, places),
                 f"Couplings between patches{name}")),
            (f"The couplings{name} cannot be drawn as a matrix",
             lambda block=block, name=name: (
                 plots.coupling_graph(block, *sites_of(model)),
                 f"Couplings between patches{name}, as a matrix")),
        )  # fmt: skip

    def couplings() -> np.ndarray:
        _, solutions = model(images, return_solution=True)
        return model.couplings(images, solutions)[0, 0].mean(dim=0).numpy()

    add_film(
        story, section, model, couplings,
        lambda strengths, title, weakest, strongest: plots.couplings_over_image(
            strengths, drawn, places, title, weakest, strongest
        ),
    )  # fmt: skip


def pixel_places(model: ImageClassifier) -> np.ndarray:
    """The sites `(N, 2)` in pixels: centres of the patches, the class token at the left."""
    size = model.image_size / model.grid
    return (sites_of(model)[0] + 0.5) * size - 0.5


def _add_errors(section: Section, looked: Looked) -> None:
    labels, read = looked.test.labels.numpy(), looked.read.numpy()
    counts, known = np.zeros((10, 10), dtype=int), read >= 0
    np.add.at(counts, (labels[known], read[known]), 1)
    which = "all" if len(labels) == looked.whole else "the first"
    if not known.all():
        section.add(
            paragraph(
                f"The scores of {(~known).sum()} of {len(labels)} images are not finite: they "
                "count as wrong, and stand in no column."
            )
        )
    section.add(
        alone(
            plots.confusion_matrix(counts, NAMES),
            f"True and predicted classes of {which} {len(labels)} test images, accuracy "
            f"{(labels == read).mean():.2%}",
        )
    )
