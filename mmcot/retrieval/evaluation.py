"""Measures retrieval: the rank of a problem's gold passage, recall@k and the mean reciprocal rank.

Either a column of the problems contains the id of the gold passage, or every passage is gold whose text equals or
contains the problem's gold lecture, up to white space. The query template cannot read gold columns.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from mmcot.problems.schema import FEATURES, GOLD_COLUMNS, first_few
from mmcot.retrieval.exclusion import exclusion_of, search_with_exclusions
from modeling_mmcot.retrieval_mmcot import BM25Searcher, Passage, Searcher
from modeling_mmcot.stage_mmcot import fold, render

QUERY_TEMPLATE = "{{ question }} {{ choices | join(' ') }}"
LECTURE = "lecture"  # the gold column that is compared by text; all others contain ids
PASSAGE_IDS = "gold_passages"  # the gold column of the schema that contains ids


@dataclass(frozen=True)
class Ranks:
    """
    The ranks of gold passages.

    Args:
        ranks: for each problem with gold, the rank of its first gold passage, from 1; None if none was found.
        num_without_gold: the number of problems without gold, which are not measured.
        depth: the number of passages that were searched for each problem.
    """

    ranks: list[int | None]
    num_without_gold: int
    depth: int

    def measures(self, ks: Iterable[int]) -> dict[str, list[float]]:
        """
        Return one value for each problem: `recall@k` is 1 if the gold passage is among the first k, and `mrr@DEPTH` is
        1 / rank, or 0 if it was not found. Their means are the recall and the mean reciprocal rank.
        """
        recall = {f"recall@{k}": [float(rank is not None and rank <= k) for rank in self.ranks] for k in ks}
        return {**recall, f"mrr@{self.depth}": [0.0 if rank is None else 1 / rank for rank in self.ranks]}


def render_query(template: str, problem: Mapping[str, Any]) -> str:
    """
    Return the query of a problem.

    Raises:
        ValueError: the template is invalid, or reads a column that the problem lacks, or a gold column.
    """
    columns = {name: value for name, value in problem.items() if name not in (*GOLD_COLUMNS, "images")}
    try:
        return render(template, columns)
    except TemplateError as error:
        raise ValueError(
            f"query template {template!r} fails for problem {problem['id']}: {error}; columns: {', '.join(columns)}."
        ) from error


def is_gold(passage: Passage, problem: Mapping[str, Any], gold: str) -> bool:
    """Whether a passage is the gold passage of a problem."""
    return fold(problem[LECTURE]) in fold(passage.text) if gold == LECTURE else passage.id in gold_of(problem, gold)


def gold_of(problem: Mapping[str, Any], gold: str) -> list[str]:
    """Return the texts or ids in a gold column, which contains one or a list of them; empty for a problem without."""
    values = problem[gold] if isinstance(problem[gold], list) else [problem[gold]]
    return [value for value in values if value.strip()]


def find_ranks(
    searcher: Searcher,
    problems: Iterable[Mapping[str, Any]],
    depth: int,
    gold: str = LECTURE,
    template: str = QUERY_TEMPLATE,
    exclude_verbatim: bool = False,
    on_error: str = "raise",
) -> Ranks:
    """
    Search for each problem that has gold, and return the ranks of the gold passages.

    Args:
        problems: rows with their gold columns. For a training problem, a lecture that it alone has is left out.
        depth: the number of passages of each problem.
        gold: `lecture`, `gold_passages`, or an own column with the id of the gold passage.
        template: the query template.
        exclude_verbatim: whether passages that equal the gold lecture are left out before ranking.
        on_error: as in `search_passages`.

    Raises:
        ValueError: no problem has gold, or the gold column or the template is invalid.
        SearchError: a search fails.
    """
    if gold in FEATURES and gold not in (LECTURE, PASSAGE_IDS):
        raise ValueError(
            f"gold is {gold!r}; expected {LECTURE}, {PASSAGE_IDS}, or an own column with the id of the gold passage."
        )
    rows = list(problems)
    measured = [row for row in rows if gold_of(row, gold)]
    if not measured:
        raise ValueError(f"none of the {len(rows)} problems has a text in the gold column {gold!r}.")
    queries = [render_query(template, row) for row in measured]
    exclusions = [exclusion_of(row, exclude_verbatim) for row in measured]
    found = search_with_exclusions(searcher, queries, depth, exclusions, on_error)
    ranks = [
        next((rank for rank, passage in enumerate(passages, start=1) if is_gold(passage, row, gold)), None)
        for row, passages in zip(measured, found, strict=True)
    ]
    return Ranks(ranks, len(rows) - len(measured), depth)


def count_in_corpus(
    searcher: BM25Searcher, problems: Iterable[Mapping[str, Any]], gold: str = LECTURE, exclude_verbatim: bool = False
) -> int:
    """Return the number of problems whose gold passage is in the corpus: no ranking can find more."""
    passages = [searcher.passage(position) for position in range(len(searcher.passages))]
    rows = [problem for problem in problems if gold_of(problem, gold)]
    if gold != LECTURE:
        known = {passage.id for passage in passages}
        return sum(not known.isdisjoint(gold_of(row, gold)) for row in rows)
    lectures = [fold(row[LECTURE]) for row in rows]
    present = texts_within(passages, set(lectures), exclude_verbatim)
    return sum(lecture in present for lecture in lectures)


def texts_within(passages: Iterable[Passage], texts: set[str], exclude_verbatim: bool) -> set[str]:
    """Return the texts that any passage contains; with `exclude_verbatim`, only those within a longer passage."""
    found: set[str] = set()
    for passage in passages:
        folded = fold(passage.text)
        found |= {text for text in texts - found if text in folded and not (exclude_verbatim and text == folded)}
    return found


def check_gold_ids(searcher: BM25Searcher, problems: Iterable[Mapping[str, Any]], gold: str) -> None:
    """
    Raises:
        ValueError: problems name passages that the corpus does not have.
    """
    known = {searcher.passage(position).id for position in range(len(searcher.passages))}
    absent = sorted({name for row in problems for name in gold_of(row, gold)} - known)
    if absent:
        raise ValueError(
            f"column {gold!r} names {len(absent)} passages that the index does not have: {first_few(absent)}."
        )
