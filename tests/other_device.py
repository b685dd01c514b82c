"""Layers, methods and models on a device that is not the host, against the host's answers.

    python -m tests.other_device

In a process of its own, which `tests/test_other_device.py` starts: a device once registered stays.
"""

from __future__ import annotations

import copy
import os
from functools import partial

import torch

from benchmarks.pretended import NAME, Counts, register
from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
    _mean_field,
    _softmax,
)
from deep_implicit_attention.deq import DEQFixedPoint, Implicit, _layer, spectral_radius
from deep_implicit_attention.models import (
    DeepImplicitAttentionTransformer,
    DeepImplicitAttentionViT,
)
from deep_implicit_attention.solvers import anderson, broyden, gmres, picard
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    Exact,
    ExpectationPropagation,
    IsingPrior,
    NaiveMeanField,
    SelfAveragingTAP,
    SpinSystem,
)

N, D = 6, 4
softmax = partial(DEQVanillaSoftmaxAttention, N, D, heads=2)
tap = partial(DEQAdaTAPMeanFieldAttention, N, D)
MECHANISMS = {
    "mean field": partial(DEQMeanFieldAttention, N, D),
    "softmax": softmax,
    "softmax, normalised": partial(softmax, normalize=True, causal=True, rotary=True),
    "vector spins": partial(DEQVectorSpinAttention, D, 1),
    "mixer": partial(DEQMLPMixerAttention, N, D),
    "adaptive TAP": tap,
    "adaptive TAP, Ising": partial(tap, prior=IsingPrior()),
}
METHODS = (NaiveMeanField, TAP, AdaptiveTAP, SelfAveragingTAP, ExpectationPropagation, Exact)


def alike(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-6) -> None:
    """The same numbers, and on the device."""
    assert found.device.type == NAME, found.device
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-5, atol=atol)


def check_layer(make, *solver, **options) -> None:
    """Values and gradients by everything, with and without a mask or a number of steps."""
    module = make().double()
    x = torch.randn(3, N, D, dtype=torch.float64)
    there = DEQFixedPoint(copy.deepcopy(module).to(NAME), *solver, **options)
    here = DEQFixedPoint(module, *solver, **options)
    inputs = [((), {}), ((), {"steps": 4})]
    if isinstance(module, DEQVanillaSoftmaxAttention | DEQVectorSpinAttention):
        inputs.append(((torch.rand(3, N) < 0.8,), {}))
    for extra, settings in inputs:
        fields = [x.clone().requires_grad_(), x.to(NAME).requires_grad_()]
        values = [here(fields[0], *extra, **settings)]
        values.append(there(fields[1], *(e.to(NAME) for e in extra), **settings))
        for value in values:
            value.square().sum().backward()
        alike(values[1], values[0])
        alike(fields[1].grad, fields[0].grad)
        for weight, other in zip(here.parameters(), there.parameters(), strict=True):
            if weight.grad is not None:
                alike(other.grad, weight.grad)
        here.zero_grad()
        there.zero_grad()
    with torch.no_grad():
        solution = there(x.to(NAME), return_solution=True)
    assert solution.all_converged()
    assert {solution.residual.device.type, solution.steps.device.type} == {NAME}


def check_method(method: type, couplings: torch.Tensor, fields: torch.Tensor) -> None:
    """Every tensor of a response."""
    infer = method() if method is Exact else method(tol=1e-4)
    expected = infer(SpinSystem(couplings, IsingPrior()), fields)
    found = infer(SpinSystem(couplings.to(NAME), IsingPrior()), fields.to(NAME))
    for name in ("magnetization", "log_partition", "energy", "entropy", "susceptibility"):
        alike(getattr(found, name), getattr(expected, name), atol=1e-3)


