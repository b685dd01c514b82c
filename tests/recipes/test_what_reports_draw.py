"""Parts of `dia report`, each beside numbers made by hand: what is drawn and what is said."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from deep_implicit_attention import plots
from deep_implicit_attention.models import DeepImplicitAttentionViT
from deep_implicit_attention.plots._page import Section
from deep_implicit_attention.recipes import (
    _report_curves,
    _report_film,
    _report_images,
    _report_spins,
    _report_text,
    load_recipe,
)
from deep_implicit_attention.recipes._report_page import Story, add_convergence
from deep_implicit_attention.recipes._report_settling import Settling, settle
from deep_implicit_attention.solvers import Solution
from deep_implicit_attention.training import Run, Split, windows


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(Run(tmp_path), {})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple]]:
    """What the figures of the report are called with, by name."""
    calls: dict[str, list[tuple]] = {}
    names = ("confusion_matrix", "coupling_graph", "couplings_over_image", "couplings_over_text",
             "relaxation_horizon")  # fmt: skip
    for name in names:

        def figure(*given: Any, name: str = name, **_: Any) -> Figure:
            calls.setdefault(name, []).append(given)
            return Figure((1, 1))

        monkeypatch.setattr(plots, name, figure)
    return calls


def words(section: Section) -> list[str]:
    """The paragraphs of a section."""
    return [html.unescape(p) for part in section.parts for p in re.findall(r"<p>(.*?)</p>", part)]


def loaded(folder: Path) -> tuple[Any, Any]:
    """The data and the model of a run, with its weights."""
    run = Run(folder)
    recipe = load_recipe(run)
    data = recipe.load()
    model = recipe.model(len(data.vocabulary) if hasattr(data, "vocabulary") else data)
    run.load_weights(model)
    return data, model.eval()


# --- curves -----------------------------------------------------------------------------------


def test_curves_of_images_are_the_columns_of_their_names() -> None:
    history = [
        {"epoch": k, "step": 10 * k, "train_loss": 2.0 / k, "validation_loss": 3.0 / k,
         "train_accuracy": 0.2 * k, "validation_accuracy": 0.1 * k, "solver_steps": 4.0 + k,
         "spectral_radius": 0.25 * k}
        for k in (1, 2)
    ]  # fmt: skip
    lines = {curve.ylabel: curve.lines() for curve in _report_curves._image_panels(history)}
    loss, error, steps, radius = lines.values()
    assert loss == {"training": ([1, 2], [2.0, 1.0]), "validation": ([1, 2], [3.0, 1.5])}
    assert "error (%)" in lines
    assert error["training"][1] == pytest.approx([80, 60])
    assert error["validation"][1] == pytest.approx([90, 80])
    assert steps == {"training": ([1, 2], [5.0, 6.0])}
    assert radius["validation"] == ([1, 2], [0.25, 0.5])
    assert radius["plain iteration contracts below"] == ([1, 2], [1.0, 1.0])


def test_curves_of_a_text_are_the_columns_of_their_names() -> None:
    record = {"step": 5, "train_loss": 1.0, "validation_loss": 2.0, "validation_residual": 3e-3,
              "validation_solver_steps": 4.0, "spectral_radius": 0.5}  # fmt: skip
    loss, residual, steps, radius = (c.lines() for c in _report_curves._text_panels([record]))
    assert loss == {"training": ([5], [1.0]), "validation": ([5], [2.0])}
    assert (residual["validation"], steps["validation"]) == (([5], [3e-3]), ([5], [4.0]))
    assert radius["validation"] == ([5], [0.5])
    penalised = [{**record, "train_cross_entropy": 0.25}]  # the loss has a penalty in it
    assert _report_curves._text_panels(penalised)[0].lines()["training"] == ([5], [0.25])


# --- convergence and relaxation ---------------------------------------------------------------


def solution(residuals: list[float], steps: list[int]) -> Solution:
    residual = torch.tensor(residuals)
    return Solution(
        value=torch.zeros(len(steps), 2), residual=residual, steps=torch.tensor(steps),
        converged=residual <= 1e-3, codes=torch.zeros(len(steps), dtype=torch.long),
        trace=residual.expand(max(steps), -1), residual_norm=residual,
    )  # fmt: skip


def test_what_is_said_of_convergence(story: Story) -> None:
    section = Section("Convergence")
    solutions = [solution([1e-4, 5e-2, 1e-3], [3, 9, 6]), solution([1e-4, 2e-4, 3e-4], [1, 2, 3])]
    radii = torch.tensor([[0.2, 0.6, 0.4], [0.1, 0.2, 0.9]])
    add_convergence(story, section, solutions, lambda: radii, 1e-3, "images", lambda: None)
    assert words(section) == [
        "block 1: 2 of 3 images reach the tolerance 0.001, in 6.0 steps on average; worst residual "
        "5.0e-02; spectral radius of the update at the solver's answers 0.40 (largest 0.60).",
        "block 2: 3 of 3 images reach the tolerance 0.001, in 2.0 steps on average; worst residual "
        "3.0e-04; spectral radius of the update at the solver's answers 0.40 (largest 0.90).",
    ]
    assert not story.missing


def test_what_is_said_of_samples_that_do_not_settle() -> None:
    states = torch.zeros(3, 5, 2, 2)  # four plain steps, and the solver
    states[0, 2:4] = math.inf
    states[2, 3] = math.nan
    solved = torch.tensor([True, False, True])
    settling = Settling(states, torch.zeros(3, 5, 4), torch.zeros(3, 5), solved)
    away, failed = settling.said("images")
    assert "away from 2 of these 3 images: from step 3 on" in away
    assert "no equilibrium for 1 of these 3 images" in failed
    assert not Settling(states[1:2], torch.zeros(1, 5, 4), torch.zeros(1, 5), solved[:1]).said("x")


def test_steps_are_taken_until_every_block_of_every_sample_has_settled() -> None:
    """The first block of the first sample is the slowest: its residuals are 1/2, 1/4, ..."""

    def look(steps: int = 20) -> tuple[Tensor, list[Solution]]:
        slow, fast = [0.5**steps, 0.1**steps], [0.2**steps, 0.2**steps]
        return torch.zeros(2, 4), [solution(slow, [steps] * 2), solution(fast, [steps] * 2)]

    settling = settle(look, 0.1)
    assert settling.steps == [1, 2, 3, 4]
    expected = [[0.5, 0.25, 0.125, 0.0625, 0.5**20], [0.2, 0.04, 0.008, 0.0016, 0.2**20]]
    np.testing.assert_allclose(settling.residuals, expected, rtol=1e-5)
    assert len(settle(look, 1e-12).steps) == 24  # at most


# --- images -----------------------------------------------------------------------------------


def test_the_error_as_an_explicit_network(run: Path, drawn: dict[str, list[tuple]]) -> None:
    """Against z ← F(z; x) written out."""
    data, model = loaded(run)
    test = data.test[torch.arange(50)]
    with torch.no_grad():
        x = model.sources(test.images)
        step, state, wrong = model.attention.map(x), torch.zeros_like(x), []
        for _ in range(24):
            state = step(state)
            wrong.append(100 * (model.head(state[:, 0]).argmax(1) != test.labels).double().mean())
        read = torch.where(torch.arange(50) < 20, (test.labels + 1) % 10, test.labels)
        _report_images._horizon(model, _report_images.Looked(test, read, 360))
    ((steps, by_steps, last, label),) = drawn["relaxation_horizon"]
    assert label == "error (%)"
    assert by_steps["explicit steps"] == pytest.approx([wrong[k - 1].item() for k in steps])
    assert wrong[0] != wrong[-1]
    assert last == {"equilibrium": pytest.approx(40)}


def test_errors_are_true_against_predicted_classes(drawn: dict[str, list[tuple]]) -> None:
    section, labels = Section("Errors"), torch.tensor([3, 3, 5, 7])
    read = torch.tensor([3, 8, 5, -1])
    looked = _report_images.Looked(Split(torch.zeros(4, 1, 2, 2), labels), read, 10)
    _report_images._add_errors(section, looked)
    ((counts, names),) = drawn["confusion_matrix"]
    expected = np.zeros((10, 10), dtype=int)
    expected[3, 3] = expected[3, 8] = expected[5, 5] = 1
    np.testing.assert_array_equal(counts, expected)
    assert names == list("0123456789")
    assert words(section)[0].startswith("The scores of 1 of 4 images are not finite")
    assert "the first 4 test images, accuracy 50.00%" in "".join(section.parts)


def test_examples_are_some_that_were_read_wrongly_and_all_classes() -> None:
    labels = torch.arange(100) % 10
    read = labels.clone()
    read[[41, 57, 63, 78, 99]] += 1
    chosen = _report_images._examples(labels, read, 14)
    assert chosen.tolist() == [*range(10), 10, 41, 57, 63]  # a quarter of 14 is 3
    assert _report_images._examples(labels, labels, 14).tolist() == list(range(14))


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_sites_lie_at_the_centres_of_their_patches(pooling: str) -> None:
    model = DeepImplicitAttentionViT(
        image_size=8, patch_size=4, num_classes=2, dim=3, pooling=pooling
    )
    places = _report_images.pixel_places(model).tolist()
    centres = [[1.5, 1.5], [5.5, 1.5], [1.5, 5.5], [5.5, 5.5]]  # the first pixel is at (0, 0)
    assert places[-4:] == centres
    assert places[:-4] == ([[-4.5, 3.5]] if pooling == "token" else [])


def test_the_film_shows_the_couplings_of_each_checkpoint_on_one_scale(run: Path) -> None:
    _, model = loaded(run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found: dict[str, tuple] = {}

    def draw(strengths: np.ndarray, title: str, weakest: float, strongest: float) -> Figure:
        found[title] = strengths, weakest, strongest
        return Figure((1, 1))

    def couplings() -> Tensor:
        return torch.linalg.matrix_norm(model.attention.fun.weight())

    story = Story(Run(run), {}, owns_files=False)
    film = _report_film.coupling_film(story, model, couplings, draw)
    assert film is not None
    assert not story.missing
    kept = Run(run).checkpoints
    assert film[1] == kept.steps()
    assert list(found) == [f"step {step}" for step in kept.steps()]
    expected = []
    for step in kept.steps():
        model.load_state_dict(kept.read(step).parts["model"])
        expected.append(couplings().detach().numpy())
        np.testing.assert_allclose(found[f"step {step}"][0], expected[-1], rtol=1e-6)
    assert np.abs(expected[0] - expected[-1]).max() > 1e-4
    apart = np.stack(expected)[:, ~np.eye(17, dtype=bool)]
    for _, weakest, strongest in found.values():
        assert (weakest, strongest) == pytest.approx((apart.min(), apart.max()))
    model.load_state_dict(before)


# --- a language model -------------------------------------------------------------------------


def test_couplings_and_losses_of_a_text(said: Path, drawn: dict[str, list[tuple]]) -> None:
    data, model = loaded(said)
    recipe = load_recipe(Run(said))
    inputs, targets = windows(data.validation, recipe.length)
    some, story = (
        _report_text.Windows(data, inputs[:3], targets[:3]),
        Story(Run(said), {}, owns_files=False),
    )
    _report_text._add_couplings(story, Section("Couplings"), model, some)
    _report_text._add_convergence(story, Section("Convergence"), model, some, recipe)
    assert not story.missing
    with torch.no_grad():
        _, solutions = model(inputs[:1], return_solution=True)
        expected = model.couplings(inputs[:1], solutions)
        for number, (strengths, tokens, *_) in enumerate(drawn["couplings_over_text"][:2]):
            heads = [head.numpy() for head in expected[number, 0]]
            np.testing.assert_allclose(strengths, sum(heads) / len(heads), rtol=1e-5, atol=1e-7)
            assert np.all(np.triu(strengths, 1) == 0)  # nothing pulls from ahead
            assert "".join(tokens) == data.vocabulary.decode(inputs[0])

        def loss(**steps: int) -> float:
            scores = model(inputs[:3], **steps)
            return F.cross_entropy(scores.flatten(0, 1), targets[:3].flatten()).item()

        ((steps, by_steps, last, label),) = drawn["relaxation_horizon"]
        assert by_steps["explicit steps"] == pytest.approx([loss(steps=k) for k in steps])
        assert last["equilibrium"] == pytest.approx(loss())
    assert label == "cross-entropy (nats per character)"


# --- spins and machines -----------------------------------------------------------------------


def test_the_best_machine_is_that_of_the_validation_images(story: Story) -> None:
    story.config = {"recipe": "boltzmann"}
    story.records = [
        {"method": "k-nearest-neighbours", "validation_error": 0.05, "test_error": 0.06},
        {"method": "tap", "l2": 0.1, "validation_error": 0.20, "test_error": 0.10},
        {"method": "naive", "l2": 0.1, "validation_error": 0.15, "test_error": 0.25},
    ]
    assert "naive, gets 25.0% of the pixels" in _report_spins.headline(story)


def test_a_machine_is_drawn_pixel_by_pixel(drawn: dict[str, list[tuple]]) -> None:
    fields, couplings = np.arange(66.0) - 20, np.zeros((66, 66))  # two hidden units
    couplings[1, 8] = couplings[8, 1] = -0.5
    shown = _report_spins._field_map(fields)
    np.testing.assert_array_equal(shown, np.arange(64.0).reshape(8, 8) - 20)
    _report_spins._coupling_graph(couplings, fields, shown)
    ((strengths, image, places),) = drawn["couplings_over_image"]
    assert strengths.shape == (64, 64)
    assert (strengths[1, 8], strengths[8, 1], strengths.sum()) == (0.5, 0.5, 1.0)
    np.testing.assert_allclose(image, np.linspace(0, 1, 64).reshape(8, 8))
    assert [tuple(places[k]) for k in (0, 1, 8, 63)] == [(0, 0), (1, 0), (0, 1), (7, 7)]


def test_the_graph_of_a_system_shows_sizes(story: Story, drawn: dict[str, list[tuple]]) -> None:
    J = np.array([[0.0, -2.0, 1.0], [-2.0, 0.0, 0.5], [1.0, 0.5, 0.0]])
    np.savez(story.run.folder / "answers.npz", couplings=J)
    _report_spins._add_graph(story, Section("Couplings"))
    ((strengths, places, names),) = drawn["coupling_graph"]
    np.testing.assert_array_equal(strengths, np.abs(J))
    np.testing.assert_allclose(np.linalg.norm(places, axis=1), 1)
    assert names == ["0", "1", "2"]
