"""`count_params` against the rank of the map from stored to used couplings, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deep_implicit_attention.attention import DEQMeanFieldAttention
from deep_implicit_attention.models import SiteClassifier, count_params


def coupling_rank(module: nn.Module) -> int:
    """Dimension of the space of couplings that the raw parameter can reach."""
    raw = module._weight
    images = []
    with torch.no_grad():
        for direction in torch.eye(raw.numel()):
            raw.copy_(direction.view_as(raw))
            images.append(module.weight().flatten())
    return int(torch.linalg.matrix_rank(torch.stack(images)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dim", "channels"), [(1, 1), (2, 3)])
def test_site_classifier_counts_free_numbers(symmetric: bool, dim: int, channels: int) -> None:
    model = SiteClassifier(
        image_size=4,
        num_classes=3,
        channels=channels,
        widths=(5, 7),
        strides=(1, 2),
        dim=dim,
        symmetric=symmetric,
    )
    stem = (9 * channels * 5 + 2 * 5) + (9 * 5 * 7 + 2 * 7) + (7 * dim + dim)
    field = dim + 2 * dim  # token, norm
    correction = (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim)
    head = 2 * dim + (3 * dim + 3)
    expected = stem + field + correction + head + coupling_rank(model.attention.fun)
    assert model.count_params() == count_params(model) == expected


@pytest.mark.parametrize("internal", [True, False])
@pytest.mark.parametrize("sites", [True, False])
def test_couplings_nested_in_any_module(internal: bool, sites: bool) -> None:
    options = {"weight_sym_internal": internal, "weight_sym_sites": sites, "lin_response": False}
    one = DEQMeanFieldAttention(3, 2, **options)
    other = DEQMeanFieldAttention(4, 2, **options)
    expected = coupling_rank(one) + coupling_rank(other) + 7 * 2 + 2
    assert count_params(nn.ModuleList([one, nn.Sequential(other), nn.Linear(7, 2)])) == expected


def test_shared_modules_count_once() -> None:
    couplings = DEQMeanFieldAttention(3, 2, weight_sym_sites=True, lin_response=False)
    linear = nn.Linear(4, 4)
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = linear.weight
    shared = nn.ModuleList([couplings, nn.Sequential(couplings), linear, linear, tied])
    assert count_params(shared) == coupling_rank(couplings) + 4 * 4 + 4


def test_fixed_couplings_do_not_count() -> None:
    fixed = DEQMeanFieldAttention(3, 2, weight_training=False, lin_response=False)
    assert count_params(nn.ModuleList([fixed, nn.Linear(2, 1)])) == 3
