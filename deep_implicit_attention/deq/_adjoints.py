"""How a solution is attached to the graph: exactly, or by a cheaper approximation.

A tape of f at a detached solution is right to first order only: dz*/dθ inside ∂f/∂θ is missing.
So the exact adjoint is an autograd Function whose inputs are the tensors that f depends on and
whose backward evaluates f again at the *attached* solution, differentiates with respect to fresh
aliases, and solves its linear equation by a fixed point that is itself differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore
from torch.autograd import Function

from ..solvers import Solution, gmres
from ..solvers._scale import is_host, norms, power_of_two
from ..solvers._validate import check_count, check_number, check_options, takes
from ._again import check_again
from ._failure import report
from ._linear_map import Pullback, nearer, transpose, vjp
from ._map import TracedMap, node_number, without_autocast
from ._refusal import link, refuse, reroute
from ._transposed import AdjointMap, product_of_some
from ._watched import mapped

# Norms of gradients from here to the inverse of it are of order one.
_SMALL = 1e-4

FlatMap = Callable[[Tensor, Sequence[Tensor]], Tensor]

_AT_A_SOLUTION = (
    "the gradient came from a tape at a fixed solution (OneStep, Phantom, or a tensor that f "
    "merely closes over). Use Implicit() and pass such tensors in args, or make f a module that "
    "owns them."
)


class Forward(NamedTuple):
    """How a solution was found, which a backward solve follows where it has no settings of its own.

    `rough` says that f has an approximation for the first steps; `found` is the evidence for the
    solution.
    """

    tol: float
    max_iter: int
    on_failure: str
    preconditioner: Callable[[Tensor], Tensor] | None
    rough: bool
    found: Solution


class Adjoint:
    """Attaches a solution to the graph. Subclasses: `Implicit`, `OneStep`, `Phantom`."""

    def attach(self, f: TracedMap, z: Tensor, forward: Forward) -> Tensor:
        """`z` `(B, n)`, bit for bit, as a differentiable function of what `f` depends on."""
        raise NotImplementedError


@dataclass(frozen=True, init=False)
class Implicit(Adjoint):
    """The exact gradient, by the implicit function theorem.

    With z* = f(z*, θ) and g = ∂L/∂z*, solves u = (∂f/∂z)ᵀ u + g and returns (∂f/∂θ)ᵀ u (Bai,
    Kolter, Koltun 2019, arXiv:1909.01377; Kolter, Duvenaud, Johnson 2020, chapter 4). The
    gradient is differentiable in turn, to any order, with respect to the tensors in `args` and
    the parameters of an f that is a module; second derivatives that involve tensors f merely
    closes over raise `RuntimeError`.

    Exact up to `tol`. Costs one evaluation of f with a graph (none where f is a module that knows
    its own derivatives) and one vector–Jacobian product per solver step; memory is that of one
    evaluation, however many steps forward or backward take (and the solver's history).

    Args:
        solver: `gmres`, which needs the fewest products, or any fixed-point solver.
        tol: tolerance of the backward solve; by default that of the forward solve.
        max_iter: its step limit; by default that of the forward solve.
        observe: called with the `Solution` of each backward solve; where needed, its gradient is
            scaled to order one by a power of two for each sample.
        **options: further options of `solver`.

    A backward solve that fails warns or raises as the forward solve's `on_failure` says.
    """

    solver: Callable[..., Solution]
    tol: float | None
    max_iter: int | None
    observe: Callable[[Solution], Any] | None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __init__(
        self,
        solver: Callable[..., Solution] = gmres,
        *,
        tol: float | None = None,
        max_iter: int | None = None,
        observe: Callable[[Solution], Any] | None = None,
        **options: Any,
    ) -> None:
        if not callable(solver):
            raise TypeError(f"solver must be callable, got {type(solver).__name__}")
        if tol is not None:
            check_number("tol", tol, minimum=0.0)
        if max_iter is not None:
            check_count("max_iter", max_iter)
        if observe is not None and not callable(observe):
            raise TypeError(f"observe must be callable or None, got {type(observe).__name__}")
        check_options(solver, options, owner="Implicit")
        for name, value in (
            ("solver", solver),
            ("tol", tol),
            ("max_iter", max_iter),
            ("observe", observe),
            ("options", options),
        ):
            object.__setattr__(self, name, value)

    def attach(self, f: TracedMap, z: Tensor, forward: Forward) -> Tensor:
        equation = _Equation(
            self,
            forward.tol if self.tol is None else self.tol,
            forward.max_iter if self.max_iter is None else self.max_iter,
            forward.on_failure,
            forward.preconditioner if self._leaves_open("preconditioner") else None,
            forward.rough and self._leaves_open("rough"),
            forward.found,
        )
        tape, closed = None, []
        if f.closes_over:
            tape, closed = f.tape(z)
        return _attach(f, equation, z, tape, f.kept(f.tensors), closed)

    def _leaves_open(self, option: str) -> bool:
        """Whether the solver takes an option that the user has not given."""
        return takes(self.solver, option) and option not in self.options


@dataclass(frozen=True)
class Phantom(Adjoint):
    """The phantom gradient: `steps` damped steps from the solution, differentiated through.

    Approximates (1 − ∂f/∂z)⁻¹ by the first `steps` terms of its (damped) Neumann series (Geng et
    al. 2021, arXiv:2111.05177). Costs `steps` evaluations with a graph, in time and memory, and
    no solve. Right where ∂f/∂z is small; second derivatives raise.

    Args:
        steps: evaluations of f.
        damping: part of the old state kept at each step, in [0, 1).
    """

    steps: int = 5
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_number("damping", self.damping, minimum=0.0, below=1.0)

    def attach(self, f: TracedMap, z: Tensor, forward: Forward) -> Tensor:
        unrolled = z
        for _ in range(self.steps):
            image = f(unrolled, f.tensors)
            unrolled = self.damping * unrolled + (1 - self.damping) * image
        return reroute(z, unrolled, _AT_A_SOLUTION)


@dataclass(frozen=True)
class OneStep(Phantom):
    """The Jacobian-free gradient: (1 − ∂f/∂z)⁻¹ replaced by 1, so u = ∂L/∂z*.

    Approximates the exact gradient by the derivative of one step from the solution (Fung et al.
    2022, arXiv:2103.12803). Costs one evaluation with a graph and no solve. A descent direction
    where f contracts well; second derivatives raise.
    """

    steps: int = field(default=1, init=False, repr=False)
    damping: float = field(default=0.0, init=False, repr=False)


@dataclass(frozen=True)
class _Equation:
    """How the linear equation u = (∂f/∂z)ᵀ u + g of one backward pass is solved.

    `preconditioner` is that of the forward equation, whose transpose serves here; `rough` says that
    f has an approximation for the first steps; `found` is the evidence for z*.
    """

    adjoint: Implicit
    tol: float
    max_iter: int
    on_failure: str
    preconditioner: Callable[[Tensor], Tensor] | None
    rough: bool
    found: Solution

    def solve(
        self,
        product: Callable[[Tensor], Tensor],
        g: Tensor,
        rough: Callable[[Tensor], Tensor] | None = None,
        rows: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """u, given `product` u ↦ (∂f/∂z)ᵀ u; `rows` makes that of some samples of their index."""
        solver, settings = self.adjoint.solver, self.adjoint.options
        settings = {"tol": self.tol, "max_iter": self.max_iter, **settings}
        if self.preconditioner is not None:
            settings["preconditioner"] = transpose(self.preconditioner, g)
        # The equation is linear: at order one, small gradients do not underflow in the solver.
        unit = None if "stop_mode" not in settings and _moderate(g) else power_of_two(g)
        g = g if unit is None else g / unit
        if is_gmres(solver):
            solution = solver(lambda u: u - product(u), g, **settings)
        else:
            start = g
            if self.preconditioner is not None:
                start = settings["preconditioner"](g)
                if isinstance(product, Pullback) and product.remainder is not None:
                    after = settings["preconditioner"](product.remainder(start) + g)
                    start = nearer(start, after)
            if rough is not None:
                settings["rough"] = lambda u: rough(u) + g
            solution = solver(AdjointMap(product, g, rows), start, **settings)
        if self.adjoint.observe is not None:
            self.adjoint.observe(solution)
        if not solution.all_converged():
            # A gradient that was not finite when it came is not the solve's failure.
            judged = solution.accepting(~torch.isfinite(g).all(dim=1))
            said: dict[str, Any] = {"stacklevel": 2, "in_a_layer": "solver_bwd_"}
            report(judged, self.on_failure, "backward solve", self.tol, **said)
        return solution.value if unit is None else solution.value * unit


def is_gmres(solver: Callable) -> bool:
    """Whether `solver` is `gmres`, whatever options it is bound to."""
    while isinstance(solver, partial):
        solver = solver.func
    return solver is gmres


def _moderate(g: Tensor) -> bool:
    """Whether it is known that no gradient is far from order one."""
    if not is_host(g):
        return False
    (norm,) = norms(g)
    return bool(np.count_nonzero((norm > _SMALL) & (norm < 1 / _SMALL)) == len(norm))


def _attach(
    f: FlatMap,
    equation: _Equation,
    z: Tensor,
    tape: Tensor | None,
    tensors: Sequence[Tensor],
    closed: Sequence[Tensor] = (),
) -> Tensor:
    return _Attach.apply(f, equation, z, tape, closed, *tensors)


class _Attach(Function):
    """z* as a function of the tensors f depends on; `tape` leads to what it closes over.

    The leaves among that, `closed`, are saved only so that torch notices if they are changed before
    backward, which evaluates f again.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        f: FlatMap,
        equation: _Equation,
        z: Tensor,
        tape: Tensor | None,
        closed: Sequence[Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        value = z.clone()
        ctx.f, ctx.equation = f, equation
        ctx.save_for_backward(value, tape, *tensors, *closed)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        if torch.compiler.is_compiling():
            # Of a compiled function that calls `backward`: a loop on data, as the forward solve is.
            eager: Any = torch.compiler.disable(_Attach.backward)
            return eager(ctx, g)
        if is_legacy_batchedtensor(g) or mapped(g):
            raise RuntimeError(
                "gradients of a fixed point are solved for one vector at a time: leave out "
                "is_grads_batched=True, vectorize=True of torch.autograd.functional, or vmap"
            )
        needed = ctx.needs_input_grad[5:]
        z, tape, *tensors = ctx.saved_tensors[: 2 + len(needed)]
        u = _solve_adjoint(ctx.f, ctx.equation, z, tensors, needed, g)
        if torch.is_grad_enabled():
            transposed = _Transposed(ctx.f)
            plain = replace(ctx.equation, preconditioner=None)
            u = _attach(transposed, plain, u.value, None, (g, z, *tensors))
            grads = _products(ctx.f, z, tensors, needed, u)
            if tape is not None:
                # What f closes over has no alias, so whoever differentiates these products with
                # respect to it, or the tape's own gradient with respect to anything, is refused.
                refusal = refuse(tape, _AT_A_SOLUTION)
                grads = [None if d is None else link(d, refusal) for d in grads]
                u = link(u, refuse(z, _AT_A_SOLUTION))
        else:
            with without_autocast(z):
                grads, u = u.finish(), u.value
        return None, None, None, (u if tape is not None else None), None, *grads


@dataclass
class _Adjoined:
    """The solution u of one adjoint equation, and (∂f/∂θ)ᵀ u for every tensor that needs it."""

    value: Tensor
    finish: Callable[[], list[Tensor | None]]


def _solve_adjoint(
    f: FlatMap,
    equation: _Equation,
    z: Tensor,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    g: Tensor,
) -> _Adjoined:
    """Solve u = (∂f/∂z)ᵀ u + g with at most one evaluation of f and no graph of the solve."""
    by_hand = rough = rows = None
    with torch.no_grad(), without_autocast(z):
        if isinstance(f, TracedMap):
            by_hand = f.vjp(z.detach(), tensors)
            if by_hand is not None and equation.rough:
                rough = f.vjp(z.detach(), tensors, rough=True)
            if f.selects:
                rows = partial(product_of_some, f, z.detach(), tensors, by_hand is not None)
        if isinstance(by_hand, Pullback):
            by_context = by_hand.by_context
            u = equation.solve(by_hand, g.detach(), rough, rows)
            return _Adjoined(u, lambda: by_context(u, needed))
    if isinstance(f, TracedMap):
        tensors = f.kept(tensors)
    aliases = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    begun = node_number()
    with torch.enable_grad(), without_autocast(z):
        z = z.detach().requires_grad_(by_hand is None)
        image = f(z, aliases)
    if isinstance(f, TracedMap):
        known = None if f.closes_over else (z, *aliases)
        check_again(z, image, begun, known, equation.found, equation.on_failure)

    def product(v: Tensor) -> Tensor:
        return vjp(image, z, v)

    with torch.no_grad(), without_autocast(z):
        u = equation.solve(by_hand or product, g.detach(), rough, rows)
    return _Adjoined(u, lambda: _gradients(image, aliases, needed, u, create_graph=False))


def _products(
    f: FlatMap, z: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool], u: Tensor
) -> list[Tensor | None]:
    """(∂f/∂θ)ᵀ u as a differentiable function of u, of the attached z and of the tensors."""
    with without_autocast(z):
        # Fresh aliases: the derivative is the partial one, through f's own use of each tensor
        # and not through z, which depends on the same tensors.
        aliases = [_alias(t) for t in tensors]
        return _gradients(f(z, aliases), aliases, needed, u, create_graph=True)


def _alias(t: Tensor) -> Tensor:
    """`t` as another node of its graph, if it has any; sparse tensors have no views."""
    if not t.requires_grad:
        return t
    return t.view_as(t) if t.layout == torch.strided else t.clone()


def _gradients(
    image: Tensor,
    aliases: Sequence[Tensor],
    needed: Sequence[bool],
    u: Tensor,
    create_graph: bool,
) -> list[Tensor | None]:
    wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need]
    if not wanted or not image.requires_grad:
        return [None] * len(needed)
    found = iter(
        torch.autograd.grad(image, wanted, u, create_graph=create_graph, allow_unused=True)
    )
    return [next(found) if need else None for need in needed]


class _Transposed:
    """(u; g, z, θ) ↦ (∂f/∂z)ᵀ u + g: the map whose fixed point is the adjoint."""

    def __init__(self, f: FlatMap) -> None:
        self.f = f

    def __call__(self, u: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        g, z, *rest = tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            at = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
            image = self.f(at, rest)
            return vjp(image, at, u, create_graph) + g
