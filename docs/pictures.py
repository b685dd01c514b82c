"""Makes the pictures of docs/: `make pictures`, or `python docs/pictures.py [NAME ...]`.

Every number in them is computed here, with fixed seeds. Errors are medians over the eight reference
systems of `sherrington_kirkpatrick(12, beta, 0.3, seed)`, seeds 0 to 7, against enumeration. All
quantities are dimensionless.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from deep_implicit_attention.boltzmann import BoltzmannMachine
from deep_implicit_attention.deq import fixed_point
from deep_implicit_attention.plots import Panel, curves, image_rows
from deep_implicit_attention.recipes import Boltzmann
from deep_implicit_attention.recipes._boltzmann import KNOWN, digit_halves, neighbours
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    Exact,
    ExpectationPropagation,
    GaussianPrior,
    GibbsSampler,
    IsingPrior,
    NaiveMeanField,
    PottsPrior,
    Response,
    SelfAveragingTAP,
    SphericalPrior,
    SpinSystem,
    ferromagnet,
    lattice,
    sherrington_kirkpatrick,
    split_r_hat,
)

sys.path.insert(0, str(Path(__file__).parent))  # where it is not run as a script
import trained_pictures

FOLDER = Path(__file__).parent / "pictures"
BETA = "inverse temperature β"
ISING = IsingPrior()


def sk(n: int, beta: float, field: float, seed: int) -> tuple[SpinSystem, Tensor]:
    couplings, x = sherrington_kirkpatrick(n, beta, field, seed)
    return SpinSystem(couplings, ISING), x


def apart(matrix: Tensor) -> Tensor:
    """The elements off the diagonal."""
    return matrix.detach()[~torch.eye(len(matrix), dtype=torch.bool)]


def mean_error(answer: Tensor, exact: Tensor) -> float:
    return (answer - exact).abs().mean().item()


def medians(errors: Callable[[float, int], dict[str, float]], betas: list[float]) -> dict:
    """The median over seeds 0 to 7 of each named error, against betas; a gap where one failed."""
    found = [[errors(beta, seed) for seed in range(8)] for beta in betas]
    return {
        name: (betas, [np.median([one[name] for one in at]) for at in found])
        for name in found[0][0]
    }


def quietly(method: Callable, system: SpinSystem, x: Tensor) -> Response | None:
    """The response, or None where the method did not converge."""
    method.on_failure = "ignore"  # type: ignore
    response = method(system, x)
    return response if bool(response.solution.converged.all()) else None


# --- one picture each -----------------------------------------------------------------------


def overview() -> Figure:
    """Errors of m, C and log Z against beta."""
    methods = {
        "naive mean field": NaiveMeanField(),
        "TAP": TAP(),
        "adaptive TAP, expectation propagation": AdaptiveTAP(),
        "self-averaging TAP": SelfAveragingTAP(),
    }

    def errors(beta: float, seed: int) -> dict[str, tuple[float, float, float]]:
        system, x = sk(12, beta, 0.3, seed)
        exact, found = Exact()(system, x), {}
        for name, method in methods.items():
            r = quietly(method, system, x)
            found[name] = (np.nan,) * 3 if r is None else (
                mean_error(r.magnetization, exact.magnetization),
                mean_error(apart(r.covariance), apart(exact.covariance)),
                mean_error(r.log_partition, exact.log_partition),
            )  # fmt: skip
        return found

    betas = [0.125, 0.25, 0.5, 0.75, 1.0]
    found = [[errors(beta, seed) for seed in range(8)] for beta in betas]
    what = ("m", "C, i ≠ j", "log Z")
    return curves(
        *(
            Panel(
                BETA,
                f"median |error| of {what[k]}",
                {
                    n: (betas, [np.median([one[n][k] for one in at]) for at in found])
                    for n in methods
                },
                xscale="log",
                yscale="log",
            )
            for k in range(3)
        )
    )


def priors() -> Figure:
    """Mean and variance of a single spin along the field that acts on it."""
    h = torch.linspace(0, 6, 121, dtype=torch.float64)
    along = torch.stack([h, 0 * h, 0 * h], dim=-1)
    one = torch.ones(1, 1, dtype=torch.float64)
    sphere, potts, gauss = SphericalPrior(3, 3**0.5), PottsPrior(3), GaussianPrior(0 * one[0], one)
    with torch.no_grad():
        mean = {
            "Ising": ISING.mean(h),
            "Gaussian, μ = 0, Σ = 1": gauss.mean(h[:, None])[:, 0],
            "Potts, q = 3": potts.mean(along)[:, 0],
            "sphere, d = 3, R = √3": sphere.mean(along)[:, 0],
        }
        variance = {
            "Ising": ISING.covariance(h),
            "Gaussian, μ = 0, Σ = 1": gauss.covariance(h[:, None])[:, 0, 0],
            "Potts, q = 3": potts.covariance(along)[:, 0, 0],
            "sphere, d = 3, R = √3": sphere.covariance(along)[:, 0, 0],
        }
    panels = [
        Panel("field h along the first component", f"{what} of that component",
              {name: (h, y) for name, y in values.items()})
        for what, values in (("mean", mean), ("variance", variance))
    ]  # fmt: skip
    figure = curves(*panels)
    figure.axes[0].set_ylim(-0.05, 2.05)  # the Gaussian goes on for ever
    return figure


def naive() -> Figure:
    """A lattice of 4 x 4 spins in a small field."""
    betas = np.linspace(0.02, 0.6, 30)
    x = torch.full((16,), 0.02, dtype=torch.float64)
    methods = {"naive mean field": NaiveMeanField(), "adaptive TAP": AdaptiveTAP()}
    m: dict[str, list[float]] = {name: [] for name in ("exact", *methods)}
    gap: dict[str, list[float]] = {name: [] for name in methods}
    for beta in betas:
        system = SpinSystem(lattice((4, 4), float(beta)), ISING)
        exact = Exact()(system, x)
        m["exact"].append(exact.magnetization.mean().item())
        for name, method in methods.items():
            r = quietly(method, system, x)
            m[name].append(np.nan if r is None else r.magnetization.mean().item())
            short = np.nan if r is None else (exact.log_partition - r.log_partition).item() / 16
            gap[name].append(short)
    return curves(
        Panel("coupling β of neighbours", "mean magnetization",
              {name: (betas, y) for name, y in m.items()}),
        Panel("coupling β of neighbours", "(exact log Z − log Z of the method) / N",
              {name: (betas, y) for name, y in gap.items()}),
    )  # fmt: skip


def tap() -> Figure:
    """How errors scale with the strength of the couplings."""
    strengths = np.array([0.0125, 0.025, 0.05, 0.1, 0.2, 0.4])
    rng = np.random.default_rng(1)
    A = torch.from_numpy(rng.normal(size=(5, 5, 3, 3)))
    potts = (A + A.permute(1, 0, 3, 2)) / 2**0.5
    potts[range(5), range(5)] = 0
    potts_x = torch.from_numpy(0.5 * rng.normal(size=(5, 3)))
    sk_couplings, sk_x = sherrington_kirkpatrick(10, 10**0.5, 0.5, 0)
    panels = []
    for title, prior, couplings, x in (
        ("Ising, N = 10", ISING, sk_couplings, sk_x),
        ("Potts, N = 5, q = 3", PottsPrior(3), potts, potts_x),
    ):
        found: dict[str, list[float]] = {"naive mean field": [], "TAP": []}
        if prior is not ISING:
            found["TAP without V in the mean"] = []
        for strength in strengths:
            system = SpinSystem(strength * couplings, prior)
            answers = [NaiveMeanField(tol=1e-13)(system, x), TAP(tol=1e-13)(system, x)]
            means = [answer.magnetization for answer in answers]
            if prior is not ISING:
                means.append(without_V(system, x))
            exact = Exact()(system, x).magnetization
            for errors, answer in zip(found.values(), means, strict=True):
                errors.append(mean_error(answer, exact))
        lines = {name: (strengths, y) for name, y in found.items()}
        for k, first in ((2, found["naive mean field"][0]), (3, found["TAP"][0])):
            lines[f"slope {k}"] = strengths, 0.6 * first * (strengths / strengths[0]) ** k
        panels.append(
            Panel("standard deviation of the couplings", "mean |error| of m",
                  lines, title=title, xscale="log", yscale="log")
        )  # fmt: skip
    return curves(*panels, reference=("slope 2", "slope 3"))


def without_V(system: SpinSystem, x: Tensor) -> Tensor:
    """Onsager's term in the field, but not V in the mean of the single spin."""

    def step(m: Tensor) -> Tensor:
        V = system.reaction(system.prior.covariance(x + system.pull(m)))
        return system.prior.mean(x + system.pull(m) - (V @ m.unsqueeze(-1)).squeeze(-1))

    return fixed_point(step, system.prior.mean(x)[None], tol=1e-13, max_iter=200).value[0]


