"""What benchmarks measure: times in turns, bytes, evaluations, losses, and rivals that are such."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import boltzmann, inference, language, literal, rivals
from benchmarks.evaluations import Counter
from benchmarks.explicit import ExplicitTransformer
from benchmarks.timing import saved_bytes, take_turns
from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.spins import (
    Exact,
    IsingPrior,
    SpinSystem,
    sherrington_kirkpatrick,
)
from examples.shakespeare import train


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Any:
        """A run that takes so long the first time, the second, ..., and then always the last."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_the_median_of_turns_counts_and_the_first_call_does_not() -> None:
    clock = Clock()
    runs = {"a": clock.takes(100.0, 1.0, 9.0, 2.0), "b": clock.takes(50.0, 4.0, 3.0, 8.0)}
    assert take_turns(runs, 3, clock) == {"a": 2.0, "b": 4.0}


def test_contenders_take_turns() -> None:
    order: list[str] = []
    take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert "".join(order) == "ababab"


def test_a_ratio_of_times_is_that_of_one_run_to_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=clock))
    assert inference.seconds(clock.takes(2.0), 5) == 2.0
    run, unit = clock.takes(6.0, 8.0, 600.0, 8.0, 10.0), clock.takes(2.0)
    assert inference.median_ratio(run, unit, 3) == 4.0


def test_a_unit_is_timed_on_both_sides_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=clock))
    # Once to warm up, and then 1 and 3 seconds by turns.
    unit = clock.takes(9.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0)
    assert inference.median_ratio(clock.takes(4.0), unit, 1) == 2.0


def test_a_storage_is_saved_once() -> None:
    x, w = (torch.ones(50, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: x * x + x.view(5, 10).flatten() * w) == 2 * 50 * 4


def test_evaluations_are_counted_until_every_sample_is_solved() -> None:
    """z ← z/10 + 1: relative residuals from 0 are 1, 0.09, 0.009, ... of almost 10^-k."""
    counter = Counter(lambda z: 0.1 * z + 1)

    def iterate(times: int) -> None:
        z = torch.tensor([[0.0], [10 / 9]], dtype=torch.float64)  # one of two is solved at once
        for _ in range(times):
            z = counter(z)

    assert counter.until_solved(lambda: iterate(4)) is None
    counter.calls = 0
    assert counter.until_solved(lambda: iterate(99)) == 5


def test_the_loss_of_a_text_is_the_mean_over_its_windows() -> None:
    """68 windows in parts of 67 and 1."""

    class Model:
        def eval(self) -> None:
            pass

        def __call__(self, ids: Tensor, **_: Any) -> Any:
            count = len(ids)
            residual = torch.full((count,), 1e-3 if count == 67 else 35e-3)
            blocks = [SimpleNamespace(residual=k * residual, steps=torch.full((count,), 6 * k))
                      for k in (1, 2)]  # fmt: skip
            return ids, blocks

        def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
            assert torch.equal(ids[:, 1:], targets[:, :-1])
            return torch.tensor(1.0 if len(ids) == 67 else 69.0)

    found = language.evaluate(Model(), torch.arange(68 * language.LENGTH + 1))
    expected = {"loss": 2.0, "residual": 2 * 1.5e-3, "worst": 70e-3, "steps": 9.0}
    assert found == pytest.approx(expected)


def test_iterations_are_timed_with_as_many_steps_as_a_long_run_has() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(65, 65))
            self.drawn: list[int] = []

        def forward(self, ids: Tensor, steps: int, state: Any = None, **_: Any) -> Any:
            if torch.is_grad_enabled():
                return self.weight[ids]
            self.drawn.append(steps)
            return None, None

        def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
            return logits.gather(2, targets[..., None]).sum()

    model, relax = Model(), 2
    ids = torch.randint(65, (100_000,), generator=torch.Generator().manual_seed(0))
    train(model, ids, language.ITERATIONS, language.TYPICAL, relax, 4)
    assert sum(model.drawn) / language.ITERATIONS == relax / 2


