"""What `DeepImplicitAttentionViT` shows of itself: couplings, maps, spectral radii, parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from .vit import ATTENTION, FREE, SOFTMAX, build, images, mean, parts


@pytest.mark.parametrize("attention", SOFTMAX)
def test_couplings_are_those_that_the_blocks_use(attention: str) -> None:
    model = build(attention, depth=2)
    _, solutions = model(images(), return_solution=True)
    shown = model.couplings(images(), solutions)
    assert shown.shape == (2, 3, 2, 5, 5)
    for number, z in enumerate((model.sites(images()), solutions[0].value)):
        used = model.blocks[number].fun.prepare(model.fields(z, number)).couplings.matrix
        torch.testing.assert_close(shown[number], used.detach())


@pytest.mark.parametrize("attention", FREE)
def test_free_couplings_are_norms_of_the_jacobian(attention: str) -> None:
    model = build(attention, depth=2)
    image = images(1)
    _, solutions = model(image, return_solution=True)
    shown = model.couplings(image, solutions)
    assert shown.shape == (2, 1, 1, 5, 5)
    fun, x = model.blocks[1].fun, model.fields(solutions[0].value, 1).detach()
    context = fun.prepare(x)

    def update(z: Tensor) -> Tensor:
        """Without what acts on one site alone."""
        if attention == "adaptive-tap":  # its precisions are 1
            return fun.update((z, z.new_zeros(1, 5, 8, 8)), context)[0]
        return fun.update(z, context._replace(correction=None))

    jacobian = torch.autograd.functional.jacobian(update, x)[0, :, :, 0].permute(0, 2, 1, 3)
    torch.testing.assert_close(shown[1, 0, 0], torch.linalg.matrix_norm(jacobian))


@pytest.mark.parametrize("attention", ATTENTION)
def test_maps_are_the_steps_of_the_blocks(attention: str) -> None:
    model = build(attention, depth=2).eval()
    with torch.no_grad():
        _, solutions = model(images(), return_solution=True)
        pairs = model.maps(images(), solutions)
        entering = (model.sites(images()), solutions[0].value)
        for number, (f, state) in enumerate(pairs):
            assert torch.equal(mean(state), solutions[number].value)
            for image, part in zip(parts(f(state)), parts(state), strict=True):
                torch.testing.assert_close(image, part, rtol=0, atol=1e-8)
            far = mean(state) + 0.1 * torch.randn_like(mean(state))
            x = model.fields(entering[number], number)
            step = model.blocks[number](x, state=far, steps=1)
            whole = far if isinstance(state, Tensor) else (far, torch.zeros_like(state[1]))
            torch.testing.assert_close(mean(f(whole)), step)
    assert len(pairs) == 2


@pytest.mark.quick("mean-field")
@pytest.mark.parametrize("attention", ATTENTION)
def test_spectral_radius_and_penalty_against_the_jacobian(attention: str) -> None:
    model = build(attention, depth=2, dim=6).eval()
    batch = images(2)
    _, solutions = model(batch, return_solution=True)
    radii = model.spectral_radius(batch, solutions)
    assert radii.shape == (2, 2)
    squares = []
    for row in range(2):
        one = batch[row : row + 1]
        _, alone = model(one, return_solution=True)
        for number, (f, state) in enumerate(model.maps(one, alone)):
            sizes = [part.numel() for part in parts(state)]

            def flat(z: Tensor, f=f, state=state, sizes=sizes) -> Tensor:
                cut = zip(z.split(sizes), parts(state), strict=True)
                pieces = [piece.view_as(part) for piece, part in cut]
                image = f(pieces[0] if isinstance(state, Tensor) else tuple(pieces))
                return torch.cat([part.flatten() for part in parts(image)])

            at = torch.cat([part.detach().flatten() for part in parts(state)])
            jacobian = torch.autograd.functional.jacobian(flat, at)
            expected = torch.linalg.eigvals(jacobian).abs().max()  # type: ignore[arg-type]
            torch.testing.assert_close(radii[number, row], expected, rtol=1e-3, atol=0)
            squares.append(jacobian.square().mean() * len(at))  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    estimates = torch.stack(
        [model.jacobian_penalty(batch, solutions, generator=generator) for _ in range(200)]
    )
    error = estimates.mean() - torch.stack(squares).mean()
    assert abs(error) < 4 * estimates.std() / 200**0.5
    estimates[0].backward()
    assert all(parameter.grad is not None for parameter in model.blocks[0].parameters())


def test_parameters_count_with_their_symmetries() -> None:
    model = build("mean-field", dim=10)
    stem = 10 * 2 * 9 + 10
    pairs = (5 * 4 // 2) * (10 * 11 // 2)
    correction = 2 * 4 * 100 + 50
    around = 10 + 5 * 10 + 20 + 20 + 5 * 10 + 5  # token, positions, norms, head
    assert model.count_params() == stem + pairs + correction + around


def test_what_are_no_solutions_and_no_labels() -> None:
    model = build(depth=2)
    scores, solutions = model(images(), return_solution=True)
    for wrong in ((scores, solutions, scores), scores, solutions[:1]):
        for look in (model.maps, model.couplings, model.spectral_radius, model.jacobian_penalty):
            with pytest.raises(ValueError, match="solutions must be the 2 that the model returns"):
                look(images(), wrong)
    labels = torch.zeros(len(scores), dtype=torch.long)
    labels[1] = 5
    with pytest.raises(ValueError, match="labels must be from 0 to 4, got 5"):
        model.loss(scores, labels)
    labels[1] = -100  # counts for nothing, as everywhere in torch
    expected = F.cross_entropy(scores, labels)
    torch.testing.assert_close(model.loss(scores, labels), expected)
    torch.testing.assert_close(
        model.loss(scores, scores.softmax(1)), F.cross_entropy(scores, scores.softmax(1))
    )
