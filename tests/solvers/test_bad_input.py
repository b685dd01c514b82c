"""Bad arguments raise at the door, and the message names the argument."""

import pytest
import torch

from deep_implicit_attention.solvers import anderson, broyden, gmres, newton_krylov, picard

START = torch.ones(2, 3)


def half(z):
    return 0.5 * z


@pytest.fixture(params=[picard, anderson, broyden, newton_krylov, gmres], ids=lambda s: s.__name__)
def any_solver(request):
    return request.param


BAD_SHARED = [
    ({"tol": -1e-4}, ValueError, "tol must be at least 0, got -0.0001"),
    ({"tol": float("nan")}, ValueError, "tol"),
    ({"tol": float("inf")}, ValueError, "tol"),
    ({"tol": "tight"}, TypeError, "tol must be a number, got str"),
    ({"tol": None}, TypeError, "tol"),
    ({"tol": True}, TypeError, "tol"),
    ({"tol": torch.tensor([1e-4, 1e-4])}, TypeError, "tol"),
    ({"max_iter": 0}, ValueError, "max_iter must be at least 1, got 0"),
    ({"max_iter": -5}, ValueError, "max_iter"),
    ({"max_iter": 10.0}, TypeError, "max_iter must be an integer, got float"),
    ({"max_iter": True}, TypeError, "max_iter"),
    ({"max_iter": None}, TypeError, "max_iter"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_SHARED)
def test_shared_options(any_solver, options, error, message):
    with pytest.raises(error, match=message):
        any_solver(half, START, **options)


@pytest.mark.parametrize("stop_mode", ["relative", "", None, 1, "REL"])
def test_stop_mode(solver, stop_mode):
    with pytest.raises(ValueError, match=r"stop_mode must be one of \('rel', 'abs'\), got"):
        solver(half, START, stop_mode=stop_mode)


@pytest.mark.parametrize(
    ("own", "options", "error", "message"),
    [
        (picard, {"damping": -0.1}, ValueError, "damping must be at least 0 and below 1, got -0.1"),
        (picard, {"damping": 1.0}, ValueError, "damping"),
        (picard, {"damping": "0.5"}, TypeError, "damping must be a number"),
        (anderson, {"damping": 1.5}, ValueError, "damping"),
        (anderson, {"m": 0}, ValueError, "m must be at least 1"),
        (anderson, {"m": 2.5}, TypeError, "m must be an integer"),
        (anderson, {"ridge": -1e-3}, ValueError, "ridge"),
        (anderson, {"ridge": None}, TypeError, "ridge"),
        (broyden, {"memory": 0}, ValueError, "memory"),
        (broyden, {"memory": "all"}, TypeError, "memory"),
        (newton_krylov, {"inner_tol": 1.0}, ValueError, "inner_tol"),
        (newton_krylov, {"inner_tol": -1.0}, ValueError, "inner_tol"),
        (newton_krylov, {"inner_max_iter": 0}, ValueError, "inner_max_iter"),
        (newton_krylov, {"jvp": 3}, TypeError, "jvp must be callable or None, got int"),
        (gmres, {"restart": 0}, ValueError, "restart"),
        (gmres, {"restart": 2.0}, TypeError, "restart"),
    ],
)
def test_own_options(own, options, error, message):
    with pytest.raises(error, match=message):
        own(half, START, **options)


@pytest.mark.parametrize("option", ["beta", "tolerance", "maxiter"])
def test_unknown_keyword(any_solver, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        any_solver(half, START, **{option: 1})


def test_options_are_keyword_only(any_solver):
    with pytest.raises(TypeError, match="positional"):
        any_solver(half, START, 1e-4)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (torch.ones(3), ValueError, r"must have shape \(batch, n\), got \(3,\)"),
        (torch.ones(2, 3, 4), ValueError, r"must have shape \(batch, n\), got \(2, 3, 4\)"),
        (torch.tensor(1.0), ValueError, "must have shape"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "float32 or float64, got torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.ones(2, 3, dtype=torch.float16), TypeError, "got torch.float16"),
        (torch.ones(2, 3, dtype=torch.bfloat16), TypeError, "got torch.bfloat16"),
        (torch.ones(2, 3, dtype=torch.bool), TypeError, "got torch.bool"),
        ([[1.0, 2.0]], TypeError, "must be a tensor, got list"),
    ],
)
def test_start(any_solver, start, error, message):
    name = "b" if any_solver is gmres else "z0"
    with pytest.raises(error, match=f"^{name} .*{message}"):
        any_solver(half, start)


@pytest.mark.parametrize("not_callable", [None, torch.ones(2, 3)])
def test_map_that_cannot_be_called(any_solver, not_callable):
    with pytest.raises(TypeError, match="callable"):
        any_solver(not_callable, START)


@pytest.mark.parametrize(
    ("returns", "error"),
    [
        (lambda z: z[:, :2], ValueError),
        (lambda z: z[:1], ValueError),
        (lambda z: z.sum(dim=1, keepdim=True), ValueError),  # would broadcast
        (lambda z: z.sum(), ValueError),
        (lambda z: z.double(), ValueError),
        (lambda z: z.bfloat16(), ValueError),
        (lambda z: (z, z), TypeError),
        (lambda z: None, TypeError),
    ],
)
def test_what_the_map_returns(any_solver, returns, error):
    name = "matvec" if any_solver is gmres else "the map"
    with pytest.raises(error, match=f"^{name} must"):
        any_solver(returns, START)


@pytest.mark.parametrize("returns", [lambda v: v[:, :1], lambda v: v.sum(), lambda v: v.double()])
def test_what_the_jvp_returns(returns):
    with pytest.raises(ValueError, match=r"^jvp must"):
        newton_krylov(half, START, jvp=lambda z, v: returns(v))


def test_shape_is_named_in_the_message(any_solver):
    with pytest.raises(ValueError, match=r"\(2, 3\).*returned \(2, 2\)"):
        any_solver(lambda z: z[:, :2], START)


def test_error_inside_the_map_comes_through(any_solver):
    def broken(z):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        any_solver(broken, START)


@pytest.mark.parametrize("method", [picard, anderson])
def test_a_map_that_writes_where_it_wrote_before(method):
    """Its first result is the next state; overwritten, it would have residual 0."""
    memory = torch.empty_like(START)
    with pytest.raises(RuntimeError, match="nor write to a tensor that an earlier result is"):
        method(lambda z: torch.add(half(z), 1, out=memory), START)


def test_a_map_that_writes_to_its_state(solver):
    with pytest.raises(RuntimeError, match="must not change its state in place"):
        solver(lambda z: z.mul_(0.5).add_(1), START)
