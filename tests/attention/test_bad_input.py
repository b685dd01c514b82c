"""Wrong sources, masks and sizes are refused at the door, naming what was expected."""

from __future__ import annotations

import pytest
import torch

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
)
from deep_implicit_attention.deq import DEQFixedPoint


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4, 6), ValueError, r"shape \(batch, .*6\), got \(4, 6\)"),
        (torch.zeros(3, 4, 6, 1), ValueError, "shape"),
        (torch.zeros(3, 4, 5), ValueError, r"6\), got \(3, 4, 5\)"),
        (torch.zeros(3, 4, 6, dtype=torch.float32), TypeError, "float32.*float64"),
        (torch.zeros(3, 4, 6, dtype=torch.long), TypeError, "floating"),
        (torch.zeros(3, 4, 6, dtype=torch.complex128), TypeError, "floating"),
        (torch.zeros(3, 4, 6, dtype=torch.float64, device="meta"), ValueError, "meta"),
    ],
)
def test_sources(case, x, error, message):
    with pytest.raises(error, match=message):
        DEQFixedPoint(case.module)(x)


@pytest.mark.parametrize(
    "make", [DEQMeanFieldAttention, DEQMLPMixerAttention, DEQAdaTAPMeanFieldAttention]
)
def test_number_of_sites(make):
    with pytest.raises(ValueError, match=r"\(batch, 4, 6\), got \(3, 5, 6\)"):
        DEQFixedPoint(make(4, 6))(torch.zeros(3, 5, 6))
    with pytest.raises(ValueError, match=r"\(batch, 4, 6\)"):
        make(4, 6).couplings(torch.zeros(3, 5, 6))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 5, dtype=torch.bool), ValueError, r"mask must have shape \(3, 4\)"),
        (torch.ones(4, dtype=torch.bool), ValueError, "mask"),
        (torch.ones(3, 4), TypeError, "boolean.*float32"),
        ([[True] * 4] * 3, TypeError, "boolean.*list"),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda: DEQVanillaSoftmaxAttention(4, 6), lambda: DEQVectorSpinAttention(6, 2)]
)
def test_masks(make, mask, error, message):
    with pytest.raises(error, match=message):
        DEQFixedPoint(make())(torch.zeros(3, 4, 6), mask)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DEQMeanFieldAttention(0, 6), ValueError, "num_spins"),
        (lambda: DEQMeanFieldAttention(4, 1.5), TypeError, "dim"),
        (lambda: DEQMeanFieldAttention(4, 6, weight_init_std=-1.0), ValueError, "weight_init_std"),
        (lambda: DEQVanillaSoftmaxAttention(4, 6, heads=4), ValueError, "divisible by heads"),
        (lambda: DEQVanillaSoftmaxAttention(4, 6, heads=0), ValueError, "heads"),
        (lambda: DEQVanillaSoftmaxAttention(4, 6, dim_head=0), ValueError, "dim_head"),
        (lambda: DEQVectorSpinAttention(6, 3), ValueError, "at least 3 components a head"),
        (lambda: DEQVectorSpinAttention(6, 2, beta=0.0), ValueError, "beta"),
        (lambda: DEQVectorSpinAttention(6, 2, beta=float("nan")), ValueError, "beta"),
        (lambda: DEQVectorSpinAttention(6, 2, beta=float("inf")), ValueError, "beta"),
        (lambda: DEQVectorSpinAttention(6, 2, beta=None), TypeError, "beta must be a number"),
        (lambda: DEQVectorSpinAttention(6, 2, scale=float("nan")), ValueError, "scale"),
        (lambda: DEQVanillaSoftmaxAttention(4, 6, scale=float("nan")), ValueError, "scale"),
        (
            lambda: DEQMeanFieldAttention(4, 6, weight_init_std=float("inf")),
            ValueError,
            "weight_init_std",
        ),
        (lambda: DEQMLPMixerAttention(4, 0), ValueError, "dim"),
        (lambda: DEQVanillaSoftmaxAttention(4, 6, rotary_base=9.0), ValueError, "rotary positions"),
        (lambda: DEQVectorSpinAttention(6, 2, rotary_base=9.0), ValueError, "rotary positions"),
    ],
)
def test_sizes(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "make", [DEQMeanFieldAttention, DEQMLPMixerAttention, DEQAdaTAPMeanFieldAttention]
)
def test_masks_for_mechanisms_without(make):
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match=f"{make.__name__} takes no input beside x"):
        DEQFixedPoint(make(4, 6))(torch.zeros(3, 4, 6), mask)


@pytest.mark.parametrize(
    ("make", "sites"),
    [(DEQVanillaSoftmaxAttention, {"num_spins": 4}), (DEQVectorSpinAttention, {})],
)
def test_queries_keys_and_values_are_refused(make, sites):
    x = torch.zeros(3, 4, 6)
    with pytest.raises(TypeError, match=f"{make.__name__} takes x and a key mask, got 1 more"):
        DEQFixedPoint(make(dim=6, heads=2, **sites))(x, x, x)


@pytest.mark.parametrize("options", [{"steps": 2}, {"initial_state": "input"}])
def test_empty_batches_at_any_horizon(case, options):
    empty = tuple(mask[:0] for mask in case.inputs)
    z = DEQFixedPoint(case.module, **options)(torch.zeros(0, 4, 6, dtype=torch.float64), *empty)
    assert z.shape == (0, 4, 6)


def test_the_input_is_not_changed(case, x):
    before = x.clone()
    inputs = tuple(mask.clone() for mask in case.inputs)
    DEQFixedPoint(case.module)(x, *case.inputs).sum()
    assert torch.equal(x, before)
    for now, then in zip(case.inputs, inputs, strict=True):
        assert torch.equal(now, then)


def test_fields_that_are_no_tensor(case, x):
    calls = [DEQFixedPoint(case.module), case.module.couplings]
    if isinstance(case.module, DEQAdaTAPMeanFieldAttention) and case.module.symmetric:
        calls.append(case.module.free_energy)
    for call in calls:
        with pytest.raises(TypeError, match="x must be a tensor, got ndarray"):
            call(x.detach().numpy())


def test_weights_that_are_not_finite_are_reported_for_every_sample(case, x):
    for parameter in case.module.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.warns(UserWarning, match="nonfinite: 3"):
        z = DEQFixedPoint(case.module)(x, *case.inputs)
    assert bool(z.isnan().flatten(1).any(dim=1).all())
