"""What an inference method says about a system in fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..deq._watched import transformed
from ..solvers import Solution
from ..solvers._validate import version
from ._mcmc import Sampling


@dataclass(frozen=True)
class Response:
    """Magnetizations, free energy and response of a system, by one method.

    Everything is differentiable with respect to couplings, fields and prior parameters that carry
    gradients; of a sampled response only `log_partition` is, once (`GibbsSampler`). What is
    computed on demand raises `RuntimeError` if they were changed in place after the call. Pickling
    and `copy.deepcopy` compute it.

    Attributes:
        magnetization: m_i = ⟨S_i⟩, `(*batch, N, *event)`.
        log_partition: log Z, `(*batch,)`, with priors that are probability measures. J_ij and J_ji
            change together: autograd's gradient has half of that derivative at each.
        energy: ⟨−½ Σ_ij S_iᵀ J_ij S_j − Σ_i x_i·S_i⟩, `(*batch,)`.
        cavity_variance: V_i, `(*batch, N, *event, *event)`, or None if the method has none.
        solution: evidence of the solve, or None if nothing was iterated.
        objective: −log Z after each outer step of a double loop, `(steps, *batch)`, NaN for samples
            that needed none; or None.
        sampling: evidence of the Markov chains, or None if nothing was sampled.
    """

    magnetization: Tensor
    log_partition: Tensor
    energy: Tensor
    cavity_variance: Tensor | None
    solution: Solution | None
    method: str
    _covariance: Callable[[], Tensor] = field(repr=False)
    _susceptibility: Callable[[], Tensor] = field(repr=False)
    objective: Tensor | None = None
    sampling: Sampling | None = None

    @property
    def covariance(self) -> Tensor:
        """χ_ij, the method's own linear response, `(*batch, N, *event, N, *event)`."""
        return self._covariance()

    @property
    def susceptibility(self) -> Tensor:
        """∂m_i/∂x_j, the total derivative, `(*batch, N, *event, N, *event)`.

        Costs one backward solve for every component.
        """
        return self._susceptibility()

    @property
    def entropy(self) -> Tensor:
        """log Z + energy, `(*batch,)`: relative to the prior, so at most 0 for the exact answer."""
        return self.log_partition + self.energy

    def __repr__(self) -> str:
        shape = tuple(self.magnetization.shape)
        log = self.log_partition.detach().mean().item()
        evidence = "".join(f", {e!r}" for e in (self.solution, self.sampling) if e is not None)
        return f"Response({self.method}: magnetization {shape}, mean log Z {log:.6g}{evidence})"


class Later:
    """What a response computes when it is asked for, and keeps.

    With a graph if the `inputs`, the tensors that `compute` reads, carry gradients, gradients were
    enabled when the response was made, and they are when it is asked: a look without them keeps
    nothing that would stand for the value with its graph.

    Raises `RuntimeError` if an input was changed in place in between, as autograd counts changes
    (it misses those through `.data` or an array that shares the memory).
    """

    def __init__(self, compute: Callable[[], Tensor], *inputs: Tensor) -> None:
        self.compute = compute
        self.graph = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        self.inputs = [(t, version(t)) for t in inputs]
        self.kept: dict[bool, Tensor] = {}

    def __call__(self) -> Tensor:
        graph = self.graph and torch.is_grad_enabled()
        if graph not in self.kept and True in self.kept:
            return self.kept[True].detach()
        if graph not in self.kept:
            if any(version(t) != before for t, before in self.inputs):
                raise RuntimeError(
                    "couplings, fields or parameters of the prior were changed in place after the "
                    "response was computed, which reads them when covariance or susceptibility is "
                    "asked for: ask before the change, change a clone, or call the method again"
                )
            # An ordinary tensor even in inference mode: a later call may need it in a graph.
            with torch.inference_mode(False), torch.set_grad_enabled(graph):
                value = self.compute()
            # Detached it would lose its tangent in a forward-mode derivative.
            self.kept[graph] = value if graph or transformed(value) else value.detach()
        return self.kept[graph]

    def __getstate__(self) -> dict[str, Any]:
        """The value alone, which is computed for it: what computes it has no place in a file."""
        self()
        return {"compute": None, "graph": True in self.kept, "inputs": [], "kept": self.kept}


def total_derivative(respond: Callable[[Tensor], Tensor], fields: Tensor) -> Tensor:
    """∂m/∂x `(B, n, n)` of `respond`, fields `(B, n)` to magnetizations `(B, n)`."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        attached = graph and fields.requires_grad
        x = fields.view_as(fields) if attached else fields.detach().requires_grad_()
        m = respond(x)
        rows = [
            torch.autograd.grad(m[:, i].sum(), x, retain_graph=True, create_graph=graph)[0]
            for i in range(m.shape[1])
        ]
    return torch.stack(rows, dim=1)
