"""What a language model says after a prompt, with the states of earlier tokens kept or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.models import (
    DeepImplicitAttentionTransformer,
    _transformer,
    left_pad,
)
from deep_implicit_attention.models._decode import sample

from .conftest import build, tokens


@pytest.fixture
def seen_logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What `generate` samples from, token by token."""
    seen: list[Tensor] = []
    real = _transformer.sample

    def spy(logits: Tensor, *rest: Any) -> Tensor:
        seen.append(logits)
        return real(logits, *rest)

    monkeypatch.setattr(_transformer, "sample", spy)
    return seen


@pytest.mark.quick("*-rotary", "*-sinusoidal")
@pytest.mark.parametrize(
    ("attention", "positions"),
    [
        ("softmax", "learned"),
        ("softmax", "rotary"),
        ("softmax-plain", "sinusoidal"),
        ("vector-spin", "rotary"),
    ],
)
def test_cached_generation_is_generation_anew(
    attention: str, positions: str, seen_logits: list[Tensor]
) -> None:
    model = build(attention=attention, positions=positions)
    ids, mask = left_pad([[1, 2, 3], [4, 5, 6, 7, 8], [9]])
    draw = {"max_new_tokens": 9, "temperature": 0.7, "mask": mask}  # past max_seq_len = 10
    cached = model.generate(ids, generator=torch.Generator().manual_seed(0), **draw)
    first = list(seen_logits)
    seen_logits.clear()
    anew = model.generate(ids, generator=torch.Generator().manual_seed(0), cache=False, **draw)
    assert torch.equal(cached, anew)
    assert cached.shape == (3, 14)
    assert len(first) == len(seen_logits) == 9
    for a, b in zip(first, seen_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    # And both are what the model itself says of what was generated, cropped to its window.
    with torch.no_grad():
        for row, length in enumerate((3, 5, 1)):
            said = cached[row, -length - 9 :]
            for step, logits in list(enumerate(first))[::4]:
                alone = model(said[: length + step][-10:][None])[0, -1]
                torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-8)


def test_cached_generation_solves_one_site_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(max_seq_len=20)
    sizes: list[int] = []
    fun = model.blocks[1].fun
    real = type(fun).update

    def spy(self: Any, z: Tensor, context: Any) -> Tensor:
        sizes.append(z.shape[1])
        return real(self, z, context)

    monkeypatch.setattr(type(fun), "update", spy)
    model.generate(tokens(2, 6), 10)
    assert set(sizes) == {6, 1}
    start = sizes.index(1)
    assert set(sizes[start:]) == {1}


def test_generation_at_a_horizon_is_that_of_the_explicit_network(
    seen_logits: list[Tensor],
) -> None:
    model = build(steps=3)
    ids = model.generate(tokens(2, 4), 4, temperature=0)
    with torch.no_grad():
        torch.testing.assert_close(seen_logits[-1], model(ids[:, :-1])[:, -1])


def test_sampling() -> None:
    model = build(depth=1)
    model.tokens.weight.data.mul_(20)  # logits far enough apart
    ids = tokens(2, 4)
    draw = lambda seed, **options: model.generate(  # noqa: E731
        ids, 6, generator=torch.Generator().manual_seed(seed), **options
    )
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0, temperature=3.0), draw(1, temperature=3.0))
    greedy = draw(0, temperature=0)
    assert torch.equal(greedy, draw(1, temperature=0))
    assert torch.equal(greedy, draw(2, top_k=1))
    assert torch.equal(greedy[:, :4], ids)
    with torch.no_grad():
        torch.testing.assert_close(greedy[:, -1], model(greedy[:, :-1])[:, -1].argmax(dim=1))
    # Draws from the two likeliest, in the proportion that softmax at the temperature gives them.
    many = ids[:1].expand(4000, 4)
    drawn = model.generate(
        many, 1, temperature=2.0, top_k=2, generator=torch.Generator().manual_seed(0),
        solver_fwd_tol=1e-4,
    )[:, -1]  # fmt: skip
    with torch.no_grad():
        best = (model(ids[:1])[0, -1] / 2).topk(2)
    odds = best.values.softmax(0)
    assert set(drawn.tolist()) <= set(best.indices.tolist())
    assert (
        abs((drawn == best.indices[0]).double().mean() - odds[0]) < 4 * (odds.prod() / 4000) ** 0.5
    )


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("top_p", [0.3, 0.4, 0.41, 0.8, 0.95, 1.0])
def test_the_fewest_likeliest_that_sum_to_top_p(top_p: float, top_k: int | None) -> None:
    """In the proportion that softmax at the temperature gives them."""
    p = torch.tensor([0.15, 0.4, 0.1, 0.35])
    share, total = torch.zeros(4), 0.0
    likeliest = p.argsort(descending=True)[:top_k].tolist()
    for token in likeliest:
        if total < top_p:
            share[token] = p[token]
            total += p[token].item() / p[likeliest].sum().item()
    logits = (0.5 * p.log()).expand(4000, 4)
    drawn = sample(logits, 0.5, top_k, top_p, torch.Generator().manual_seed(0))
    often = drawn.flatten().bincount(minlength=4) / 4000
    assert torch.equal(often > 0, share > 0)
    torch.testing.assert_close(often, share / share.sum(), rtol=0, atol=4 * (0.25 / 4000) ** 0.5)


