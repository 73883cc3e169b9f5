"""Digests of problems: the description of a difference gives the kinds of changes and their counts."""

import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from mmcot.prediction.provenance import problems_digest
from mmcot.problems.digests import combined_digest, describe_difference, digest_of_problems, problem_digests
from mmcot.problems.schema import FEATURES, PicturePaths, check_rows


def problems(folder, **changes):
    rows = [{"id": str(number), "question": f"Question {number}?", "images": ["picture.png"]} for number in range(12)]
    rows[3] |= changes
    rows = check_rows([("rows", row) for row in rows], "rows", PicturePaths(folder))
    return Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)


def test_describes_each_kind_of_change_with_its_count(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "picture.png")
    before = problem_digests(problems(tmp_path))
    assert describe_difference(before, problem_digests(problems(tmp_path))) is None
    for change in ({"question": "Another?"}, {"solution": "It is red."}, {"choices": ["red", "blue"], "answer": 1}):
        assert describe_difference(before, problem_digests(problems(tmp_path, **change))) == (
            "1 have other texts or answers (3)"
        )
    assert (
        describe_difference(before, problem_digests(problems(tmp_path, id="new"))) == "1 are new (new); 1 are gone (3)"
    )
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "picture.png")
    assert describe_difference(before, problem_digests(problems(tmp_path))) == (
        "12 have other pictures (0, 1, 2, 3, 4 and 7 more)"
    )


def test_ignores_moved_and_missing_pictures(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    Image.new("RGB", (4, 4), "red").save(first / "picture.png")
    before_problems = problems(first)
    before = problem_digests(before_problems)
    shutil.copytree(first, second)
    assert problem_digests(problems(second)) == before
    (first / "picture.png").unlink()
    without = problem_digests(before_problems)
    assert describe_difference(before, without) is None
    assert combined_digest(without) == {"texts": combined_digest(before)["texts"], "pictures": None}


# Digests that the code before the columns `observation` and `gold_passages` recorded for this row.
EARLIER_ROW = {"id": "1", "question": "Which?", "choices": ["red", "blue"], "answer": 1}
EARLIER_ROW |= {"lecture": "Colors.", "solution": "It is blue.", "split": "train"}
EARLIER_DIGESTS = {"1": ["be0eabe9be2b6614", "4f53cda18c2baa0c"]}
EARLIER_DIGEST_OF_ALL = {"texts": "3b98b3e1610bd798", "pictures": "b20418f515751a20"}
EARLIER_FINGERPRINT = "sha256:3fa8172796e60ea511ea2051a8c03d697382b3559e4cc3a4b0d05368eb8284f2"


def test_later_columns_do_not_change_digests_while_empty():
    rows = check_rows([("rows", EARLIER_ROW)], "rows", PicturePaths(Path()))
    assert problem_digests(rows) == EARLIER_DIGESTS
    assert digest_of_problems(rows) == EARLIER_DIGEST_OF_ALL
    assert problems_digest(rows) == EARLIER_FINGERPRINT


@pytest.mark.parametrize("change", [{"observation": "A red square."}, {"gold_passages": ["p1"]}])
def test_digests_cover_later_columns_with_a_value(change):
    rows = check_rows([("rows", EARLIER_ROW | change)], "rows", PicturePaths(Path()))
    assert problem_digests(rows) != EARLIER_DIGESTS
    assert digest_of_problems(rows) != EARLIER_DIGEST_OF_ALL
    assert problems_digest(rows) != EARLIER_FINGERPRINT