def test_no_equilibrium_model_is_larger_than_an_explicit_one() -> None:
    sizes = {kind: sum(p.numel() for p in language.make(kind).parameters())
             for kind in language.MODELS}  # fmt: skip
    explicit = {kind for kind in sizes if kind.startswith("explicit")}
    assert max(sizes[kind] for kind in sizes.keys() - explicit) <= min(map(sizes.get, explicit))


@pytest.mark.parametrize("rotary_base", [None, 100.0])
def test_the_explicit_transformer_does_not_look_ahead(rotary_base: float | None) -> None:
    torch.manual_seed(0)
    model = ExplicitTransformer(11, 9, rotary_base, dim=16, depth=2)
    ids = torch.randint(11, (3, 9))
    other = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % 11], dim=1)
    with torch.no_grad():
        one, two = model(ids), model(other)
        first = model(torch.cat([(ids[:, :1] + 1) % 11, ids[:, 1:]], dim=1))
    torch.testing.assert_close(one[:, :5], two[:, :5])
    assert (one[:, 5:] - two[:, 5:]).abs().amax(dim=(0, 2)).min() > 1e-3
    assert (one - first).abs().amax(dim=(0, 2)).min() > 1e-4  # what comes later hears of the first


MECHANISMS = {
    "mean-field": lambda: DEQMeanFieldAttention(5, 4),
    "symmetric": lambda: DEQMeanFieldAttention(5, 4, None, True, True, True),
    "softmax": lambda: DEQVanillaSoftmaxAttention(5, 4, heads=2),
    "adaptive TAP": lambda: DEQAdaTAPMeanFieldAttention(5, 4),
}


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_literal_equations_are_those_of_the_layers(name: str, broadcast: bool) -> None:
    torch.manual_seed(0)
    module = MECHANISMS[name]().double()
    x = torch.randn(3, 5, 4, dtype=torch.float64) / 4
    with torch.no_grad():
        start = module.initial_state(x)
        state = start if isinstance(start, tuple) else (start,)
        state = tuple(z + 0.1 * torch.randn_like(z[:, :, 0, None]) for z in state[:1]) + state[1:]
        found = literal.update(module, x, broadcast)(list(state))
        expected = module.update(state if len(state) > 1 else state[0], module.prepare(x))
    for one, other in zip(found, expected if len(found) > 1 else [expected], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["mean-field", "softmax"])
def test_the_floor_is_the_products_of_its_evaluations(name: str) -> None:
    module, x = MECHANISMS[name](), torch.randn(3, 5, 4)

    def operations(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    with torch.no_grad():
        context = module.prepare(x)
        once = operations(lambda: module.update(x, context))
    assert operations(rivals.products(module, x, 3)) == 3 * once


def test_rivals_solve_our_map_to_the_tolerance() -> None:
    torch.manual_seed(0)
    module, x = DEQMeanFieldAttention(5, 4), torch.randn(3, 5, 4) / 2
    seen: list[Tensor] = []
    calls = []
    with torch.no_grad():
        for tol in (1e-1, 1e-5):
            calls.clear()
            respond = rivals.torchdeq_on_our_map(
                module, "fixed_point_iter", tol, seen=lambda: calls.append(1)
            )
            z = respond(x)
            image = module.update(z, module.prepare(x))
            assert ((image - z).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)).max() <= tol
            seen.append(torch.tensor(len(calls)))
    assert seen[0] < seen[1]


def test_probabilities_of_states_are_those_of_the_system() -> None:
    J, x = sherrington_kirkpatrick(4, 0.8, 0.5, 1)
    S = boltzmann.states(4)
    assert len({tuple(row) for row in S}) == 16
    p = np.exp(boltzmann.log_probabilities(J.numpy(), x.numpy(), S))
    assert p.sum() == pytest.approx(1)
    exact = Exact()(SpinSystem(J, IsingPrior()), x).magnetization
    np.testing.assert_allclose(p @ S, exact.numpy(), rtol=1e-10)
