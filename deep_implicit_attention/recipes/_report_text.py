"""What the report says of a run that learned a text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import plots
from ..models import DeepImplicitAttentionTransformer
from ..plots._page import Section, explorer, packed, paragraph, preformatted
from ..training import TextData, windows
from ._images import until_solved
from ._language import _SAMPLE as SAMPLE
from ._report_page import CURVES, Story, pictures
from ._shakespeare import Shakespeare, check_text

_WINDOWS = 6
_MOST_STEPS = 24
# Of a window, which may be longer; what comes later changes nothing before. Couplings take the
# square of it, and a graph has an arrow for each.
_CHARACTERS, _IN_GRAPH = 256, 128
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


def text_sections(story: Story, recipe: Shakespeare) -> list[Section]:
    """Relaxation, curves, convergence, couplings and a sample, as far as they can be had."""
    curves = story.attempt(CURVES, lambda: _curves(story))
    sections = [_sample(story), curves or Section("Training")]
    data = story.attempt(
        "The text cannot be read, so figures that need it are missing", recipe.load
    )
    if data is None:
        return sections

    def build() -> DeepImplicitAttentionTransformer:
        check_text(story.run, data)
        model = recipe.model(len(data.vocabulary))
        story.run.load_weights(model)
        return model.eval()

    model = story.attempt("The model cannot be looked into", build)
    if model is None:
        return sections
    inputs, targets = windows(data.validation, recipe.length)
    chosen = torch.linspace(0, len(inputs) - 1, min(_WINDOWS, len(inputs))).long()
    inputs, targets = inputs[chosen], targets[chosen]
    length = min(inputs.shape[1], _CHARACTERS)
    fit = slice(max(1, _NUMBERS // (length * (_MOST_STEPS + 1)))), slice(length)
    story.data = explored(model, data, inputs[fit], targets[fit], recipe.tol)
    first = Section("Watch it settle", [paragraph(_EXPLANATION), explorer("text")])
    return [
        first,
        *sections,
        _convergence(model, inputs, targets, recipe),
        _couplings(model, data, inputs),
    ]


def _sample(story: Story) -> Section:
    section = Section("A sample")
    path = story.run.folder / SAMPLE
    if path.exists():
        section.add(preformatted(path.read_text(encoding="utf-8", errors="replace")))
    return section


def _curves(story: Story) -> Section:
    section, history = Section("Training"), story.history
    if not history:
        return section

    def column(name: str) -> tuple[list[float], list[float]]:
        values = [record.get(name) for record in history]
        numbers = [math.nan if value is None else value for value in values]
        return [record["step"] for record in history], numbers

    learned = "train_cross_entropy" if "train_cross_entropy" in history[0] else "train_loss"
    ends = [history[0]["step"], history[-1]["step"]]
    panels = (
        (plots.Panel("iteration", "cross-entropy (nats per character)",
                     {"training": column(learned), "validation": column("validation_loss")}),
         "Loss; validation is at equilibrium"),
        (plots.Panel("iteration", "mean relative residual",
                     {"validation": column("validation_residual")}, yscale="log"),
         "How far from equilibrium the solver ends"),
        (plots.Panel("iteration", "solver steps (mean)",
                     {"validation": column("validation_solver_steps")}),
         "How many steps the solver takes"),
        (plots.Panel("iteration", "spectral radius of ∂F/∂z (dimensionless)",
                     {"validation": column("spectral_radius"),
                      "plain iteration contracts below": (ends, [1.0, 1.0])}),
         "How close the update is to not contracting"),
    )  # fmt: skip
    reference = ("plain iteration contracts below",)
    section.add(
        pictures(*((plots.curves(panel, reference=reference), what) for panel, what in panels))
    )
    return section


@torch.no_grad()
def explored(
    model: DeepImplicitAttentionTransformer,
    data: TextData,
    inputs: Tensor,
    targets: Tensor,
    tol: float,
) -> dict[str, Any]:
    """What the moving part shows: windows after 1, 2, ... steps and at equilibrium."""

    def frame(**overrides: Any) -> tuple[Any, Tensor, Tensor]:
        logits, solutions = model(inputs, return_solution=True, **overrides)
        residual = torch.stack([solution.residual for solution in solutions]).amax(dim=0)
        return solutions, logits.log_softmax(dim=-1), residual

    frames = [frame(steps=1)]
    while len(frames) < _MOST_STEPS and bool((frames[-1][2] > tol).any()):
        frames.append(frame(steps=len(frames) + 1))
    frames.append(frame())
    log_p = torch.stack([one[1] for one in frames], dim=1)
    residual = torch.stack([one[2] for one in frames], dim=1)
    lengths = torch.stack([one[0][-1].value.norm(dim=-1) for one in frames], dim=1)
    lengths = lengths.nan_to_num(0.0, 0.0, 0.0)
    wanted = targets[:, None, :, None].expand(-1, len(frames), -1, 1)
    following = log_p.gather(-1, wanted).squeeze(-1)
    top = log_p.exp().topk(min(_LIKELIEST, log_p.shape[-1]), dim=-1)
    couplings = model.couplings(inputs, frames[-1][0])[-1].mean(dim=1)
    couplings = couplings - torch.diag_embed(couplings.diagonal(dim1=-2, dim2=-1))
    length = lengths.max().item() or 1.0
    text = data.vocabulary.decode
    return {
        "kind": "text",
        "steps": list(range(1, len(frames))),
        "tol": tol,
        "vocabulary": list(data.vocabulary.characters),
        "windows": [text(one) + text(last[-1:]) for one, last in zip(inputs, targets, strict=True)],
        "ids": top.indices.tolist(),
        "top": packed(top.values.nan_to_num(0.0).numpy()),
        "next": packed(following.exp().nan_to_num(0.0).numpy()),
        "lengths": packed((lengths / length).numpy()),
        "length": length,
        "couplings": packed(
            (couplings / couplings.amax(dim=-1, keepdim=True).clamp_min(1e-12)).numpy()
        ),
        "residuals": [[float(f"{r:.3g}") for r in row] for row in residual.tolist()],
        "losses": [[round(loss, 4) for loss in row] for row in (-following.mean(-1)).tolist()],
    }


@torch.no_grad()
def _convergence(
    model: DeepImplicitAttentionTransformer, inputs: Tensor, targets: Tensor, recipe: Shakespeare
) -> Section:
    section = Section("Convergence")
    logits, solutions = model(inputs, return_solution=True)
    radii = model.spectral_radius(inputs, solutions)
    figures = []
    for number, solution in enumerate(solutions):
        name = f"block {number + 1}: " if len(solutions) > 1 else ""
        section.add(
            paragraph(
                f"{name}{int(solution.converged.sum())} of {len(inputs)} windows reach the "
                f"tolerance {recipe.tol:g}, in {solution.steps.double().mean():.1f} steps on "
                f"average; worst residual {solution.residual.max():.1e}; spectral radius of the "
                f"update at the equilibria {radii[number].mean():.2f} (largest "
                f"{radii[number].max():.2f})."
            )
        )
        figures.append(
            (plots.convergence(until_solved(solution), recipe.tol),
             f"Residuals of {len(inputs)} solves"
             + (f", block {number + 1}" if len(solutions) > 1 else ""))
        )  # fmt: skip
    losses = [model.loss(model(inputs, steps=steps), targets).item() for steps in _HORIZON]
    last = model.loss(logits, targets).item()
    figure = plots.relaxation_horizon(
        _HORIZON,
        {"explicit steps": losses},
        {"equilibrium": last},
        "cross-entropy (nats per character)",
    )
    what = f"Loss on these {len(inputs)} windows when the weights are used as an explicit network"
    figures.append((figure, f"{what} of so many steps"))
    section.add(pictures(*figures))
    return section


@torch.no_grad()
def _couplings(model: DeepImplicitAttentionTransformer, data: TextData, inputs: Tensor) -> Section:
    section = Section("Couplings")
    one = inputs[:1, :_IN_GRAPH]
    _, solutions = model(one, return_solution=True)
    strengths = model.couplings(one, solutions).mean(dim=2)[:, 0].numpy()
    tokens = list(data.vocabulary.decode(one[0]))
    section.add(
        paragraph(
            f"The couplings J_ij of the first window, its first {len(one[0])} characters, the mean "
            "over heads: an arrow runs from the character j that pulls to the character i that is "
            "pulled."
        )
    )
    for number, block in enumerate(strengths):
        name = f", block {number + 1}" if len(strengths) > 1 else ""
        section.add(
            pictures(
                (plots.couplings_over_text(block, tokens), f"Couplings between characters{name}")
            )
        )
    return section
