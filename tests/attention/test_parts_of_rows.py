"""Networks with many hidden units are computed in parts of rows, to the same values."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deep_implicit_attention.attention import _products
from deep_implicit_attention.attention._parts import FeedForwardVJP, Weights, feed_forward


@pytest.fixture(autouse=True)
def slim(monkeypatch):
    """As on a processor without AVX-512."""
    monkeypatch.setattr(_products, "_WIDE", False)


@pytest.fixture
def sizes(monkeypatch):
    """Rows of each product with weights."""
    seen = []
    plain = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        seen.append(x.numel() // x.shape[-1])
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    return seen


def network(dim, width, dtype=torch.float32):
    w_in, w_out = torch.randn(width, dim) / dim**0.5, torch.randn(dim, width) / width**0.5
    weights = Weights(w_in, torch.randn(width), w_out, torch.randn(dim))
    return Weights(*(t.to(dtype) for t in weights[:4]))


def by_hand(x, weights):
    w_in, b_in, w_out, b_out = (t.double() for t in weights[:4])
    return F.gelu(x.double() @ w_in.T + b_in) @ w_out.T + b_out


@pytest.mark.parametrize(
    ("shape", "width", "dtype", "parts"),
    [
        ((16, 256, 64), 256, torch.float32, 4),
        ((3, 1377, 48), 256, torch.float32, 5),  # the last part is a smaller one
        ((32, 64, 64), 256, torch.float64, 4),
        ((512, 128, 16), 64, torch.float32, 1),  # too narrow
        ((15, 256, 64), 256, torch.float32, 1),  # too few to be worth it
        ((16, 128, 32), 2048, torch.float32, 1),  # as many hidden units, of too few rows a part
    ],
)
def test_value_and_derivative_are_those_of_the_network(shape, width, dtype, parts, sizes):
    torch.manual_seed(0)
    x, weights = torch.randn(shape, dtype=dtype), network(shape[-1], width, dtype)
    across = x.transpose(0, 1).contiguous().transpose(0, 1)
    digits = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    with torch.no_grad():
        pullback, v = FeedForwardVJP(x, weights), torch.randn_like(x)
        sizes.clear()
        found = feed_forward(x, weights)
        assert len(sizes) == 2 * parts
        assert sum(sizes) == 2 * shape[0] * shape[1]
        assert found.shape == x.shape
        torch.testing.assert_close(found.double(), by_hand(x, weights), **digits)
        torch.testing.assert_close(feed_forward(across, weights), found, **digits)
        sizes.clear()
        pulled = pullback(v)
        assert len(sizes) == 2 * parts
    at = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(by_hand(at, weights), at, v.double())
    torch.testing.assert_close(pulled.double(), expected, **digits)


def test_whole_where_somebody_watches_or_wants_a_gradient(sizes):
    torch.manual_seed(0)
    x, weights = torch.randn(16, 256, 64), network(64, 256)
    with torch.no_grad(), FlopCounterMode(display=False):
        feed_forward(x, weights)
    assert len(sizes) == 2
    sizes.clear()
    feed_forward(x.requires_grad_(), weights).sum().backward()
    assert len(sizes) == 2
    assert x.grad is not None
