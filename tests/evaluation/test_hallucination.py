"""Hallucination in descriptions of study problems."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

from mmcot.evaluation.hallucination import hallucinated_names, hallucination, named_in
from mmcot.problems import study
from mmcot.problems.study_skill import THING_NAMES

ROWS = list(study.generate("val"))
ROW = next(row for row in ROWS if row["skill"] == "look/relation")
DRAWN = study.drawn_names(ROW["id"])
NOT_DRAWN = sorted(THING_NAMES - DRAWN)


def test_finds_no_hallucination_in_gold_observations():
    found = hallucination(ROWS, {row["id"]: row["observation"] for row in ROWS})
    with_picture = [row for row in ROWS if row["images"]]
    assert found["names"] == found["descriptions"] == 0 and found["n"] == len(with_picture) < len(ROWS)
    assert found["num_names"] > len(with_picture)


def test_finds_hallucination_in_observations_of_other_problems():
    of_skill = [row for row in ROWS if row["skill"] == "look/change"]
    texts = [row["observation"] for row in of_skill]
    found = hallucination(
        of_skill, {row["id"]: text for row, text in zip(of_skill, texts[1:] + texts[:1], strict=True)}
    )
    assert found["names"] > 50 and found["descriptions"] > 90


def test_reports_shares_of_names_and_of_descriptions():
    drawn = next(name for name in sorted(DRAWN) if " " in name)
    absent = next(name for name in NOT_DRAWN if " " in name)
    second = {**ROW, "id": next(row["id"] for row in ROWS if row["skill"] == "look/relation" and row is not ROW)}
    descriptions = {ROW["id"]: f"A {drawn}, a {drawn} and a {absent}.", second["id"]: "Nothing is named."}
    assert hallucination([ROW, second], descriptions) == {
        "names": 100 / 3,
        "descriptions": 50.0,
        "n": 2,
        "num_names": 3,
    }
    assert hallucinated_names(ROW["id"], descriptions[ROW["id"]]) == [absent]


def test_counts_wrong_combination_of_drawn_words():
    pairs = [(color, shape) for color in DRAWN for shape in DRAWN if f"{color} {shape}" in NOT_DRAWN]
    assert pairs, "the picture lacks a combination of its colors and shapes"
    color, shape = pairs[0]
    assert hallucinated_names(ROW["id"], f"It is {color}. It is a {shape}.") == []
    assert hallucinated_names(ROW["id"], f"The {color} {shape}s.") == [f"{color} {shape}"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Two red circles and a redder square.", ["red circle", "square"]),
        ("Red circles", ["circle"]),
        ("", []),
        ("A red, blue square", ["red", "blue square"]),
    ],
)
def test_finds_longest_names(text, names):
    assert named_in(text, THING_NAMES) == names


def test_returns_no_measure_without_pictures_or_descriptions():
    texts = [row for row in ROWS if not row["images"]]
    assert hallucination(texts, {row["id"]: "A red circle." for row in texts}) is None
    assert hallucination(ROWS, {}) is None
    assert hallucination([ROW], {ROW["id"]: "Nothing."})["names"] is None


def test_refuses_problems_outside_study():
    with pytest.raises(ValueError, match="problem val-objects-0: not a study problem"):
        hallucination([{**ROW, "id": "val-objects-0"}], {"val-objects-0": "A red circle."})


def test_imports_neither_torch_nor_transformers():
    code = "import sys, mmcot.evaluation.hallucination; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
