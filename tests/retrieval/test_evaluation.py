"""Recall and the mean reciprocal rank against gold passages."""

import pytest
from passage_files import corpus, searcher_of

from mmcot.retrieval.evaluation import Ranks, check_gold_ids, count_in_corpus, find_ranks, render_query
from modeling_mmcot.retrieval_mmcot import Passage


def problem(name, question, lecture="", split="test", **columns):
    row = {"id": name, "question": question, "choices": ["N", "S"], "context": "", "split": split, "lecture": lecture}
    return {**row, "answer": 1, "solution": "SOLUTION", "rationales": [], "direct_answers": [], **columns}


def test_measures_match_hand_computed_values():
    ranks = Ranks([1, 2, None, 6], 0, 10)
    assert ranks.measures([1, 5]) == {
        "recall@1": [1.0, 0.0, 0.0, 0.0],
        "recall@5": [1.0, 1.0, 0.0, 0.0],
        "mrr@10": [1.0, 0.5, 0.0, 1 / 6],
    }


def test_finds_gold_lecture_by_equality_or_containment(tmp_path):
    searcher = searcher_of(
        tmp_path, corpus(other="poles poles", gold="Poles attract.\nSo they do.", copy="Like poles.")
    )
    problems = [
        problem("equal", "poles", "Poles attract. So they  do."),
        problem("within", "poles", "So they do."),
        problem("absent", "poles", "Poles repel."),
        problem("none", "poles"),
    ]
    ranks = find_ranks(searcher, problems, 3, template="poles")
    assert (ranks.ranks, ranks.num_without_gold) == ([3, 3, None], 1)
    assert count_in_corpus(searcher, problems) == 2
    # Exclusion drops copies before ranking; a passage that only contains the lecture stays.
    ranks = find_ranks(searcher, problems, 3, template="poles", exclude_verbatim=True)
    assert ranks.ranks == [None, 3, None]
    assert count_in_corpus(searcher, problems, exclude_verbatim=True) == 1


def test_finds_gold_passage_by_id(tmp_path):
    searcher = searcher_of(tmp_path)
    problems = [problem("a", "cell walls", passage="cells"), problem("b", "north map", passage="poles")]
    assert find_ranks(searcher, problems, 6, gold="passage", template="{{ question }}").ranks == [1, 2]
    assert count_in_corpus(searcher, problems, "passage") == 2
    check_gold_ids(searcher, problems, "passage")
    with pytest.raises(ValueError, match="column 'passage' names 1 passages that the index does not have: gone"):
        check_gold_ids(searcher, [*problems, problem("c", "q", passage="gone")], "passage")


def test_ranks_exclude_own_row_of_training_problem(tmp_path):
    own = Passage("own", "", "iron poles", "", problem_ids=("t",))
    searcher = searcher_of(tmp_path, [own, *corpus()])
    rows = [problem("t", "iron poles", "iron poles", split=split) for split in ("train", "test")]
    assert find_ranks(searcher, rows, 7).ranks == [None, 1]


def test_query_template_accesses_no_gold_column():
    row = problem("p", "Which pole?", "LECTURE")
    assert render_query("{{ question }} {{ choices | join(' ') }}", row) == "Which pole? N S"
    for column in ("lecture", "solution", "answer", "rationales", "direct_answers"):
        with pytest.raises(ValueError, match=f"fails for problem p: '{column}' is undefined; columns: id, question"):
            render_query(f"{{{{ {column} }}}}", row)
    with pytest.raises(ValueError, match="query template '{{ question' fails for problem p"):
        render_query("{{ question", row)


def test_refuses_invalid_gold_column(tmp_path):
    searcher = searcher_of(tmp_path)
    with pytest.raises(ValueError, match="gold is 'answer'; expected lecture, gold_passages, or an own column"):
        find_ranks(searcher, [problem("p", "q")], 1, gold="answer")
    with pytest.raises(ValueError, match="none of the 1 problems has a text in the gold column 'lecture'"):
        find_ranks(searcher, [problem("p", "q")], 1)
