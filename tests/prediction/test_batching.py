"""Batches by length: every problem once, little padding, even costs, the same steps for any number of batches."""

import random
from itertools import chain

import pytest

from mmcot.prediction.batching import LengthBatchSampler, cost, length_batches, split_by_cost


def draw_lengths(number, seed=0):
    """Draw lengths as in real problems: most sources are short, some long; targets are short or long."""
    drawn = random.Random(seed)
    return [(drawn.randint(20, 90) * drawn.choice((1, 1, 1, 5)), drawn.choice((7, 8, 60, 300))) for _ in range(number)]


def padded_tokens(batches, lengths):
    return sum(cost(batch, lengths) for batch in batches)


@pytest.mark.parametrize("number", [1, 7, 8, 9, 65, 200, 1000])
@pytest.mark.parametrize(("step_size", "batches_per_step"), [(8, 1), (8, 2), (8, 8), (32, 4)])
def test_epoch_has_every_problem_once_and_len_batches(number, step_size, batches_per_step):
    lengths = draw_lengths(max(number, batches_per_step))
    sampler = LengthBatchSampler(lengths, step_size, batches_per_step, seed=0)
    batches = list(sampler)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths))) and all(batches)
    assert len(sampler) == len(batches) == max(1, len(lengths) // step_size) * batches_per_step


def test_equal_lengths_give_equal_batches():
    assert sorted(map(len, length_batches([(5, 5)] * 64, 8))) == [8] * 8


def test_batches_have_little_padding_and_similar_costs():
    lengths = draw_lengths(1000)
    batches = list(LengthBatchSampler(lengths, 8, 1, seed=0))
    shuffled = random.Random(1).sample(range(1000), 1000)
    plain = [shuffled[start : start + 8] for start in range(0, 1000, 8)]
    real = sum(map(sum, lengths))
    assert padded_tokens(batches, lengths) < 1.2 * real < 1.6 * real < padded_tokens(plain, lengths)
    costs, plain_costs = ([cost(batch, lengths) for batch in made] for made in (batches, plain))
    assert max(costs) < 0.6 * max(plain_costs)


def test_epochs_are_reproducible_and_differ():
    lengths = draw_lengths(300)

    def epoch(number, seed=0):
        sampler = LengthBatchSampler(lengths, 8, 1, seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(1) == epoch(1)
    assert sorted(map(sorted, epoch(1))) != sorted(map(sorted, epoch(2)))
    assert epoch(1) != epoch(1, seed=5)


def test_step_has_the_same_problems_for_any_number_of_batches():
    lengths = draw_lengths(500)

    def steps(batches_per_step):
        batches = list(LengthBatchSampler(lengths, 32, batches_per_step, seed=0))
        whole = [batches[start : start + batches_per_step] for start in range(0, len(batches), batches_per_step)]
        return [sorted(chain.from_iterable(step)) for step in whole]

    assert steps(1) == steps(2) == steps(8)


def test_split_by_cost_balances_cost_over_processes():
    lengths = [(500, 0)] * 4 + [(10, 0)] * 400
    batches = length_batches(lengths, 50)
    one, two = split_by_cost(batches, lengths, 2)
    assert sorted(chain(*one, *two)) == list(range(len(lengths)))
    assert abs(padded_tokens(one, lengths) - padded_tokens(two, lengths)) < 0.1 * padded_tokens(batches, lengths)


def test_refuses_fewer_problems_than_batches_in_a_step():
    with pytest.raises(ValueError, match="3 training problems are not enough for 4 batches a step"):
        LengthBatchSampler([(5, 5)] * 3, 8, 4, seed=0)
