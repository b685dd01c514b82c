"""Memory of matrices between all sites."""

import pytest
import torch

from deep_implicit_attention.attention import DEQMeanFieldAttention, _memory
from deep_implicit_attention.attention._memory import empty, release, same_bits
from deep_implicit_attention.deq import DEQFixedPoint


@pytest.mark.parametrize("size", [(3, 5), (3, 8)])  # not of 64 bits, and of 64 bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_bits(dtype, size):
    one = torch.randn(size, dtype=dtype)
    one[0, 0] = torch.nan
    assert same_bits(one, one.clone())
    assert same_bits(one.mT, one.mT.clone())
    assert not same_bits(one, one.double() if dtype != torch.float64 else one.float())
    assert not same_bits(one, one[:2])
    for value in (-one[2, 4], torch.nan):
        other = one.clone()
        other[2, 4] = value
        assert not same_bits(one, other)
    assert not same_bits(torch.zeros(2, dtype=dtype), -torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [10, 1200])
def test_memory_is_of_the_shape_and_kind_asked_for(dtype, size):
    like = torch.zeros(1, dtype=dtype)
    fresh = empty(size, size, like=like)
    assert fresh.shape == (size, size)
    assert fresh.dtype is dtype
    fresh.fill_(2.0)
    assert fresh.sum().item() == 2.0 * size**2


class TestMemory:
    """Large tensors use the memory of those that are gone, and only of those."""

    def test_it_is_used_again_once_nobody_needs_it(self):
        release()
        like = torch.zeros(1)
        first = empty(1200, 1200, like=like).fill_(1.0)
        place, part = first.data_ptr(), first[10:20].view(-1)
        del first
        other = empty(1200, 1200, like=like).fill_(2.0)
        assert other.data_ptr() != place
        assert part.sum().item() == 1200 * 10
        del part
        assert empty(1200, 1200, like=like).data_ptr() == place
        assert empty(1200, 1300, like=like).data_ptr() != place
        assert empty(600, 1200, like=like.double()).data_ptr() == place

    def test_what_is_kept_is_bounded_and_can_be_given_back(self):
        release()
        sizes = [(4096, 1024 * k) for k in range(1, 7)]  # 16 to 96 MB
        tensors = [empty(*size, like=torch.zeros(1)) for size in sizes]
        del tensors
        kept = [memory.size for same in _memory._kept.values() for memory in same]
        assert 0 < sum(kept) <= _memory._KEPT
        more = empty(70, 1 << 20, like=torch.zeros(1))  # more than is ever kept
        del more
        assert kept == [memory.size for same in _memory._kept.values() for memory in same]
        release()
        assert not _memory._kept

    def test_two_solves_before_a_gradient_do_not_share_memory(self):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQMeanFieldAttention(80, 16))  # couplings of 6.5 MB
        x = torch.randn(2, 80, 16) / 4
        weight = layer.fun._weight

        def gradients(*loss):
            return [torch.autograd.grad(each, weight)[0] for each in loss]

        expected = gradients(layer(x).sum()) + gradients(layer(2 * x).square().sum())
        together = gradients(layer(x).sum(), layer(2 * x).square().sum())
        for one, two in zip(expected, together, strict=True):
            torch.testing.assert_close(one, two)