def adaptive_tap() -> Figure:
    """Covariances by linear response, in one system and on average."""
    system, x = sk(12, 0.75, 0.3, 1)
    exact, adaptive = Exact()(system, x), AdaptiveTAP()(system, x)
    truth = apart(exact.covariance)
    chi, total = "adaptive TAP, χ at fixed V", "adaptive TAP, ∂m/∂x"
    ends = [truth.min().item(), truth.max().item()]
    naive_chi = NaiveMeanField()(system, x).covariance
    scatter = {
        "naive mean field": (truth, apart(naive_chi)),
        chi: (truth, apart(adaptive.covariance)),
        total: (truth, apart(adaptive.susceptibility)),
    }

    def errors(beta: float, seed: int) -> dict[str, float]:
        system, x = sk(12, beta, 0.3, seed)
        truth = apart(Exact()(system, x).covariance)
        r = AdaptiveTAP()(system, x)
        answers = {
            "naive mean field": NaiveMeanField()(system, x).covariance,
            chi: r.covariance,
            total: r.susceptibility,
            "TAP, ∂m/∂x": TAP()(system, x).covariance,
        }
        return {name: mean_error(apart(answer), truth) for name, answer in answers.items()}

    return curves(
        Panel("exact covariance, i ≠ j", "by the method", {"exact": (ends, ends)}, scatter,
              title="N = 12, β = 0.75"),
        Panel(BETA, "median |error| of C, i ≠ j", medians(errors, [0.125, 0.25, 0.5, 0.75, 1.0]),
              title="medians of 8 systems", xscale="log", yscale="log"),
    )  # fmt: skip


