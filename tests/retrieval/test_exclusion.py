"""Search excludes a problem's own gold text, and still returns k passages."""

import pytest
from passage_files import ids, scienceqa, searcher_of

from mmcot.problems.schema import without_gold
from mmcot.problems.sources import load_problems
from mmcot.retrieval.corpora import read_lectures
from mmcot.retrieval.exclusion import Exclusion, exclusion_of, search_with_exclusions
from modeling_mmcot.retrieval_mmcot import Passage

OWN, SHARED, OTHER = "Magnets attract iron.", "Magnets have two poles. Magnets!", "A map shows magnets and north."


@pytest.fixture
def source(tmp_path):
    return scienceqa(
        tmp_path / "problems",
        t1=("train", OWN),
        t2=("train", SHARED),
        t3=("train", SHARED),
        t4=("train", OTHER),
        v1=("val", OWN),
        e1=("test", OWN.replace(" ", "\n ")),
        e2=("test", "A lecture of its own."),
    )


@pytest.fixture
def searcher(tmp_path, source):
    return searcher_of(tmp_path, read_lectures(str(source)))


def texts(searcher, source, split, exclude_verbatim, k=3):
    """Return the texts of the passages that each problem of a split gets, by id."""
    problems = list(load_problems(str(source), split))
    exclusions = [exclusion_of(problem, exclude_verbatim) for problem in problems]
    found = search_with_exclusions(searcher, ["magnets"] * len(problems), k, exclusions)
    return {
        problem["id"]: {passage.text for passage in passages} for problem, passages in zip(problems, found, strict=True)
    }


def test_excludes_own_row_of_training_problem(searcher, source):
    every = {OWN, SHARED, OTHER}
    assert texts(searcher, source, "train", False) == {
        "t1": every - {OWN},
        "t2": every,  # t3 has the lecture too
        "t3": every,
        "t4": every - {OTHER},
    }


def test_exclude_verbatim_drops_gold_lecture_in_all_splits(searcher, source):
    every = {OWN, SHARED, OTHER}
    assert texts(searcher, source, "train", True) == {
        "t1": every - {OWN},
        "t2": every - {SHARED},
        "t3": every - {SHARED},
        "t4": every - {OTHER},
    }
    assert texts(searcher, source, "val", False) == {"v1": every}
    assert texts(searcher, source, "val", True) == {"v1": every - {OWN}}
    assert texts(searcher, source, "test", False) == {"e1": every, "e2": every}
    assert texts(searcher, source, "test", True) == {"e1": every - {OWN}, "e2": every}  # white space does not count


def test_keeps_passage_with_same_id_of_another_split(searcher):
    passage = Passage("p", "", OWN, "", problem_ids=("t1",))
    row = {"id": "t1", "lecture": ""}
    assert exclusion_of({**row, "split": "train"}).drops(passage)
    assert not exclusion_of({**row, "split": "test"}).drops(passage)


def test_drops_no_text_without_gold_columns(source):
    [problem] = list(without_gold(load_problems(str(source), "val")))
    assert exclusion_of(problem) == Exclusion()


def test_returns_k_passages_after_exclusion(tmp_path):
    """Drops more copies than the search margin; the best other passages replace them in rank order."""
    copies = [Passage(f"copy{number}", "", "magnets magnets", "") for number in range(9)]
    others = [Passage(f"other{number}", "", "magnets and poles " + "x " * number, "") for number in range(5)]
    searcher = searcher_of(tmp_path, [*copies, *others])
    exclusions = [Exclusion(lecture="magnets  magnets"), Exclusion(), Exclusion(lecture="magnets magnets")]
    found = ids(search_with_exclusions(searcher, ["magnets", "magnets", "poles"], 2, exclusions))
    assert found == [["other0", "other1"], ["copy0", "copy1"], ["other0", "other1"]]
    found = ids(search_with_exclusions(searcher, ["magnets"], 99, exclusions[:1]))
    assert found == [[f"other{number}" for number in range(5)]]


def test_gold_columns_do_not_change_other_passages(searcher, source):
    """Wrong values in the gold columns drop no passage, and the other passages keep their order."""
    [problem, _] = list(load_problems(str(source), "test"))
    with_gold, with_garbage = (
        ids(search_with_exclusions(searcher, ["magnets iron"], 3, [exclusion_of(row, True)]))[0]
        for row in (problem, {**problem, "lecture": "zzz", "solution": "zzz", "answer": 1})
    )
    assert [name for name in with_garbage if name in with_gold] == with_gold and len(with_garbage) == 3


def test_refuses_wrong_number_of_exclusions_or_passages(searcher):
    with pytest.raises(ValueError, match="1 exclusions for 2 queries"):
        search_with_exclusions(searcher, ["a", "b"], 1, [Exclusion()])
    with pytest.raises(ValueError, match="k is 0"):
        search_with_exclusions(searcher, ["a"], 0, [Exclusion()])


def test_keeps_passages_if_search_for_more_fails_and_is_skipped(searcher):
    class FailingSearcher:
        def search(self, queries, k):
            if k > 2:
                raise OSError("offline")
            return searcher.search(queries, k)

    first, second = searcher.search(["magnets"], 2)[0]
    exclusions = [Exclusion(lecture=first.text)]
    assert search_with_exclusions(FailingSearcher(), ["magnets"], 2, exclusions, on_error="skip") == [[second]]
