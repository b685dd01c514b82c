"""Inference on an accelerator, on the host: the host seldom asks."""

import torch

from deep_implicit_attention.solvers import _anderson, _iterate, _scale
from deep_implicit_attention.spins import AdaptiveTAP, IsingPrior, SpinSystem, _consistency


def test_adaptive_tap_asks_less_than_once_a_step(monkeypatch):
    for part in (_iterate, _anderson, _scale, _consistency):
        monkeypatch.setattr(part, "is_host", lambda z: False, raising=False)
    couplings = 0.2 * torch.randn(6, 6, dtype=torch.float64)
    couplings = (couplings + couplings.mT).fill_diagonal_(0.0)
    fields, asked = torch.randn(3, 6, dtype=torch.float64), 0
    system = SpinSystem(couplings, IsingPrior())

    def ask(t: torch.Tensor) -> bool:
        nonlocal asked
        asked += 1
        return t.item() != 0

    monkeypatch.setattr(torch.Tensor, "__bool__", ask)
    response = AdaptiveTAP()(system, fields)
    assert asked <= int(response.solution.steps.max()) // 2
