"""Calls as programs for the 2021 project make them."""

from __future__ import annotations

import pytest
import torch

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.deq import DEQFixedPoint
from deep_implicit_attention.solvers import anderson

SITES, DIM = 64, 16


@pytest.mark.parametrize(
    "make",
    [
        lambda: DEQMeanFieldAttention(
            num_spins=SITES, dim=DIM, weight_init_std=1.0 / (SITES * DIM**2) ** 0.5
        ),
        lambda: DEQVanillaSoftmaxAttention(
            num_spins=SITES, dim=DIM, heads=4, dim_head=None, scale=None, lin_response=True
        ),
        lambda: DEQMLPMixerAttention(num_spins=SITES, dim=DIM, lin_response=True),
        lambda: DEQAdaTAPMeanFieldAttention(num_spins=SITES, dim=DIM, lin_response=True),
    ],
)
def test_single_layer_examples(make, capsys):
    torch.manual_seed(0)
    layer = DEQFixedPoint(
        make(),
        anderson,
        [0],
        solver_fwd_max_iter=30,
        solver_fwd_tol=1e-4,
        solver_bwd_max_iter=30,
        solver_bwd_tol=1e-4,
    )
    source = torch.randn(4, SITES, DIM) / DIM**0.5
    out = layer(source, debug=True)
    assert out.shape == source.shape
    assert "residual" in capsys.readouterr().out
    torch.testing.assert_close(layer(source, solver_fwd_tol=1e-6), out, rtol=0, atol=1e-2)


def test_names_of_the_couplings():
    module = DEQMeanFieldAttention(17, 10, weight_sym_internal=True, weight_sym_sites=True)
    assert module.weight().shape == module._weight.shape == (17, 17, 10, 10)
    assert module.count_params() == 17 * 16 // 2 * 55
    adatap = DEQAdaTAPMeanFieldAttention(5, 3)
    assert adatap.weight_sym_internal
    assert adatap.weight_sym_sites
    assert torch.equal(adatap.spin_prior_inv_var, torch.eye(3).repeat(5, 1, 1))


def test_several_output_elements_come_as_a_list():
    out = DEQFixedPoint(DEQAdaTAPMeanFieldAttention(5, 3), anderson, [0, 1])(torch.zeros(2, 5, 3))
    assert isinstance(out, tuple)
    assert [tuple(part.shape) for part in out] == [(2, 5, 3), (2, 5, 3, 3)]
