"""What the report says of a run that learned a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import plots
from ..models import DeepImplicitAttentionTransformer
from ..plots._page import Section, explorer, packed, paragraph, preformatted
from ..training import TextData, windows
from ._language import _SAMPLE as SAMPLE
from ._report_curves import training_section
from ._report_film import add_film
from ._report_page import Story, add_convergence, alone
from ._report_settling import MOST_STEPS, Settling, rounded, scaled, settle
from ._shakespeare import Shakespeare, check_text

_WINDOWS = 6
# Of a window, which may be longer; what comes later changes nothing before. Couplings take the
# square of it, and a graph has an arrow for each.
_CHARACTERS, _IN_GRAPH, _IN_FILM = 256, 128, 64
_NUMBERS = 20_000  # characters of all windows at all steps at most, about 50 bytes each
_HORIZON = (1, 2, 3, 4, 6, 8, 12, 16, 24)
_LIKELIEST = 6  # characters that are listed

_EXPLANATION = (
    "Pick a window of the validation text and move through the relaxation: the same weights after "
    "1, 2, … plain steps of z ← F(z; x), and, last, at the equilibrium that the solver finds. The "
    "second slider moves the position whose next character is predicted. Of several blocks the "
    "last one's magnetizations and couplings are shown. Arrow keys move the sliders. Of long "
    "windows the beginning is shown."
)


@dataclass(frozen=True)
class Windows:
    """Some windows of the validation text, and what follows each character `(n, length)`."""

    data: TextData
    inputs: Tensor
    targets: Tensor


def text_sections(story: Story, recipe: Shakespeare) -> list[Section]:
    """Relaxation, curves, convergence, couplings and a sample, as far as they can be had."""
    sections = [
        story.section(
            "A sample", "The sample cannot be read", lambda part: _add_sample(story, part)
        ),
        training_section(story),
    ]
    data = story.attempt(
        "The text cannot be read, so figures that need it are missing",
        lambda: recipe.load(download=False),
    )
    if data is None:
        return sections

    def build() -> tuple[DeepImplicitAttentionTransformer, Windows]:
        check_text(story.run, data)
        model = recipe.model(len(data.vocabulary))
        story.run.load_weights(model)
        inputs, targets = windows(data.validation, recipe.length)
        chosen = torch.linspace(0, len(inputs) - 1, min(_WINDOWS, len(inputs))).long()
        return model.eval(), Windows(data, inputs[chosen], targets[chosen])

    built = story.attempt("The model cannot be looked into", build)
    if built is None:
        return sections
    model, some = built
    return [
        story.section(
            "Watch it settle", "The relaxation cannot be shown",
            lambda part: _add_explorer(story, part, model, some, recipe.tol),
        ),
        *sections,
        story.section(
            "Convergence", "The convergence cannot be shown",
            lambda part: _add_convergence(story, part, model, some, recipe),
        ),
        story.section(
            "Couplings", "The couplings cannot be shown",
            lambda part: _add_couplings(story, part, model, some),
        ),
    ]  # fmt: skip


def _add_sample(story: Story, section: Section) -> None:
    path = story.run.folder / SAMPLE
    if path.exists():
        section.add(preformatted(path.read_text(encoding="utf-8", errors="replace")))
    elif story.result is not None:  # a training that goes on has none yet
        story.missing.append(f"There is no {SAMPLE}, which the end of a training writes.")


def _add_explorer(
    story: Story,
    section: Section,
    model: DeepImplicitAttentionTransformer,
    some: Windows,
    tol: float,
) -> None:
    length = min(some.inputs.shape[1], _CHARACTERS)
    fit = slice(max(1, _NUMBERS // (length * (MOST_STEPS + 1)))), slice(length)
    shown = Windows(some.data, some.inputs[fit], some.targets[fit])
    settling = settle(lambda **given: model(shown.inputs, return_solution=True, **given), tol)
    data = explored(model, shown, settling, tol)
    section.add(
        paragraph(_EXPLANATION), *map(paragraph, settling.said("windows")), explorer("text")
    )
    story.data = data


@torch.no_grad()
def explored(
    model: DeepImplicitAttentionTransformer, some: Windows, settling: Settling, tol: float
) -> dict[str, Any]:
    """What the moving part shows: windows after 1, 2, ... steps and, last, as the solver
    answers."""
    log_p = settling.scores.log_softmax(dim=-1)
    lengths, length, longer = scaled(settling.states.double().norm(dim=-1))
    wanted = some.targets[:, None, :, None].expand(-1, log_p.shape[1], -1, 1)
    following = log_p.gather(-1, wanted).squeeze(-1)
    top = log_p.exp().topk(min(_LIKELIEST, log_p.shape[-1]), dim=-1)
    _, solutions = model(some.inputs, return_solution=True)
    couplings = model.couplings(some.inputs, solutions)[-1].mean(dim=1)
    couplings = couplings - torch.diag_embed(couplings.diagonal(dim1=-2, dim2=-1))
    text = some.data.vocabulary.decode
    pairs = zip(some.inputs, some.targets, strict=True)
    return {
        "kind": "text",
        "steps": settling.steps,
        "tol": tol,
        "solved": settling.solved.tolist(),
        "vocabulary": list(some.data.vocabulary.characters),
        "windows": [text(one) + text(last[-1:]) for one, last in pairs],
        "ids": top.indices.tolist(),
        "top": packed(top.values.numpy()),
        "next": packed(following.exp().numpy()),
        "lengths": packed(lengths),
        "length": length,
        "clipped": longer,
        "broken": not bool(settling.finite.all()),
        "couplings": packed(
            (couplings / couplings.amax(dim=-1, keepdim=True).clamp_min(1e-12)).numpy()
        ),
        "residuals": rounded(settling.residuals, 3),
        "losses": [[round(loss, 4) for loss in row] for row in (-following.mean(-1)).tolist()],
    }


@torch.no_grad()
def _add_convergence(
    story: Story,
    section: Section,
    model: DeepImplicitAttentionTransformer,
    some: Windows,
    recipe: Shakespeare,
) -> None:
    logits, solutions = model(some.inputs, return_solution=True)

    def horizon() -> tuple[Any, str]:
        losses = [
            model.loss(model(some.inputs, steps=steps), some.targets).item() for steps in _HORIZON
        ]
        last = model.loss(logits, some.targets).item()
        figure = plots.relaxation_horizon(
            _HORIZON, {"explicit steps": losses}, {"equilibrium": last},
            "cross-entropy (nats per character)",
        )  # fmt: skip
        what = f"Loss on these {len(some.inputs)} windows when the weights are used as an explicit"
        return figure, f"{what} network of so many steps"

    add_convergence(
        story, section, solutions, lambda: model.spectral_radius(some.inputs, solutions),
        recipe.tol, "windows", horizon,
    )  # fmt: skip


@torch.no_grad()
def _add_couplings(
    story: Story, section: Section, model: DeepImplicitAttentionTransformer, some: Windows
) -> None:
    def couplings(length: int) -> np.ndarray:
        one = some.inputs[:1, :length]
        _, solutions = model(one, return_solution=True)
        return model.couplings(one, solutions).mean(dim=2)[:, 0].numpy()

    tokens = list(some.data.vocabulary.decode(some.inputs[0, :_IN_GRAPH]))
    strengths = couplings(_IN_GRAPH)
    section.add(
        paragraph(
            f"The couplings J_ij of the first window, its first {len(tokens)} characters, the mean "
            "over heads: an arrow runs from the character j that pulls to the character i that is "
            "pulled."
        )
    )
    for number, block in enumerate(strengths):
        name = f", block {number + 1}" if len(strengths) > 1 else ""
        shown = story.attempt(
            f"The couplings{name} cannot be drawn",
            lambda block=block, name=name: alone(
                plots.couplings_over_text(block, tokens), f"Couplings between characters{name}"
            ),
        )
        if shown is not None:
            section.add(shown)
    if len(tokens) < 2:
        return
    first = tokens[:_IN_FILM]
    add_film(
        story, section, model, lambda: couplings(len(first))[0],
        lambda strengths, title, weakest, strongest: plots.couplings_over_text(
            strengths, first, title, strongest=strongest
        ),
    )  # fmt: skip
