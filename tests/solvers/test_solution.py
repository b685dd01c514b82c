"""`Solution` and `Status`: what a user reads."""

import copy
import io
import pickle

import pytest
import torch

from deep_implicit_attention.solvers import Solution, Status, picard


@pytest.fixture
def mixed():
    """One sample that converges, one that runs away, one that is NaN."""

    def f(z):
        return z * torch.tensor([[0.5], [3.0], [torch.nan]]) + 1

    return picard(f, torch.zeros(3, 2), max_iter=40)


@pytest.mark.parametrize("status", Status)
def test_status_is_a_word_and_a_sentence(status):
    assert str(status) == f"{status}" == status.value == status.name.lower()
    assert status == status.value  # compares with plain strings
    assert len(status.sentence) > 20
    assert status.sentence.endswith(".")
    assert Status(status.value) is status


def test_sentences_differ():
    assert len({status.sentence for status in Status}) == len(Status)
    assert len({status.code for status in Status}) == len(Status)


def test_failures_say_what_to_try():
    assert "max_iter" in Status.MAX_ITER.sentence
    assert "damping" in Status.DIVERGED.sentence
    assert "NaN" in Status.NONFINITE.sentence


def test_status_is_per_sample(mixed):
    assert mixed.status == (Status.CONVERGED, Status.DIVERGED, Status.NONFINITE)
    assert mixed.converged.tolist() == [True, False, False]
    assert mixed.codes.tolist() == [s.code for s in mixed.status]


def test_unpacks_into_value_and_itself(mixed):
    value, solution = mixed
    assert value is mixed.value
    assert solution is mixed


def test_repr_tells_how_it_went(mixed):
    for part in ("converged: 1", "diverged: 1", "nonfinite: 1", "inf", "40 steps", "batch of 3"):
        assert part in repr(mixed)
    assert "max_iter" not in repr(mixed)
    good = picard(lambda z: 0.5 * z, torch.zeros(2, 2))
    assert repr(good) == "Solution(converged: 2; worst residual 0.00e+00, 1 steps, batch of 2)"
    assert "empty" in repr(picard(lambda z: z, torch.zeros(0, 2)))


def test_is_immutable(mixed):
    with pytest.raises(AttributeError):
        mixed.value = None


def test_with_value_keeps_the_evidence(mixed):
    other = mixed.with_value((1, 2))
    assert other.value == (1, 2)
    assert other.residual is mixed.residual
    assert mixed.value.shape == (3, 2)


def test_accepting_and_with_status_touch_only_the_chosen_samples(mixed):
    second = torch.tensor([False, True, False])
    accepted = mixed.accepting(second)
    assert accepted.status == (Status.CONVERGED, Status.CONVERGED, Status.NONFINITE)
    assert accepted.converged.tolist() == [True, True, False]
    first = torch.tensor([True, False, False])
    failed = mixed.with_status(first, Status.NONFINITE)
    assert failed.status == (Status.NONFINITE, Status.DIVERGED, Status.NONFINITE)
    assert failed.converged.tolist() == [False, False, False]
    assert failed.residual[0] == torch.inf
    assert torch.equal(failed.residual[1:], mixed.residual[1:])
    indefinite = mixed.with_status(first, Status.INDEFINITE)
    assert indefinite.residual[0] == mixed.residual[0]
    assert isinstance(indefinite, Solution)
    assert mixed.converged.tolist() == [True, False, False]  # the original is as it was


def test_the_better_of_two_answers_brings_all_its_evidence():
    """And the worse one, in the second sample, none."""

    def solution(residuals, status, value):
        residual = torch.tensor(residuals)
        return Solution(
            value=torch.full((2, 3), value),
            residual=residual,
            steps=torch.tensor([7, 7]),
            converged=torch.tensor([status is Status.CONVERGED] * 2),
            codes=torch.tensor([status.code] * 2),
            trace=residual[None],
            residual_norm=10 * residual,
        )

    mine = solution([5.0, 0.01], Status.NONFINITE, 1.0)
    its = solution([0.1, 0.1], Status.MAX_ITER, 2.0)
    better = mine.unless_better(its)
    assert better.status == (Status.MAX_ITER, Status.NONFINITE)
    assert better.value[:, 0].tolist() == [2, 1]
    torch.testing.assert_close(better.residual, torch.tensor([0.1, 0.01]))
    torch.testing.assert_close(better.residual_norm, torch.tensor([1.0, 0.1]))
    assert not better.converged.any()
    sure = mine.unless_better(solution([0.1, 0.1], Status.CONVERGED, 2.0))
    assert sure.converged.tolist() == [True, False]


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("max_iter", [1, 40])
def test_its_numbers_are_apart(stop_mode, max_iter):
    """Whoever changes one of them changes no other."""
    solution = picard(
        lambda z: 0.5 * z + 1, torch.zeros(3, 2), stop_mode=stop_mode, max_iter=max_iter
    )
    solution.residual.neg_()  # before the others are asked for
    numbers = [solution.residual, solution.residual_norm, solution.trace, solution.steps]
    assert len({part.data_ptr() for part in numbers}) == 4
    assert (solution.trace >= 0).all()


@pytest.mark.parametrize("on_its_way", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_evidence_is_there_when_asked_for(on_its_way):
    """Where all samples converged most of it is made only then."""
    solution = on_its_way(picard(lambda z: 0.5 * z + 1, torch.zeros(3, 2, dtype=torch.float64)))
    steps, count = len(solution.trace), 3
    assert solution.all_converged()
    assert solution.trace.shape == (steps, count)
    assert solution.trace.dtype == torch.float64
    assert solution.trace[-1].equal(solution.residual)
    assert (solution.trace[:-1] > solution.trace[1:]).all()
    assert solution.steps.tolist() == [steps] * count
    assert solution.steps.dtype == torch.int64
    assert solution.converged.tolist() == [True] * count
    assert solution.codes.tolist() == [Status.CONVERGED.code] * count
    assert solution.converged is solution.converged
    failed = solution.with_status(torch.tensor([True, False, False]), Status.DIVERGED)
    assert not failed.all_converged()
    assert solution.all_converged()
    solution.converged[0] = False
    assert not solution.all_converged()
    with pytest.raises(AttributeError, match="no attribute 'iterations'"):
        solution.iterations  # noqa: B018


def through_a_file(solution):
    file = io.BytesIO()
    torch.save(solution, file)
    file.seek(0)
    with torch.serialization.safe_globals([Solution]):
        return torch.load(file, weights_only=True)


def in_inference_mode(solution):
    with torch.inference_mode():
        assert solution.residual.shape == solution.steps.shape
    return solution


def on_another_device(solution):
    with torch.device("meta"):
        assert "converged: 3" in repr(solution)
    return solution


@pytest.mark.parametrize("asked", [through_a_file, in_inference_mode, on_another_device])
def test_evidence_does_not_depend_on_where_it_is_asked_for(asked):
    solution = asked(picard(lambda z: 0.5 * z + 1, torch.zeros(3, 2)))
    weights = torch.ones(3, requires_grad=True)
    (weights * solution.residual * solution.trace[-1]).sum().backward()
    assert (weights.grad > 0).all()
    assert solution.converged.sum() == 3
