"""Gradients of every mechanism through the whole layer; also runs under `python -m unittest`."""

import unittest

import torch
from torch.autograd import gradcheck, gradgradcheck

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
)
from deep_implicit_attention.deq import DEQFixedPoint
from deep_implicit_attention.solvers import anderson

NUM_SPINS, DIM = 3, 3


def mechanisms(lin_response: bool) -> list[torch.nn.Module]:
    """One of each, small; the vector spin mechanism has no correction to switch off."""
    return [
        DEQMeanFieldAttention(NUM_SPINS, DIM, lin_response=lin_response),
        DEQVanillaSoftmaxAttention(NUM_SPINS, DIM, heads=3, lin_response=lin_response),
        DEQMLPMixerAttention(NUM_SPINS, DIM, lin_response=lin_response),
        DEQAdaTAPMeanFieldAttention(NUM_SPINS, DIM, lin_response=lin_response),
        DEQVectorSpinAttention(DIM, heads=1),
    ]


def setUpModule() -> None:
    """Small problems: a second thread would only wait."""
    torch.set_num_threads(1)


class TestGradients(unittest.TestCase):
    """Derivatives with respect to the sources, against finite differences in float64."""

    def setUp(self) -> None:
        torch.manual_seed(0)

    def test_first_and_second_derivatives(self) -> None:
        for lin_response in (False, True):
            for module in mechanisms(lin_response):
                with self.subTest(module=type(module).__name__, lin_response=lin_response):
                    layer = DEQFixedPoint(
                        module,
                        anderson,
                        solver_fwd_max_iter=100,
                        solver_fwd_tol=1e-12,
                        solver_bwd_max_iter=100,
                        solver_bwd_tol=1e-12,
                    ).double()
                    x = torch.randn(1, NUM_SPINS, DIM, dtype=torch.float64) / DIM**0.5
                    x.requires_grad_()
                    self.assertTrue(gradcheck(layer, x, eps=1e-6, atol=1e-6))
                    # Along random directions: all of them take ten times as long.
                    self.assertTrue(gradgradcheck(layer, x, eps=1e-6, atol=1e-6, fast_mode=True))

    def test_default_tolerances(self) -> None:
        """With the loose default tolerances derivatives are as good as the 2021 tests ask."""
        for module in (DEQMeanFieldAttention(11, 3), DEQAdaTAPMeanFieldAttention(11, 3)):
            with self.subTest(module=type(module).__name__):
                layer = DEQFixedPoint(module, anderson).double()
                x = torch.randn(1, 11, 3, dtype=torch.float64) / 3**0.5
                self.assertTrue(
                    gradcheck(
                        layer, x.requires_grad_(), eps=1e-4, atol=1e-3, check_undefined_grad=False
                    )
                )


if __name__ == "__main__":
    unittest.main()
