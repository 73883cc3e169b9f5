"""Batches of problems of similar lengths and of about equal cost: little padding and steady progress.

The cost of a batch is its number of padded source and target tokens, so a batch of short problems contains more of
them. The functions work on lengths and indices only.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

Lengths = tuple[int, int]  # of a problem's source and target; 0 for an unknown target

# Problems are sorted by length within windows of this many steps. Each epoch draws the windows at random.
WINDOW = 64


def length_batches(lengths: Sequence[Lengths], count: int, minimum: int = 1) -> list[list[int]]:
    """
    Split the indices of all problems into `count` batches of at least `minimum` problems, such that the cost of the
    most expensive batch is minimal.
    """
    return partition(by_both_lengths(lengths), lengths, count, minimum) if lengths else []


def by_both_lengths(lengths: Sequence[Lengths]) -> list[int]:
    """Sort indices so that neighbours have similar lengths: into strips by target length, within a strip by source."""
    by_target = sorted(range(len(lengths)), key=lambda index: lengths[index][::-1])
    # For batches of 8, there are as many strips as batches per strip, but no more strips than target lengths.
    num_strips = min(len({target for _, target in lengths}), math.ceil(math.sqrt(len(lengths) / 8)))
    size = math.ceil(len(lengths) / max(1, num_strips))
    strips = [by_target[start : start + size] for start in range(0, len(lengths), size)]
    # Every second strip is reversed, so that a batch across two strips has similar sources too.
    return [
        index
        for number, strip in enumerate(strips)
        for index in sorted(strip, key=lambda index: lengths[index], reverse=number % 2 == 1)
    ]


def partition(ordered: list[int], lengths: Sequence[Lengths], count: int, minimum: int = 1) -> list[list[int]]:
    """Cut an ordered list into `count` batches, such that the cost of the most expensive batch is minimal."""
    low, high = 0, len(ordered) * sum(max(lengths[index][side] for index in ordered) for side in (0, 1))
    while low < high:  # binary search for the smallest sufficient budget
        middle = (low + high) // 2
        if len(fill_batches(ordered, lengths, middle, minimum)) <= count:
            high = middle
        else:
            low = middle + 1
    batches = fill_batches(ordered, lengths, low, minimum)
    while len(batches) < count:  # ties can give fewer batches
        batches.sort(key=lambda batch: (len(batch) >= 2 * minimum, cost(batch, lengths)))
        largest = batches.pop()
        batches.extend([largest[: len(largest) // 2], largest[len(largest) // 2 :]])
    return batches


def fill_batches(ordered: list[int], lengths: Sequence[Lengths], budget: int, minimum: int) -> list[list[int]]:
    """Fill batches in order up to the budget; a batch of the minimum size may exceed it."""
    batches: list[list[int]] = []
    longest = (0, 0)
    for index in ordered:
        longest = tuple(map(max, longest, lengths[index]))
        if batches and (len(batches[-1]) < minimum or (len(batches[-1]) + 1) * sum(longest) <= budget):
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    if len(batches) > 1 and len(batches[-1]) < minimum:
        rest = batches.pop()
        batches[-1].extend(rest)
    return batches


def cost(batch: list[int], lengths: Sequence[Lengths]) -> int:
    """Return the number of padded tokens."""
    return len(batch) * sum(max(lengths[index][side] for index in batch) for side in (0, 1))


def split_by_cost(batches: list[list[int]], lengths: Sequence[Lengths], num_processes: int) -> list[list[list[int]]]:
    """Return the batches of each process, most expensive first, with about equal total cost for all processes."""
    by_process: list[list[list[int]]] = [[] for _ in range(num_processes)]
    total_cost = [0] * num_processes
    for batch in sorted(batches, key=lambda batch: cost(batch, lengths), reverse=True):
        process = total_cost.index(min(total_cost))
        by_process[process].append(batch)
        total_cost[process] += cost(batch, lengths)
    return by_process


class LengthBatchSampler(Sampler[list[int]]):
    """
    Yields the batches of an epoch: optimisation steps in random order, with the batches of a step in succession. Each
    epoch groups the problems into different steps. The problems of a step do not depend on the number of batches per
    step if a batch contains 4 or more problems on average.

    Args:
        lengths: source and target length of each problem.
        step_size: average number of problems per step, over all batches and processes.
        batches_per_step: number of processes times accumulated batches.
        seed: determines the order, together with the epoch.

    Raises:
        ValueError: there are fewer problems than batches per step.
    """

    def __init__(self, lengths: Sequence[Lengths], step_size: int, batches_per_step: int, seed: int):
        if len(lengths) < batches_per_step:
            raise ValueError(
                f"{len(lengths)} training problems are not enough for {batches_per_step} batches a step (processes "
                f"times gradient_accumulation_steps)."
            )
        self.lengths = lengths
        self.step_size = step_size
        self.batches_per_step = batches_per_step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, len(self.lengths) // self.step_size) * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        minimum = max(self.batches_per_step, self.step_size // 4)
        steps = []
        for window in self.windows(order):
            window_lengths = [self.lengths[index] for index in window]
            for step in length_batches(window_lengths, max(1, len(window) // self.step_size), minimum):
                steps.append([window[index] for index in step])
        for number in torch.randperm(len(steps), generator=generator).tolist():
            batches = partition(steps[number], self.lengths, self.batches_per_step)
            # Most expensive first, so that batches that run at the same time have similar costs.
            yield from sorted(batches, key=lambda batch: cost(batch, self.lengths), reverse=True)

    def windows(self, order: list[int]) -> Iterator[list[int]]:
        """Yield the problems of `WINDOW` steps at a time; the last window also contains the remainder."""
        num_windows = max(1, len(self) // self.batches_per_step // WINDOW)
        size = WINDOW * self.step_size
        for number in range(num_windows):
            is_last = number == num_windows - 1
            yield order[number * size :] if is_last else order[number * size : (number + 1) * size]
