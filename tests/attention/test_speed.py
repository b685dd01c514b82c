"""The layers stay as fast as they are: evaluations, arithmetic and memory, which no noise touches.

Times are compared only where a rival takes several times as long, by the least of several.
"""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import WORKLOADS, literally
from benchmarks.timing import Largest, both, forward
from deep_implicit_attention.attention import DEQVanillaSoftmaxAttention
from deep_implicit_attention.deq import DEQFixedPoint

# Of the workloads, in order: evaluations of ours at the start, by the weights of seed 0.
EVALUATIONS = [7, 6, 3, 3, 2, 2, 1, 1]
CASES = list(zip(WORKLOADS, EVALUATIONS, strict=True))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(workload, batch=None):
    torch.manual_seed(0)
    module = workload.make()
    size = workload.size if batch is None else (batch, *workload.size[1:])
    return module, torch.randn(*size) / size[2] ** 0.5


def operations(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def name(value):
    return "-".join([value.name, *map(str, value.size)]) if hasattr(value, "name") else str(value)


@pytest.mark.parametrize(("workload", "evaluations"), CASES, ids=name)
def test_evaluations_at_the_start(workload, evaluations):
    module, x = made(workload)
    with torch.no_grad():
        solution = DEQFixedPoint(module)(x, return_solution=True)
    assert bool(solution.converged.all())
    # Rounding may cost one on another machine.
    assert int(solution.steps.max()) <= evaluations + 1


@pytest.mark.parametrize("workload", WORKLOADS[:6], ids=name)
def test_a_solve_is_its_evaluations(workload):
    """Nothing that could be done once is done again: the arithmetic of a solve is its updates'."""
    module, x = made(workload, batch=2)
    layer = DEQFixedPoint(module)
    with torch.no_grad():
        steps = int(layer(x, return_solution=True).steps.max())
        context = module.prepare(x)
        preparation = operations(lambda: module.prepare(x))
        update = operations(lambda: module.update(torch.randn_like(x), context))
        spent = operations(lambda: layer(x))
    # The preconditioner takes a product of components a site and step, or, after four products of
    # couplings, of all of them.
    bound = preparation + 1.5 * (steps + 1) * update
    size = x[0].numel()
    if workload.name == "mean-field" and size <= 256:
        bound += 2 * size**2 * (len(x) * (steps + 1) + 4.5 * size)
    assert spent <= bound


@pytest.mark.parametrize("causal", [False, True])
def test_no_matrix_between_many_sites_forward_or_backward(causal):
    module = DEQVanillaSoftmaxAttention(2048, 8, heads=2, causal=causal)
    x = torch.randn(1, 2048, 8) / 8**0.5
    layer = DEQFixedPoint(module, on_failure="ignore", solver_fwd_max_iter=3, solver_bwd_max_iter=3)
    with Largest() as largest:
        both(layer, x, list(module.parameters()))()
    assert largest.elements <= 8 * x.numel()


@pytest.mark.quick("mean-field", "softmax")
@pytest.mark.parametrize(
    ("index", "least"), [(2, 1.6), (3, 2.0), (6, 8.0)], ids=["mean-field", "softmax", "adatap"]
)
def test_literal_equations_take_several_times_as_long(index, least):
    module, x = made(WORKLOADS[index])
    weights = list(module.parameters())
    for way in (forward, lambda respond, x: both(respond, x, weights)):
        ours, rival = way(DEQFixedPoint(module), x), way(literally(module, x), x)
        times = {run: [] for run in (ours, rival)}
        for _ in range(4):
            for run, taken in times.items():
                started = time.process_time()
                run()
                taken.append(time.process_time() - started)
        assert min(times[rival]) >= least * min(times[ours])