def test_a_text_ends_with_a_token_that_stops_it() -> None:
    """What others say does not depend on it, nor what they draw."""
    model, ids = build(depth=1), tokens(4, 3)

    def say(**options: Any) -> Tensor:
        return model.generate(ids, 12, generator=torch.Generator().manual_seed(0), **options)

    whole = say()
    first = whole[:, 3:]
    stop = [first[0, 2].item(), first[1, 4].item()]
    assert all(any(token in row for token in stop) for row in first.tolist())
    for cache in (True, False):
        ended = say(stop=stop, cache=cache)
        expected, lengths = first.clone(), []
        for row in expected:
            at = int(torch.isin(row, torch.tensor(stop)).nonzero()[0])
            row[at:] = row[at].item()
            lengths.append(at + 1)
        assert len(set(lengths)) > 1
        assert torch.equal(ended, torch.cat([ids, expected[:, : max(lengths)]], dim=1))
    assert torch.equal(say(stop=[]), whole)
    assert torch.equal(say(stop=range(11)), whole[:, :4])


def test_generation_leaves_the_mode_and_uses_no_dropout() -> None:
    model = build(dropout=0.5).train()
    ids = tokens(1, 3)
    first = model.generate(ids, 3, temperature=0)
    assert model.training
    assert model.blocks[0].fun.training
    assert torch.equal(first, model.eval().generate(ids, 3, temperature=0))
    model.train()
    model.blocks[0].eval()  # a part that is frozen, say
    before = [module.training for module in model.modules()]
    model.generate(ids, 1)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("temperature", [1.0, 1e-40, 1e-300])
def test_equal_logits_are_drawn_from_the_first_k_only(temperature: float) -> None:
    model = build(depth=1)
    model.tokens.weight.data.zero_()  # all logits are equal
    many = tokens(1, 3).expand(200, 3)
    drawn = model.generate(many, 1, temperature=temperature, top_k=2)[:, -1]
    assert len(set(drawn.tolist())) <= 2


def test_wrong_prompts() -> None:
    model = build()
    ids = tokens(2, 3)
    right = torch.tensor([[True, True, False], [True, True, True]])
    hole = torch.tensor([[True, False, True], [True, True, True]])
    for mask in (right, hole, torch.zeros(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="left padding"):
            model.generate(ids, 2, mask=mask)
    with pytest.raises(ValueError, match="mask must have shape"):
        model.generate(ids, 2, mask=right[:1])
    with pytest.raises(TypeError, match="boolean"):
        model(ids, right.long())
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(ids[:, :0], 2)
    with pytest.raises(ValueError, match="temperature"):
        model.generate(ids, 2, temperature=-1.0)
    with pytest.raises(ValueError, match="top_k"):
        model.generate(ids, 2, top_k=0)
    for top_p in (0.0, 1.1, -0.5):
        with pytest.raises(ValueError, match="top_p must be above 0 and at most 1"):
            model.generate(ids, 2, top_p=top_p)
    for stop in (11, -1, [0, 11]):
        with pytest.raises(ValueError, match="stop must hold ids from 0 to 10, got"):
            model.generate(ids, 2, stop=stop)
    with pytest.raises(TypeError, match="stop"):
        model.generate(ids, 2, stop="ab")
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(ids, 0)
    with pytest.raises(ValueError, match="from 0 to 10, got 11"):
        model.generate(torch.tensor([[11]]), 2)
    for prompts, message in (
        ([], "at least one"),
        ([[1], []], "prompt 1"),
        ([[1], None], "prompt 1"),
        ([[1], [True, False]], "prompt 1"),
        ([[1], [1j]], "prompt 1"),
        ([[0.5]], "prompt 0"),
        (["ab"], "prompt 0 must be a sequence of ids, got 'ab'"),
    ):
        with pytest.raises(ValueError, match=message):
            left_pad(prompts)
    with pytest.raises(ValueError, match=r"targets must have shape \(2, 4\) .* got \(2, 3\)"):
        model.loss(torch.zeros(2, 4, 11), torch.zeros(2, 3, dtype=torch.long))


def test_narrow_models_generate() -> None:
    torch.manual_seed(0)
    model = DeepImplicitAttentionTransformer(
        num_tokens=11, max_seq_len=10, dim=16, depth=2, heads=2
    )
    ids, mask = left_pad([[1, 2, 3], [4, 5, 6, 7, 8]])
    exact = model.eval()(ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(ids, 3, mask=mask).shape == (2, 8)
        torch.testing.assert_close(model(ids, mask).float(), exact, rtol=0, atol=0.02)
    model.bfloat16()
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert model.generate(ids, 3, mask=mask).shape == (2, 8)
            torch.testing.assert_close(model(ids, mask).float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_drawn_from_logits_that_are_not_finite(temperature: float) -> None:
    model = build().eval()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits of the next token are not finite"):
        model.generate(tokens(), 2, temperature)


def test_the_likeliest_is_drawn_at_a_temperature_of_almost_zero() -> None:
    """Divided by it the largest would be infinite, so it is subtracted first."""
    logits = torch.tensor([[0.0, 50.0, 30.0], [30.0, 0.0, -50.0]])
    assert sample(logits, 1e-37, None, None, None).tolist() == [[1], [0]]


def test_logits_whose_sum_is_not_finite_are_drawn_from() -> None:
    logits = torch.full((64, 2), 3e38)
    drawn = sample(logits, 1.0, None, None, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {0, 1}
