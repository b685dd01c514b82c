"""The model without couplings."""

from __future__ import annotations

import torch

from ._moments import Moments
from ._parameters import Learned, pack


def independent(moments: Moments) -> Learned:
    """J = 0 and h_i = atanh m_i: the maximum likelihood of independent spins. Cost: O(N)."""
    m = moments.mean
    return Learned(pack(m.new_zeros(len(m), len(m)), torch.atanh(m)))
