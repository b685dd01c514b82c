# %% [markdown]
# # Mean-field methods side by side
#
# A Sherrington–Kirkpatrick system: Ising spins, all coupled to all by Gaussian couplings of
# variance β²/N, in random fields. Few enough spins that the exact answer can be enumerated.
# Cells are marked by `# %%`, so the file is a notebook for editors that know them, and a script.

# %%
import warnings
from pathlib import Path

import torch

from deep_implicit_attention.plots import against_exact, approximation_errors
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    Exact,
    ExpectationPropagation,
    GibbsSampler,
    IsingPrior,
    NaiveMeanField,
    SelfAveragingTAP,
    SpinSystem,
    sherrington_kirkpatrick,
)

SPINS, FIELD, SEED = 14, 0.3, 0
METHODS = {
    "naive mean field": NaiveMeanField(on_failure="ignore"),
    "TAP": TAP(on_failure="ignore"),
    "adaptive TAP": AdaptiveTAP(on_failure="ignore"),
    "self-averaging TAP": SelfAveragingTAP(on_failure="ignore"),
    "expectation propagation": ExpectationPropagation(on_failure="ignore"),
}

# %% [markdown]
# ## One temperature
#
# Every method answers in the same form: magnetizations, covariances, log Z, and the evidence.


# %%
def system(beta, spins=SPINS):
    """Couplings at inverse temperature `beta`, and fields."""
    couplings, fields = sherrington_kirkpatrick(spins, beta, FIELD, SEED)
    return SpinSystem(couplings, IsingPrior()), fields


def apart(covariance):
    """C_ij for i < j."""
    rows, columns = torch.triu_indices(*covariance.shape, offset=1)
    return covariance.detach()[rows, columns]


def compare(beta, spins=SPINS):
    """The exact response, and those of the methods that converge, by name."""
    at, fields = system(beta, spins)
    answers = {name: method(at, fields) for name, method in METHODS.items()}
    good = {name: r for name, r in answers.items() if bool(r.solution.converged.all())}
    return Exact()(at, fields), good


def table(beta, spins=SPINS):
    """Prints the errors of every method; returns those of the magnetizations."""
    exact, answers = compare(beta, spins)
    errors = {}
    print(f"beta {beta:g}: mean |error| of m, of C, and |error| of log Z")
    for name in METHODS:
        if name not in answers:
            print(f"  {name:24} did not converge")
            continue
        r = answers[name]
        errors[name] = (r.magnetization - exact.magnetization).abs().mean().item()
        c = (apart(r.covariance) - apart(exact.covariance)).abs().mean().item()
        log_z = (r.log_partition - exact.log_partition).abs().item()
        print(f"  {name:24} {errors[name]:.1e}  {c:.1e}  {log_z:.1e}")
    return errors


# %% [markdown]
# ## Against temperature
#
# Weak couplings (small β) are easy for all; then the naive mean field goes first.


# %%
def picture(betas, shown, spins=SPINS):
    """Magnetizations and covariances at `shown`, errors against β."""
    errors = {name: [] for name in METHODS}
    for beta in betas:
        exact, answers = compare(beta, spins)
        for name, column in errors.items():
            m = answers[name].magnetization if name in answers else exact.magnetization * torch.nan
            column.append((m - exact.magnetization).abs().mean().item())
    exact, answers = compare(shown, spins)
    return approximation_errors(
        exact.magnetization.numpy(),
        {name: r.magnetization.numpy() for name, r in answers.items()},
        apart(exact.covariance).numpy(),
        {name: apart(r.covariance).numpy() for name, r in answers.items()},
        betas, errors, beta=shown, title=f"Sherrington–Kirkpatrick, {spins} spins",
    )  # fmt: skip


# %% [markdown]
# ## Sampling
#
# Right up to standard errors, which it reports; for systems that cannot be enumerated.


# %%
def sampled(beta, spins=SPINS, draws=400):
    """Magnetizations by Gibbs sampling, with bars, beside those of adaptive TAP."""
    at, fields = system(beta, spins)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few draws, so that the bars can be seen
        gibbs = GibbsSampler(num_samples=draws, seed=SEED)(at, fields)
    exact, answers = compare(beta, spins)
    estimates = {"Gibbs sampling": gibbs.magnetization}
    if "adaptive TAP" in answers:
        estimates["adaptive TAP"] = answers["adaptive TAP"].magnetization
    bars = {"Gibbs sampling": gibbs.sampling.standard_error}
    return against_exact(exact.magnetization, estimates, bars)


# %%
if __name__ == "__main__":
    for beta in (0.25, 0.75, 1.5):
        table(beta)
    out = Path("runs/sherrington-kirkpatrick")
    out.mkdir(parents=True, exist_ok=True)
    picture((0.125, 0.25, 0.5, 0.75, 1.0, 1.5), 0.75).savefig(out / "methods.png", dpi=130)
    sampled(0.75).savefig(out / "sampled.png", dpi=130)
    print(f"figures are in {out}/")
