"""Excludes passages that would give a problem its own gold text.

There are two rules. *Own row*: a search for a training problem never returns a lecture that this problem alone has.
With `exclude_verbatim`, a search for a problem of any split never returns a passage whose text equals its gold lecture.
Problems of one skill share lectures, so most test lectures occur word for word in the training split. Gold text is used
only to leave out passages, never to rank or to write anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_mmcot.retrieval_mmcot import Passage, Searcher, search_passages
from modeling_mmcot.stage_mmcot import fold

MARGIN = 2  # additional passages in the second search, in place of excluded ones: one for each rule


@dataclass(frozen=True)
class Exclusion:
    """
    The passages that are left out for one problem.

    Args:
        training_id: the id of a training problem; None for all other problems.
        lecture: the gold lecture whose copies are left out; empty for none.
    """

    training_id: str | None = None
    lecture: str = ""

    def drops(self, passage: Passage) -> bool:
        """Whether the passage is left out. Differences in white space do not count."""
        is_own_row = self.training_id is not None and passage.problem_ids == (self.training_id,)
        return is_own_row or (self.lecture.strip() != "" and fold(passage.text) == fold(self.lecture))


def exclusion_of(problem: Mapping[str, Any], exclude_verbatim: bool = False) -> Exclusion:
    """
    Return the exclusion of a problem.

    Args:
        problem: a row with `id`, `split` and, for `exclude_verbatim`, its gold `lecture`.
        exclude_verbatim: whether copies of the gold lecture are left out.
    """
    training_id = problem["id"] if problem["split"] == "train" else None
    return Exclusion(training_id, problem["lecture"] if exclude_verbatim else "")


def search_with_exclusions(
    searcher: Searcher, queries: Sequence[str], k: int, exclusions: Sequence[Exclusion], on_error: str = "raise"
) -> list[list[Passage]]:
    """
    Return the passages of each query as `search_passages` does, without the excluded ones. There are
    `k` passages, if the searcher finds enough others.

    Args:
        exclusions: one for each query.

    Raises:
        ValueError, SearchError: as `search_passages`.
    """
    if len(exclusions) != len(queries):
        raise ValueError(f"{len(exclusions)} exclusions for {len(queries)} queries; expected one for each query.")
    kept: list[list[Passage]] = [[] for _ in queries]
    remaining, num_asked = list(range(len(queries))), k
    while remaining:
        found = search_passages(searcher, [queries[number] for number in remaining], num_asked, on_error)
        for number, passages in zip(remaining, found, strict=True):
            others = [passage for passage in passages if not exclusions[number].drops(passage)][:k]
            if len(others) > len(kept[number]):  # a later search can fail and be skipped
                kept[number] = others
        # These queries still lack passages in place of the excluded ones, and the searcher may find more.
        remaining = [
            number
            for number, passages in zip(remaining, found, strict=True)
            if len(kept[number]) < k and len(passages) == num_asked
        ]
        num_asked = k + MARGIN if num_asked == k else 2 * num_asked
    return kept