def self_averaging_tap() -> Figure:
    """The variances of the cavity fields as systems grow."""
    sizes, beta = [25, 50, 100, 200, 400, 800], 0.7
    each, ours, limit, gap, uneven = [], [], [], [], []
    for n in sizes:
        system, x = sk(n, beta, 0.3, 0)
        adaptive, one = AdaptiveTAP()(system, x), SelfAveragingTAP()(system, x)
        each.append(adaptive.cavity_variance[:25])
        ours.append(one.cavity_variance[0].item())
        limit.append(beta**2 * (1 - one.magnetization.square().mean().item()))
        gap.append(mean_error(one.magnetization, adaptive.magnetization))
        scale = torch.where(torch.arange(n) % 2 == 0, 1.2, 0.4).double()
        system = SpinSystem(scale[:, None] * system.couplings * scale, ISING)
        adaptive, one = AdaptiveTAP()(system, x), SelfAveragingTAP()(system, x)
        uneven.append(mean_error(one.magnetization, adaptive.magnetization))
    places = np.concatenate([[n] * len(v) for n, v in zip(sizes, each, strict=True)])
    return curves(
        Panel("number of spins N", "variance V of the cavity field",
              {"self-averaging TAP": (sizes, ours), "β²(1 − q)": (sizes, limit)},
              {"adaptive TAP, 25 sites": (places, np.concatenate(each))},
              title="SK, β = 0.7", xscale="log"),
        Panel("number of spins N", "mean |difference| of m from adaptive TAP",
              {"self-averaging TAP": (sizes, gap), "the same, uneven couplings": (sizes, uneven)},
              xscale="log", yscale="log"),
        reference=("β²(1 − q)",),
    )  # fmt: skip


def expectation_propagation() -> Figure:
    """Residuals on a system where parallel updates run in a cycle, and a longer descent."""

    def solve(seed: int, schedule: Any) -> Response:
        system, x = sk(16, 1.5, 0.1, seed)
        method = ExpectationPropagation(schedule=schedule, max_iter=300, on_failure="ignore")
        return method(system, x)

    traces = {}
    for schedule in ("parallel", "sequential", "double loop"):
        solution = solve(16, schedule).solution
        assert solution is not None
        traces[schedule] = np.arange(1, len(solution.trace) + 1), solution.trace[:, 0]
    response = solve(27, "double loop")
    assert response.objective is not None
    # The end is known to rounding only.
    above = (response.objective + response.log_partition).clamp(min=1e-14)
    return curves(
        Panel("step", "relative residual", traces, xscale="log", yscale="log",
              title="SK, N = 16, β = 1.5: residuals"),
        Panel("outer step", "free energy F above its end (nats)",
              {"double loop": (np.arange(1, len(above) + 1), above)}, yscale="log",
              title="the double loop on another such system"),
    )  # fmt: skip