def check_models() -> None:
    """A language model that generates, and a classifier with its diagnostics."""
    model = DeepImplicitAttentionTransformer(num_tokens=9, max_seq_len=12, dim=8, heads=2).eval()
    ids, other = torch.randint(9, (2, 5)), copy.deepcopy(model).to(NAME)
    for cache in (True, False):
        text = other.generate(ids.to(NAME), 4, temperature=0.0, cache=cache)
        assert torch.equal(text.cpu(), model.generate(ids, 4, temperature=0.0, cache=cache))
    vit = DeepImplicitAttentionViT(
        image_size=8, patch_size=4, num_classes=3, dim=8, channels=1
    ).eval()
    images, other = torch.randn(2, 1, 8, 8), copy.deepcopy(vit).to(NAME)
    logits, solutions = vit(images, return_solution=True)
    found, there = other(images.to(NAME), return_solution=True)
    alike(found, logits, atol=1e-3)
    for (f, z), (g, y) in zip(
        vit.maps(images, solutions), other.maps(images.to(NAME), there), strict=True
    ):
        alike(spectral_radius(g, y), spectral_radius(f, z), atol=1e-2)


def check_narrow() -> None:
    """Inside autocast first steps are in bfloat16, with sums in float32; answers are as exact."""
    for part in (_softmax, _mean_field):
        part.narrow_pays = lambda x: x.device.type == NAME
    _softmax._WIDE = _mean_field._LARGE = 1
    for name in ("mean field", "softmax, normalised"):
        module, x = MECHANISMS[name](), torch.randn(3, N, D).requires_grad_()
        options = {"solver_fwd_max_iter": 90, "on_failure": "raise"}
        z = DEQFixedPoint(module, solver_fwd_tol=1e-6, **options)(x)
        z.square().sum().backward()
        there = DEQFixedPoint(copy.deepcopy(module).to(NAME), **options)
        for inside in (False, True):
            _layer.in_autocast = lambda like, inside=inside: inside
            y = x.detach().to(NAME).requires_grad_()
            forward = Counts()
            found = there(y)
            backward = Counts()
            found.square().sum().backward()
            for counts in (forward, backward):
                assert counts.narrow >= 2 if inside else not counts.narrow, (name, counts.narrow)
            alike(found, z, atol=2e-3)
            alike(y.grad, x.grad, atol=1e-2)


def check_counts() -> None:
    """A step that is no mixture starts a dozen kernels, map included; few steps end in a look."""
    module = DEQMeanFieldAttention(64, 16)
    x = (torch.randn(32, 64, 16) / 4).to(NAME)
    layer, counts = DEQFixedPoint(module.to(NAME)), Counts()
    with torch.no_grad():
        solution = layer(x, return_solution=True)
    steps = int(solution.steps.max())
    assert steps >= 6
    assert counts.kernels <= 13 * steps + 30, (counts.kernels, steps)
    assert counts.waits <= steps // 2 + 2, (counts.waits, steps)


def main() -> None:
    register()
    torch.manual_seed(0)
    tight = {"solver_fwd_tol": 1e-9, "solver_fwd_max_iter": 200, "on_failure": "raise"}
    both = {**tight, "solver_bwd_tol": 1e-9, "solver_bwd_max_iter": 200}
    for make in MECHANISMS.values():
        check_layer(make, **both)
    for solver in (anderson, picard, broyden):
        check_layer(softmax, solver, **both)
    check_layer(softmax, adjoint=Implicit(gmres, tol=1e-9, max_iter=200), **tight)
    J = 0.05 * torch.randn(N, N, dtype=torch.float64)
    J = (J + J.mT).fill_diagonal_(0)
    fields = torch.randn(3, N, dtype=torch.float64)
    for method in METHODS:
        check_method(method, J, fields)
    check_models()
    check_counts()
    check_narrow()  # last, since it changes what the layers know of the device
    print("ok", flush=True)
    # Not by way of Python's end, where torch's threads for the device are in the way.
    os._exit(0)


if __name__ == "__main__":
    main()
