"""Several processes, on the CPU by gloo: they learn what one learns, and share its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from deep_implicit_attention.attention import DEQMeanFieldAttention
from deep_implicit_attention.deq import DEQFixedPoint
from deep_implicit_attention.training import Outcome, Plan, Run, Task, Trainer


class Equilibria(Task):
    """Regression by an equilibrium layer on 5 sites of 4 components; 64 rows, batches of 8."""

    batches = 8

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(64, 5, 4, generator=generator, dtype=torch.float64) / 2
        self.y = self.x.sum(dim=(1, 2)).sin()

    def batch(self, epoch: int, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
        rows = order[8 * index : 8 * index + 8]
        noise = 0.1 * torch.randn(8, 5, 4, generator=generator, dtype=torch.float64)
        return self.x[rows] + noise, self.y[rows]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Outcome:
        x, y = batch
        return Outcome((model(x).squeeze(-1) - y).square().mean())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            error = model(self.x[:8]).squeeze(-1) - self.y[:8]
        return {"validation_loss": error.square().mean().item()}


class Model(nn.Module):
    """Linear, equilibrium, linear; exact to 1e-10."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        exact: dict[str, Any] = {"solver_fwd_max_iter": 200, "solver_bwd_max_iter": 200}
        exact |= {"solver_fwd_tol": 1e-10, "solver_bwd_tol": 1e-10}
        self.first = nn.Linear(4, 4)
        self.attention = DEQFixedPoint(DEQMeanFieldAttention(5, 4), **exact)
        self.last = nn.Linear(20, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(self.first(x)).flatten(1))


def train(model: nn.Module, folder: Path, steps: int, **options: Any) -> list[float]:
    """The loss of every step, the mean over all processes."""
    run = Run(folder)
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 and not run.is_started():
        run.start({})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = {"steps": steps, "evaluate_every": steps, "device": "cpu", **options}
    trainer = Trainer(model, optimizer, Equilibria(), Plan(**settings), run)
    losses: list[float] = []
    note = trainer._note
    trainer._note = lambda found: (losses.append(found["loss"]), note(found))[1]  # type: ignore
    trainer.train(resume=True)
    return losses


def worker(rank: int, store: str, kind: str, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    settings |= {"ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in settings.items()})
    # They meet at a file: a port may be taken meanwhile, and is gone with the process that has it.
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model: nn.Module = Model()
    if kind == "ddp":
        found: Any = train(model, folder, 20), train(Model(), folder / "parts", 5, accumulate=2)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # takes as long to import as torch

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh)
        local = [p.to_local().numel() for p in model.parameters()]  # type: ignore[attr-defined]
        found = (sum(local), train(model, folder, 2, ema=0.5))
    results.put((rank, found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[[str], dict[int, Any]]:
    def run(kind: str) -> dict[int, Any]:
        store = (tmp_path / f"{kind}.store").as_uri()
        context = multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        workers = [
            context.Process(target=worker, args=(rank, store, kind, tmp_path / kind, results))
            for rank in range(2)
        ]
        for process in workers:
            process.start()
        for process in workers:
            process.join(timeout=120)
            assert process.exitcode == 0
        return dict(results.get() for _ in range(2))

    return run


@pytest.mark.slow
def test_two_processes_with_half_the_batch_learn_like_one(
    two_processes: Callable[[str], dict[int, Any]], tmp_path: Path
) -> None:
    curves = two_processes("ddp")
    assert curves[0] == curves[1]
    together, in_parts = curves[0]
    alone = train(Model(), tmp_path / "alone", 20)
    assert len(alone) == 20
    assert together == pytest.approx(alone, rel=1e-8, abs=0)
    fewer = train(Model(), tmp_path / "fewer", 5)
    assert in_parts == pytest.approx(fewer, rel=1e-8, abs=0)
    assert max(alone) > 1.1 * min(alone)
    first, second = (Run(tmp_path / name).metrics() for name in ("ddp", "alone"))
    assert len(first) == len(second) == 1  # one process writes
    assert first[0]["validation_loss"] == pytest.approx(second[0]["validation_loss"], rel=1e-8)
    # What two processes saved, one goes on from (with its own random numbers for the second).
    resumed = Trainer(
        model := Model(),
        torch.optim.AdamW(model.parameters(), lr=0.01),
        Equilibria(),
        Plan(steps=20, evaluate_every=20, device="cpu"),
        Run(tmp_path / "ddp"),
    )
    assert resumed.train(resume=True) == "finished"
    with torch.no_grad():
        loss = resumed.task.evaluate(model.eval())["validation_loss"]
    assert loss == pytest.approx(first[0]["validation_loss"], rel=1e-12)


@pytest.mark.slow
def test_sharded_weights_train_and_load_in_one_process(
    two_processes: Callable[[str], dict[int, Any]], tmp_path: Path
) -> None:
    found = two_processes("fsdp")
    total = sum(p.numel() for p in Model().parameters())
    assert sum(local for local, _ in found.values()) == total  # nothing is held twice
    assert max(local for local, _ in found.values()) < 0.7 * total
    alone = train(Model(), tmp_path / "alone", 2, ema=0.5)
    assert found[0][1] == found[1][1]
    assert found[0][1] == pytest.approx(alone, rel=1e-9)
    sharded, whole = (Run(tmp_path / name).checkpoints.read(2) for name in ("fsdp", "alone"))
    for part in ("model", "average", "optimizer"):
        assert sharded.parts[part].keys() == whole.parts[part].keys()
        for name, value in whole.parts[part].items():
            torch.testing.assert_close(sharded.parts[part][name], value, rtol=1e-6, atol=1e-9)
    model = Model()
    assert train(model, tmp_path / "fsdp", 2, ema=0.5) == []  # finished
    assert all(torch.equal(v, sharded.parts["model"][k]) for k, v in model.state_dict().items())
    kept = Model()
    Run(tmp_path / "fsdp").load_weights(kept)
    assert all(torch.equal(v, sharded.parts["average"][k]) for k, v in kept.state_dict().items())