def exact() -> Figure:
    """Two chains whose correlations are known."""
    n, distance, fine = 14, np.arange(8), np.linspace(0, 7, 141)
    ising: dict[str, dict] = {"lines": {}, "points": {}}
    for beta in (0.3, 0.6, 0.9):
        t, name = np.tanh(beta), f"β = {beta:g}"
        r = Exact()(SpinSystem(lattice((n,), beta), ISING), torch.zeros(n).double())
        ising["points"][name] = distance, r.covariance[0, :8]
        ising["lines"][name] = fine, (t**fine + t ** (n - fine)) / (1 + t**n)
    one = torch.ones(1, 1, dtype=torch.float64)
    gauss: dict[str, dict] = {"lines": {}, "points": {}}
    for beta in (0.3, 0.4, 0.48):
        name = f"J = {beta:g}"
        system = SpinSystem(lattice((n,), beta)[..., None, None], GaussianPrior(0 * one[0], one))
        with torch.no_grad():
            r = Exact()(system, torch.zeros(n, 1).double())
        rate = np.arccosh(1 / (2 * beta))
        height = 1 / (2 * beta * np.sinh(rate) * np.sinh(n * rate / 2))
        gauss["points"][name] = distance, r.covariance[0, 0, :8, 0]
        gauss["lines"][name] = fine, height * np.cosh(rate * (n / 2 - fine))
    return curves(
        Panel("distance r along a ring of 14 spins", "covariance of spins 0 and r",
              title="Ising spins, enumerated", yscale="log", **ising),
        Panel("distance r along a ring of 14 spins", "covariance of spins 0 and r",
              title="Gaussian spins, Σ = 1, one linear solve", yscale="log", **gauss),
    )  # fmt: skip


def gibbs() -> Figure:
    """Chains on a ferromagnet, with and without a ladder of temperatures."""
    n, beta = 100, 1.5
    system, x = SpinSystem(ferromagnet(n, beta), ISING), torch.zeros(n, dtype=torch.float64)
    panels = []
    histograms = {}
    for title, temperatures in (("without tempering", 1), ("with 10 temperatures", 10)):
        sampler = GibbsSampler(
            num_samples=200, burn_in=100, num_chains=3, num_temperatures=temperatures, seed=0
        )
        mean = sampler.sample(system, x).mean(dim=-1)
        r_hat = split_r_hat(mean).item()
        lines = {f"chain {c + 1}": (np.arange(200), mean[:, c]) for c in range(3)}
        panels.append(
            Panel("sweep", "mean magnetization of the state", lines,
                  title=f"{title}: R̂ = {r_hat:.2f}")
        )  # fmt: skip
        many = GibbsSampler(num_samples=5000, num_chains=3, num_temperatures=temperatures)
        totals = (
            many.sample(system, x).sum(dim=-1).flatten().long().add(n).div(2, rounding_mode="floor")
        )
        histograms[title] = torch.bincount(totals, minlength=n + 1) / len(totals)
    up = torch.arange(n + 1, dtype=torch.float64)
    states = torch.lgamma(torch.tensor(n + 1.0)) - torch.lgamma(up + 1) - torch.lgamma(n - up + 1)
    p = (states + beta / (2 * n) * (2 * up - n) ** 2).softmax(dim=0)
    m = 2 * up / n - 1
    panels.append(
        Panel("mean magnetization of the state", "probability", {"exact": (m, p)},
              {name: (m, y) for name, y in histograms.items()}, title="15,000 draws")
    )  # fmt: skip
    return curves(*panels)


def boltzmann() -> Figure:
    """Lower halves of held-out digits by several methods, and digits that a machine draws."""
    recipe = Boltzmann()
    data = digit_halves(recipe)
    shown = slice(0, 12)
    rows = {"image": data.test[shown], "given": np.where(KNOWN, data.test[shown], np.nan)}
    rows["nearest image"] = neighbours(data.both, data.test[shown], 1)
    machine = BoltzmannMachine()
    for name, l2 in (
        ("independent", 0.0),
        ("tap", 0.001),
        ("pseudolikelihood", 0.1),
        ("pcd", 0.001),
    ):
        machine = BoltzmannMachine(
            name,
            l2=l2,
            num_hidden=recipe.num_hidden if name == "pcd" else 0,  # type: ignore[arg-type]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pixels at the edge never change
            machine.fit(data.both)
            rows[name] = machine.complete(data.test[shown], KNOWN).X
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # chains of different digits
        rows["drawn by pcd"] = machine.sample(12)
    return image_rows({name: flat.reshape(-1, 8, 8) for name, flat in rows.items()})


PICTURES: dict[str, Callable[[], Figure]] = {
    "overview": overview,
    "priors": priors,
    "naive": naive,
    "tap": tap,
    "adaptive-tap": adaptive_tap,
    "self-averaging-tap": self_averaging_tap,
    "expectation-propagation": expectation_propagation,
    "exact": exact,
    "gibbs": gibbs,
    "boltzmann": boltzmann,
    **trained_pictures.PICTURES,
}


def main(names: list[str], folder: Path = FOLDER) -> None:
    """Make the pictures named, or all."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or PICTURES:
        drawn = io.BytesIO()
        PICTURES[name]().savefig(drawn, dpi=100)
        # A palette is enough for lines, and makes a third of the bytes.
        palette = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
        palette.save(folder / f"{name}.png", optimize=True)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
