"""Batches of problems of like lengths, all of about the same cost: little padding, and an even pace.

The cost of a batch is its padded tokens, of sources and targets; a batch of short problems holds more of them. Nothing
here knows what a token or a problem is.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

Lengths = tuple[int, int]  # of a problem's source and of its target; 0 where a target is not known

# An epoch's steps are made of this many steps' problems at a time, so that each epoch mixes them anew.
WINDOW = 64


def length_batches(lengths: Sequence[Lengths], count: int, minimum: int = 1) -> list[list[int]]:
    """
    The indices of all problems in `count` batches, none of less than `minimum` problems, such that the costliest batch
    costs as little as can be.
    """
    return partition(by_both_lengths(lengths), lengths, count, minimum) if lengths else []


def by_both_lengths(lengths: Sequence[Lengths]) -> list[int]:
    """Indices such that neighbours have like sources and like targets: in strips by target, within them by source."""
    by_target = sorted(range(len(lengths)), key=lambda index: lengths[index][::-1])
    # As many strips as there are batches in a strip, for batches of 8; one where all targets are alike.
    num_strips = min(len({target for _, target in lengths}), math.ceil(math.sqrt(len(lengths) / 8)))
    size = math.ceil(len(lengths) / max(1, num_strips))
    strips = [by_target[start : start + size] for start in range(0, len(lengths), size)]
    # Every second strip from its end, so that a batch across two strips holds like sources too.
    return [
        index
        for number, strip in enumerate(strips)
        for index in sorted(strip, key=lambda index: lengths[index], reverse=number % 2 == 1)
    ]


def partition(ordered: list[int], lengths: Sequence[Lengths], count: int, minimum: int = 1) -> list[list[int]]:
    """That order cut into `count` batches; the costliest is as cheap as it can be."""
    low, high = 0, len(ordered) * sum(max(lengths[index][side] for index in ordered) for side in (0, 1))
    while low < high:  # the smallest budget that is enough
        middle = (low + high) // 2
        if len(fill_batches(ordered, lengths, middle, minimum)) <= count:
            high = middle
        else:
            low = middle + 1
    batches = fill_batches(ordered, lengths, low, minimum)
    while len(batches) < count:  # ties can leave fewer
        batches.sort(key=lambda batch: (len(batch) >= 2 * minimum, cost(batch, lengths)))
        largest = batches.pop()
        batches.extend([largest[: len(largest) // 2], largest[len(largest) // 2 :]])
    return batches


def fill_batches(ordered: list[int], lengths: Sequence[Lengths], budget: int, minimum: int) -> list[list[int]]:
    """Batches in that order, each as full as the budget allows, or of the minimum where that is over it."""
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
    """Padded tokens."""
    return len(batch) * sum(max(lengths[index][side] for index in batch) for side in (0, 1))


def split_by_cost(batches: list[list[int]], lengths: Sequence[Lengths], num_processes: int) -> list[list[list[int]]]:
    """The batches of each process, the costliest first, so that all processes have about the same work."""
    shared: list[list[list[int]]] = [[] for _ in range(num_processes)]
    work = [0] * num_processes
    for batch in sorted(batches, key=lambda batch: cost(batch, lengths), reverse=True):
        process = work.index(min(work))
        shared[process].append(batch)
        work[process] += cost(batch, lengths)
    return shared


class LengthBatchSampler(Sampler[list[int]]):
    """
    The batches of an epoch: optimisation steps in random order, other ones in each epoch, and of each step its batches
    one after another. Which problems a step holds does not depend on how many batches they are shared out to, as long
    as a batch has 4 problems or more on average.

    Args:
        lengths: of each problem's source and target.
        step_size: problems of a step, on average, over all its batches and processes.
        batches_per_step: processes times accumulated batches.
        seed: with the epoch, what decides the order.

    Raises:
        ValueError: there are fewer problems than a step has batches.
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
            # The costliest first, so that processes that work at the same time have like work.
            yield from sorted(batches, key=lambda batch: cost(batch, self.lengths), reverse=True)

    def windows(self, order: list[int]) -> Iterator[list[int]]:
        """The problems of `WINDOW` steps each; what is left over at the end is in the last one."""
        num_windows = max(1, len(self) // self.batches_per_step // WINDOW)
        size = WINDOW * self.step_size
        for number in range(num_windows):
            is_last = number == num_windows - 1
            yield order[number * size :] if is_last else order[number * size : (number + 1) * size]
