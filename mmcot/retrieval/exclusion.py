"""Excludes passages that would give a problem its own gold text.

Two rules. A training problem never sees its *own row*: a lecture that it alone has. With `exclude_verbatim`, no problem
of any split sees a passage whose text equals its gold lecture: lectures are shared by skill, so most test lectures
occur word for word in the training split. Gold text only drops passages; it never ranks or writes anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_mmcot.retrieval_mmcot import Passage, Searcher, search_passages
from modeling_mmcot.stage_mmcot import fold

MARGIN = 2  # passages that are fetched in place of excluded ones at first: one for each rule


@dataclass(frozen=True)
class Exclusion:
    """
    The passages that one problem may not see.

    Args:
        training_id: the id of a training problem; None for all other problems.
        lecture: the gold lecture whose copies are dropped; empty for none.
    """

    training_id: str | None = None
    lecture: str = ""

    def drops(self, passage: Passage) -> bool:
        """Whether the problem may not see the passage. Differences of white space do not count."""
        is_own_row = self.training_id is not None and passage.problem_ids == (self.training_id,)
        return is_own_row or (self.lecture.strip() != "" and fold(passage.text) == fold(self.lecture))


def exclusion_of(problem: Mapping[str, Any], exclude_verbatim: bool = False) -> Exclusion:
    """
    Return the exclusion of a problem.

    Args:
        problem: a row with `id`, `split` and, for `exclude_verbatim`, its gold `lecture`.
        exclude_verbatim: whether copies of the gold lecture are dropped.
    """
    training_id = problem["id"] if problem["split"] == "train" else None
    return Exclusion(training_id, problem["lecture"] if exclude_verbatim else "")


def search_with_exclusions(
    searcher: Searcher, queries: Sequence[str], k: int, exclusions: Sequence[Exclusion], on_error: str = "raise"
) -> list[list[Passage]]:
    """
    Return the passages of each query as `search_passages` does, without the excluded ones: `k` passages, if the
    searcher finds as many others.

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
            kept[number] = [passage for passage in passages if not exclusions[number].drops(passage)][:k]
        # These lack passages in place of the excluded ones, and the searcher may have more.
        remaining = [
            number
            for number, passages in zip(remaining, found, strict=True)
            if len(kept[number]) < k and len(passages) == num_asked
        ]
        num_asked = k + MARGIN if num_asked == k else 2 * num_asked
    return kept
