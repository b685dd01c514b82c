# %% [markdown]
# # Completing digits with a Boltzmann machine
#
# Learn couplings and fields of ±1 spins from binarised 8×8 digits, then show a machine upper halves
# and let it say what is below: each lower pixel's probability given the upper ones.
# Cells are marked by `# %%`.

# %%
import warnings
from pathlib import Path

import numpy as np

from deep_implicit_attention.boltzmann import BoltzmannMachine
from deep_implicit_attention.plots import image_rows
from deep_implicit_attention.training import digits

SIDE = 8
UPPER = np.arange(SIDE * SIDE) < SIDE * SIDE // 2

# %% [markdown]
# ## Data
#
# A pixel is white from the middle grey on.


# %%
def load(seed=0):
    """Images `(n, 64)` of ±1: to learn from, and to test."""
    data = digits(validation=0.1, seed=seed)
    every = [split.images.flatten(1).numpy() for split in (data.train, data.validation, data.test)]
    middle = 0.5 * (data.background + every[0].max()) - 1e-4
    train, validation, test = (np.where(part >= middle, 1, -1) for part in every)
    return np.concatenate([train, validation]), test


# %% [markdown]
# ## Learning and completing
#
# TAP's response learns in closed form; `l2` keeps strong couplings in check.


# %%
def learn(images, method="tap", l2=0.001):
    """A machine with the moments of `images`, by the response of a mean-field method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pixels at the edge never change
        return BoltzmannMachine(method, l2=l2).fit(images)


def complete(machine, images):
    """Images whose lower halves are the likelier value of each pixel, and its probability of +1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return machine.complete(images, UPPER)


def wrong(completed, images):
    """Part of the lower pixels that are wrong."""
    return float((completed[:, ~UPPER] != images[:, ~UPPER]).mean())


# %%
if __name__ == "__main__":
    train, test = load()
    shown = test[:12]
    rows = {"image": shown, "given": np.where(UPPER, shown, np.nan)}
    for method, l2 in (("independent", 0.0), ("tap", 0.001)):
        machine = learn(train, method, l2)
        every = complete(machine, test)
        print(f"{method}: {wrong(every.X, test):.1%} of the lower pixels wrong")
        rows[method] = every.X[:12]
    rows["probability (tap)"] = 2 * every.probability[:12] - 1
    figure = image_rows({name: flat.reshape(-1, SIDE, SIDE) for name, flat in rows.items()})
    out = Path("runs/completion")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "completion.png", dpi=130)
    print(f"the figure is in {out}/")
