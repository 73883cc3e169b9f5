"""Batches by length: every problem once, little padding, an even pace, the same steps however they are shared out."""

import random
from itertools import chain

import pytest

from mmcot.prediction.batching import LengthBatchSampler, cost, length_batches, split_by_cost


def draw(number, seed=0):
    """Lengths as real problems have them: most short, some long, targets alike or not."""
    drawn = random.Random(seed)
    return [(drawn.randint(20, 90) * drawn.choice((1, 1, 1, 5)), drawn.choice((7, 8, 60, 300))) for _ in range(number)]


def padded_tokens(batches, lengths):
    return sum(cost(batch, lengths) for batch in batches)


@pytest.mark.parametrize("number", [1, 7, 8, 9, 65, 200, 1000])
@pytest.mark.parametrize(("step_size", "batches_per_step"), [(8, 1), (8, 2), (8, 8), (32, 4)])
def test_an_epoch_has_every_problem_once_in_as_many_batches_as_it_says(number, step_size, batches_per_step):
    lengths = draw(max(number, batches_per_step))
    sampler = LengthBatchSampler(lengths, step_size, batches_per_step, seed=0)
    batches = list(sampler)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths))) and all(batches)
    assert len(sampler) == len(batches) == max(1, len(lengths) // step_size) * batches_per_step


def test_problems_of_equal_lengths_make_equal_batches():
    assert sorted(map(len, length_batches([(5, 5)] * 64, 8))) == [8] * 8


def test_batches_hold_little_padding_and_cost_about_the_same():
    lengths = draw(1000)
    batches = list(LengthBatchSampler(lengths, 8, 1, seed=0))
    shuffled = random.Random(1).sample(range(1000), 1000)
    plain = [shuffled[start : start + 8] for start in range(0, 1000, 8)]
    real = sum(map(sum, lengths))
    assert padded_tokens(batches, lengths) < 1.2 * real < 1.6 * real < padded_tokens(plain, lengths)
    costs, plain_costs = ([cost(batch, lengths) for batch in made] for made in (batches, plain))
    assert max(costs) < 0.6 * max(plain_costs)


def test_an_epoch_is_reproducible_and_another_one_differs():
    lengths = draw(300)

    def epoch(number, seed=0):
        sampler = LengthBatchSampler(lengths, 8, 1, seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(1) == epoch(1)
    assert sorted(map(sorted, epoch(1))) != sorted(map(sorted, epoch(2)))
    assert epoch(1) != epoch(1, seed=5)


def test_a_step_holds_the_same_problems_however_they_are_shared_out():
    lengths = draw(500)

    def steps(batches_per_step):
        batches = list(LengthBatchSampler(lengths, 32, batches_per_step, seed=0))
        whole = [batches[start : start + batches_per_step] for start in range(0, len(batches), batches_per_step)]
        return [sorted(chain.from_iterable(step)) for step in whole]

    assert steps(1) == steps(2) == steps(8)


def test_processes_get_like_work_not_like_numbers():
    lengths = [(500, 0)] * 4 + [(10, 0)] * 400
    batches = length_batches(lengths, 50)
    one, two = split_by_cost(batches, lengths, 2)
    assert sorted(chain(*one, *two)) == list(range(len(lengths)))
    assert abs(padded_tokens(one, lengths) - padded_tokens(two, lengths)) < 0.1 * padded_tokens(batches, lengths)


def test_too_few_problems_for_a_step_are_refused():
    with pytest.raises(ValueError, match="3 training problems are not enough for 4 batches a step"):
        LengthBatchSampler([(5, 5)] * 3, 8, 4, seed=0)
