"""The layer under `DistributedDataParallel`, `torch.compile` and `torch.export`."""

from __future__ import annotations

import pytest
import torch
from torch import multiprocessing, nn

from deep_implicit_attention.attention import DEQMeanFieldAttention, DEQVanillaSoftmaxAttention
from deep_implicit_attention.deq import DEQFixedPoint, DEQModule


def _network() -> nn.Module:
    torch.manual_seed(0)
    options = {
        "solver_fwd_tol": 1e-12,
        "solver_bwd_tol": 1e-12,
        "solver_fwd_max_iter": 200,
        "solver_bwd_max_iter": 200,
    }
    return nn.Sequential(
        nn.Linear(4, 4), DEQFixedPoint(DEQMeanFieldAttention(5, 4), **options), nn.Linear(4, 1)
    ).double()


def _losses(network: nn.Module, x: torch.Tensor, steps: int = 5) -> list[float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = network(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _batch() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 5, 4, dtype=torch.float64) / 2


def _worker(rank: int, store: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    network = nn.parallel.DistributedDataParallel(_network())
    half = _batch()[2 * rank : 2 * rank + 2]
    results.put((rank, _losses(network, half)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    store = (tmp_path / "store").as_uri()
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(rank, store, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    curves = dict(results.get() for _ in range(2))
    # The mean over the whole batch is the mean of the halves, at every step.
    together = torch.tensor([curves[0], curves[1]], dtype=torch.float64).mean(dim=0)
    alone = torch.tensor(_losses(_network(), _batch()), dtype=torch.float64)
    assert alone[-1] < alone[0]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_compiled_is_eager():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 4), DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4, heads=2))
    )
    compiled = torch.compile(network)
    x = _batch().float()
    torch.testing.assert_close(compiled(x), network(x))
    mine = torch.autograd.grad(compiled(x).square().sum(), list(network.parameters()))
    theirs = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_fixed_horizon_exports_with_any_batch_size():
    torch.manual_seed(0)
    layer = DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4, heads=2), steps=3).eval()
    x = _batch().float()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(_Plain(layer), (x,), dynamic_shapes=({0: batch},)).module()
    for rows in (x, torch.cat([x, 2 * x, 3 * x])):
        torch.testing.assert_close(exported(rows), layer(rows), rtol=1e-4, atol=1e-6)


def test_with_a_mask_it_exports_with_any_number_of_sites():
    torch.manual_seed(0)
    layer = DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 16), steps=2).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sites")}
    example = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    shapes = {"x": sizes, "mask": sizes}
    exported = torch.export.export(_Masked(layer), example, dynamic_shapes=shapes).module()
    for batch, sites in ((3, 7), (2, 130), (1, 1025)):
        x, mask = torch.randn(batch, sites, 16), torch.rand(batch, sites) < 0.5
        torch.testing.assert_close(exported(x, mask), layer(x, mask), rtol=1e-4, atol=1e-5)


class _Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(x, mask)


class _Plain(nn.Module):
    """A model around the layer, with one input, as an exporter wants it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


_compiled: list[bool] = []  # whether a compiler was at work, at each update


class _Tanh(DEQModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def update(self, z: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        _compiled.append(torch.compiler.is_compiling())
        return torch.tanh(self.linear(z) / 4 + context)


@pytest.mark.slow
def test_a_compiled_step_leaves_both_solves_out():
    torch.manual_seed(0)
    layer = DEQFixedPoint(_Tanh())

    def step(x: torch.Tensor) -> None:
        layer(x).square().sum().backward()

    x = _batch().float()
    step(x)
    expected = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    _compiled.clear()
    torch.compile(step, backend="eager")(x)
    assert _compiled
    assert not any(_compiled)
    for p, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
