"""Data at the door: ±1, {0, 1} or boolean, with gaps and weights, become tensors of spins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Coding = Literal["spins", "binary", "boolean"]

_CODES = {"spins": "{-1, 1}", "binary": "{0, 1}", "boolean": "{False, True}"}


@dataclass(frozen=True)
class Data:
    """Rows of spins.

    Attributes:
        spins: ±1, and 0 where an entry is missing, `(M, N)`, float64.
        observed: True where there is an entry, `(M, N)`; None if nothing is missing.
        weights: of the rows, `(M,)`; None if all are 1.
    """

    spins: Tensor
    observed: Tensor | None
    weights: Tensor | None

    def __len__(self) -> int:
        return len(self.spins)

    def __getitem__(self, rows: Tensor) -> Data:
        observed = None if self.observed is None else self.observed[rows]
        weights = None if self.weights is None else self.weights[rows]
        return Data(self.spins[rows], observed, weights)

    def columns(self, kept: Tensor) -> Data:
        """The columns where `kept` `(N,)` is True."""
        observed = None if self.observed is None else self.observed[:, kept]
        if observed is not None and bool(observed.all()):
            observed = None
        return Data(self.spins[:, kept], observed, self.weights)

    def weighed(self, spins: Tensor) -> Tensor:
        """`spins` `(M, ...)` times the weights of the rows."""
        return spins if self.weights is None else spins * self.weights[:, None]

    def total(self) -> float:
        """Sum of the weights."""
        return float(len(self)) if self.weights is None else self.weights.sum().item()

    def counted(self) -> int:
        """Number of rows that have a weight."""
        return len(self) if self.weights is None else int((self.weights > 0).sum())


class Completion(NamedTuple):
    """Rows with their missing entries filled in, and what that rests on.

    Attributes:
        X: the rows, in the coding of the data that were learned, `(M, N)`.
        probability: P(S_i = +1 | what is observed), `(M, N)`; 0 or 1 where an entry is observed.
    """

    X: np.ndarray
    probability: np.ndarray


def holds_booleans(X: Any) -> bool:
    """Whether X, as it was given, holds True and False, and missing entries among them.

    Those make numbers of booleans: a frame of nullable booleans, or of objects, or such an array.
    """
    if isinstance(X, np.ndarray):
        return X.dtype == bool or (X.dtype == object and _only_booleans(X))
    kinds = {getattr(dtype, "kind", None) for dtype in getattr(X, "dtypes", ())}
    if kinds == {"O"} or kinds == {"O", "b"}:
        return _only_booleans(X.to_numpy(dtype=object))
    return kinds == {"b"}


def _only_booleans(objects: np.ndarray) -> bool:
    some = False
    for value in objects.flat:
        if isinstance(value, bool | np.bool_):
            some = True
        # nan is the one number that differs from itself; pandas' NA does not like to be compared.
        elif not (value is None or type(value).__name__ == "NAType" or value != value):
            return False
    return some


def read_spins(
    X: np.ndarray, coding: Coding | None, boolean: bool = False
) -> tuple[Tensor, Tensor | None, Coding | None]:
    """Spins (0 where missing), the mask of what is observed, and the coding of an array `(M, N)`.

    `coding` is the one that was found before, or None; None is returned as long as all entries are
    1, which are spins up in every coding. `boolean` says that numbers stand for True and False.
    """
    boolean = boolean or X.dtype == bool
    if boolean and coding not in (None, "boolean"):
        raise ValueError(f"X is boolean, but the machine was fitted on {_CODES[coding]}")
    if X.dtype == bool:
        return torch.from_numpy(np.where(X, 1.0, -1.0)), None, "boolean"
    array = np.array(X, dtype=np.float64, order="C", copy=_copy(X))
    values = torch.from_numpy(array)
    observed = None
    if bool(values.sum().isnan()):
        observed = ~values.isnan()
        values = torch.where(observed, values, 1.0)
    low = values.min().item()
    found: Coding = "spins" if low < 0 else "binary"
    good = (values == 1) | (values == (-1 if found == "spins" else 0))
    if not bool(good.all()):
        row, column = (~good).nonzero()[0].tolist()
        other = "" if found == "binary" else f", among entries such as {low:g}"
        raise ValueError(
            f"X must hold spins, -1 and 1, or 0 and 1 (nan for missing entries): X[{row}, {column}]"
            f" is {values[row, column].item():g}{other}"
        )
    certain = low < 1
    if certain and coding is not None and (found == "spins") != (coding == "spins"):
        raise ValueError(f"X holds {_CODES[found]}, but the machine was fitted on {_CODES[coding]}")
    spins = values
    if found == "binary":
        # New memory costs more time than the arithmetic in it.
        own = values if not np.may_share_memory(array, X) else values.clone()
        spins = own.mul_(2).sub_(1)
    if observed is not None:
        spins = torch.where(observed, spins, 0.0)
    if boolean:
        return spins, observed, "boolean"
    return spins, observed, coding or (found if certain else None)


def _copy(X: np.ndarray) -> bool | None:
    """Whether the numbers must be copied, to memory that torch may share: None if not."""
    return None if X.flags.writeable else True


def read_weights(sample_weight: Any, rows: int) -> Tensor | None:
    """Weights of the rows `(rows,)`, or None."""
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.ndim == 0:
        weights = np.full(rows, weights)
    if weights.shape != (rows,):
        raise ValueError(f"sample_weight must have shape ({rows},), got {weights.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        total = weights.sum()  # infinite or nan if a weight is
    if not 0 < total < np.inf or weights.min() < 0:
        raise ValueError(
            "sample_weight must be finite, its sum too, not negative, and not all zero"
        )
    return torch.from_numpy(weights.copy())


def write_spins(spins: Tensor, coding: Coding) -> np.ndarray:
    """Spins in the coding of the data they were learned from."""
    up = (spins > 0).cpu().numpy()
    if coding == "boolean":
        return up
    return np.where(up, 1.0, -1.0 if coding == "spins" else 0.0)


def read_observed(observed: Any, X: np.ndarray) -> np.ndarray:
    """The mask `(M, N)` of known entries, none of which is missing."""
    missing = np.isnan(X) if X.dtype.kind == "f" else np.zeros(X.shape, dtype=bool)
    mask = np.asarray(observed)
    if mask.dtype != bool:
        raise TypeError(f"observed must be boolean, True where a spin is known, got {mask.dtype}")
    if mask.shape not in (X.shape, X.shape[1:]):
        raise ValueError(
            f"observed must have shape {X.shape} or {X.shape[1:]}, got {tuple(mask.shape)}"
        )
    mask = np.broadcast_to(mask, X.shape)
    wrong = np.argwhere(mask & missing)
    if len(wrong):
        raise ValueError(f"X[{wrong[0][0]}, {wrong[0][1]}] is nan, but observed says it is known")
    return mask
