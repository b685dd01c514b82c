"""What makes the softmax mechanisms attention: mixing, causality, masks."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad
from torch.nn import functional as F

from deep_implicit_attention.attention import DEQVanillaSoftmaxAttention, DEQVectorSpinAttention
from deep_implicit_attention.deq import DEQFixedPoint

TIGHT = {
    "solver_fwd_tol": 1e-13,
    "solver_fwd_max_iter": 300,
    "solver_bwd_tol": 1e-13,
    "solver_bwd_max_iter": 300,
}


class TestAttention:
    """What makes it attention."""

    def test_one_step_from_the_input_mixes_tokens(self, x):
        torch.manual_seed(0)
        module = DEQVanillaSoftmaxAttention(4, 6, heads=2).double()
        layer = DEQFixedPoint(module, initial_state="input")
        changed = x.clone()
        changed[:, 1] += 1
        moved = (layer(changed, steps=1) - layer(x, steps=1)).norm(dim=(0, 2))
        assert bool((moved > 1e-3).all())
        # It is the attention block with identity values, from torch's own attention.
        q, k, v = (t.view(3, 4, 2, 3).transpose(1, 2) for t in (module.to_q(x), module.to_k(x), x))
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 4, 6)
        block = module.to_out(pooled) + x - module.correction(x)
        torch.testing.assert_close(layer(x, steps=1), block)

    def test_one_step_from_zeros_mixes_nothing(self, x):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQVanillaSoftmaxAttention(4, 6).double())
        changed = x.clone()
        changed[:, 1] += 1
        moved = (layer(changed, steps=1) - layer(x, steps=1)).norm(dim=(0, 2))
        assert moved[[0, 2, 3]].max() == 0

    @pytest.mark.parametrize("kind", ["softmax", "vector-spin"])
    def test_permuting_sites_permutes_the_answer(self, x, kind):
        torch.manual_seed(0)
        module = (
            DEQVanillaSoftmaxAttention(4, 6, heads=2)
            if kind == "softmax"
            else DEQVectorSpinAttention(6, 2)
        ).double()
        layer = DEQFixedPoint(module, **TIGHT)
        order = torch.tensor([3, 1, 0, 2])
        torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])

    @pytest.mark.parametrize("kind", ["softmax", "vector-spin"])
    def test_causal_states_do_not_see_the_future(self, x, kind):
        torch.manual_seed(0)
        module = (
            DEQVanillaSoftmaxAttention(4, 6, heads=2, causal=True)
            if kind == "softmax"
            else DEQVectorSpinAttention(6, 2, causal=True)
        ).double()
        layer = DEQFixedPoint(module, **TIGHT)
        changed = x.clone()
        changed[:, 2:] = torch.randn(3, 2, 6, dtype=x.dtype)
        torch.testing.assert_close(layer(changed)[:, :2], layer(x)[:, :2])
        torch.testing.assert_close(layer(x[:, :2]), layer(x)[:, :2])
        assert (layer(changed) - layer(x))[:, 2:].norm() > 0.1

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("kind", ["softmax", "vector-spin"])
    @pytest.mark.parametrize("left", [False, True])
    def test_padding_changes_nothing(self, x, kind, causal, left):
        torch.manual_seed(0)
        module = (
            DEQVanillaSoftmaxAttention(4, 6, heads=2, causal=causal)
            if kind == "softmax"
            else DEQVectorSpinAttention(6, 2, causal=causal)
        ).double()
        layer = DEQFixedPoint(module, **TIGHT)
        garbage = torch.full((3, 2, 6), torch.nan, dtype=x.dtype)
        parts, keep = ([garbage, x], slice(2, 6)) if left else ([x, garbage], slice(0, 4))
        padded = torch.cat(parts, dim=1)
        mask = torch.zeros(3, 6, dtype=torch.bool)
        mask[:, keep] = True
        solution = layer(padded, mask, return_solution=True)
        assert bool(solution.converged.all())
        torch.testing.assert_close(solution.value[:, keep], layer(x))
        assert not bool(solution.value[~mask].any())
        alone = layer(x, return_solution=True)
        torch.testing.assert_close(solution.steps, alone.steps)

    def test_a_query_without_keys_is_finite(self, x):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQVanillaSoftmaxAttention(4, 6, heads=2).double(), **TIGHT)
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[1] = False
        x = x.requires_grad_()
        z = layer(x, mask)
        assert not bool(z[1].any())
        gradient = grad(z.sum(), x)[0]
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[1].any())
