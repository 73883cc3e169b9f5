"""The division of rows without a split by their content, independent of other rows; problems in two splits."""

import collections
import json
import logging
import random

import datasets
import pytest
import yaml
from conftest import HUB_FEATURES, hub_rows
from problem_files import error_of, has_all, jsonl, parquet, png

from mmcot.problems.sources import is_divided, load_problems
from mmcot.problems.splits import overlaps, parse_split_files
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json
from mmcot.training.preparation import prepare

SPLITS = ("train", "val", "test")


def question(number: int) -> dict:
    gold = {"answer": number % 2, "solution": f"It is {number % 2}."}
    return {"question": f"What is {number} modulo 2?", "choices": ["0", "1"], **gold}


def divided(source: str, **options) -> dict[str, set[str]]:
    return {split: set(load_problems(source, split, **options)["question"]) for split in SPLITS}


# Divided by content.


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_divides_rows_without_a_split_eight_to_one_to_one(tmp_path, write, caplog):
    file = write(tmp_path, *map(question, range(400)))
    with caplog.at_level(logging.WARNING, logger="mmcot"):
        found = divided(file)
    assert sum(map(len, found.values())) == 400 == len(set.union(*found.values())), "each row is in one split"
    assert 290 < len(found["train"]) < 350 and 20 < len(found["val"]) < 60 and 20 < len(found["test"]) < 60
    assert has_all(
        caplog.text, file, "no row has a split", "split_seed 42", "8:1:1", f"test has {len(found['test'])} of 400"
    )
    assert is_divided(file)
    assert load_problems(file, "test")["split"] == ["test"] * len(found["test"])


def test_row_keeps_its_split_when_other_rows_change(tmp_path):
    rows = [question(number) for number in range(60)]
    before = divided(jsonl(tmp_path, *rows))
    more = [*map(question, range(100, 140)), *rows]
    random.Random(0).shuffle(more)
    after = divided(jsonl(tmp_path, *more))
    assert all(before[split] <= after[split] for split in SPLITS)
    fewer = divided(jsonl(tmp_path, *rows[::2]))
    assert all(fewer[split] <= before[split] for split in SPLITS)
    assert divided(parquet(tmp_path, *rows)) == before, "the file format does not matter"
    other_gold = [{**row, "answer": 0, "solution": "Else.", "id": f"p{n}"} for n, row in enumerate(rows)]
    assert divided(jsonl(tmp_path, *other_gold)) == before, "gold and ids do not matter"


def test_division_depends_on_the_seed(tmp_path):
    file = jsonl(tmp_path, *map(question, range(60)))
    assert divided(file, split_seed=1) != divided(file)
    assert divided(file, split_seed=1) == divided(file, split_seed=1)


def test_puts_equal_problems_into_the_same_split(tmp_path):
    """The names of picture files do not matter; a problem with other pictures is another problem."""
    colors = ["red", "green", "blue", "white", "black", "navy", "gold", "gray", "pink", "tan", "lime", "plum"]
    for color in colors:
        for copy in range(5):
            (tmp_path / f"{color}-{copy}.png").write_bytes(png(color))
    asked = {"question": "Which color is it?", "choices": ["red", "another"]}
    rows = [{**asked, "images": [f"{color}-{copy}.png"]} for copy in range(5) for color in colors]
    rows[0]["question"] = " Which  color is it?"
    file = jsonl(tmp_path, *rows)
    loaded = {split: load_problems(file, split) for split in SPLITS}
    splits_by_color = collections.defaultdict(set)
    for split, problems in loaded.items():
        for row in problems:
            splits_by_color[row["images"][0]["path"].split("/")[-1].split("-")[0]].add(split)
    assert all(len(found) == 1 for found in splits_by_color.values()), splits_by_color
    assert len(set.union(*splits_by_color.values())) > 1, "the pictures must matter, not only the text"
    assert not any(ids for seconds in overlaps(loaded).values() for ids in seconds.values())
    blind = {split: load_problems(file, split, pictures=False)["id"] for split in SPLITS}
    assert blind == {split: problems["id"] for split, problems in loaded.items()}, "`pictures` does not matter"


def test_refuses_a_missing_picture_that_decides_a_split(tmp_path):
    file = jsonl(tmp_path, {**question(0), "images": ["gone.png"]})
    assert has_all(error_of(load_problems, file, "test", None, False), "line 1", "gone.png is missing")


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("nothing", [None, ""])
def test_refuses_a_file_with_a_split_in_only_some_rows(tmp_path, write, nothing):
    rows = [{**question(number), "split": nothing if number in (3, 5) else "train"} for number in range(9)]
    message = error_of(load_problems, write(tmp_path, *rows), "train")
    assert has_all(message, "2 of 9 rows have no split", "in all rows or in none")


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_accepts_other_names_of_splits(tmp_path, write):
    names = ("train", "validation", "valid", "dev", "val", "test")
    file = write(tmp_path, *({**question(number), "split": name} for number, name in enumerate(names)))
    assert len(load_problems(file, "val")) == len(load_problems(file, "validation")) == 4
    assert not is_divided(file)


# A file for each split.


def test_reads_a_whole_file_as_the_given_split(tmp_path, caplog):
    files = {}
    for split, numbers in (("train", range(30)), ("val", range(30, 40)), ("test", range(40, 45))):
        (tmp_path / split).mkdir()
        files[split] = jsonl(tmp_path / split, *({**question(number), "split": "dev"} for number in numbers))
    source = ",".join(f"{split}={file}" for split, file in files.items())
    with caplog.at_level(logging.WARNING, logger="mmcot"):
        assert [len(load_problems(source, split)) for split in SPLITS] == [30, 10, 5]
    assert not is_divided(source) and load_problems(source, "val")["id"][0] == "val-0"
    assert has_all(caplog.text, f"{files['test']}: given as test, which overrides rows that name another split")
    assert len(load_problems(f"test={files['train']}", "test")) == 30
    message = error_of(load_problems, f"test={files['train']}", "train")
    assert has_all(message, "no split 'train'; found test", "train=FILE,val=FILE,test=FILE")
    assert has_all(
        error_of(load_problems, f"test={files['train']},test={files['val']}", "test"), "names the split 'test' twice"
    )
    assert parse_split_files("a=b.jsonl") is None and parse_split_files("test=a,b.jsonl,dev=c") == {
        "test": "a,b.jsonl",
        "val": "c",
    }


# Problems in two splits.


def overlapping(folder) -> str:
    rows = [{**question(number), "split": "train"} for number in range(20)]
    rows += [{**question(number), "split": "val", "id": f"v{number}"} for number in range(18, 24)]
    rows += [{**question(number), "split": "test", "id": f"t{number}"} for number in (3, 4, 5, 22, 30)]
    return jsonl(folder, *rows)


def test_refuses_overlap_of_splits_with_its_count(text_recipe, tmp_path):
    file = overlapping(tmp_path)
    with pytest.raises(ValueError) as error:
        prepare(parse_recipe([*text_recipe, "--dataset", file]))
    assert has_all(
        str(error.value),
        f"{file}: 2 of 6 val problems are in train too (v18, v19)",
        "3 of 5 test problems are in train too (t3, t4, t5)",
        "1 of 5 test problems are in val too (t22)",
        "--allow_overlap true",
    )
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_allow_overlap_warns_and_records_the_overlap(text_recipe, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="mmcot"):
        run = prepare(parse_recipe([*text_recipe, "--dataset", overlapping(tmp_path), "--allow_overlap", "true"]))
    assert has_all(caplog.text, "3 of 5 test problems are in train too", "the card reports the overlap")
    assert read_json(run.folder.splits) == {
        "divided_by": None,
        "n": {"train": 20, "val": 6, "test": 5},
        "overlap": {"train": {"val": 2, "test": 3}, "val": {"test": 1}},
    }
    assert yaml.safe_load(run.folder.recipe.read_text())["allow_overlap"] is True


def test_run_records_the_division_of_its_rows(text_recipe, tmp_path):
    file = jsonl(tmp_path, *map(question, range(60)))
    for _ in range(2):  # the second call resumes the same run
        run = prepare(parse_recipe([*text_recipe, "--dataset", file]))
        run.lock.__exit__(None, None, None)
    assert yaml.safe_load(run.folder.recipe.read_text())["split_seed"] == 42
    record = read_json(run.folder.splits)
    assert record["divided_by"] == 42 and sum(record["n"].values()) == 60
    assert record["overlap"] == {"train": {"val": 0, "test": 0}, "val": {"test": 0}}
    with pytest.raises(ValueError, match="split_seed: 42 there, 7 here"):
        prepare(parse_recipe([*text_recipe, "--dataset", file, "--split_seed", "7"]))


def test_suggests_separate_files_for_too_few_rows(text_recipe, tmp_path):
    file = jsonl(tmp_path, *map(question, range(2)))
    with pytest.raises(ValueError, match="has no problems.*one in ten.*train=FILE"):
        prepare(parse_recipe([*text_recipe, "--dataset", file]))


def test_warns_about_overlap_of_published_splits(text_recipe, tmp_path, caplog):
    """Not refused, because published figures use these splits, and users cannot change them."""
    rows = [{**row, "image": None} for row in hub_rows(4)]
    for split in ("train", "validation", "test"):
        dataset = datasets.Dataset.from_list(rows, features=HUB_FEATURES)
        dataset.to_parquet(tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    with caplog.at_level(logging.WARNING, logger="mmcot"):
        run = prepare(parse_recipe([*text_recipe, "--dataset", str(tmp_path / "hub")]))
    assert has_all(caplog.text, "4 of 4 test problems are in train too")
    assert read_json(run.folder.splits)["overlap"]["train"] == {"val": 4, "test": 4}


def test_distinguishes_problems_by_their_pictures(tmp_path):
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        (tmp_path / f"{name}.png").write_bytes(png(color))
    asked = {"question": "Which color is it?", "choices": ["red", "blue"]}
    rows = [{**asked, "images": ["a.png"], "split": "train"}]
    rows += [{**asked, "images": ["c.png"], "split": "val"}, {**asked, "images": ["b.png"], "split": "test"}]
    file = jsonl(tmp_path, *rows)
    found = overlaps({split: load_problems(file, split) for split in SPLITS})
    assert found == {"train": {"val": [], "test": ["test-2"]}, "val": {"test": []}}


def test_splits_of_the_demonstration_share_no_problem():
    assert not any(
        ids
        for seconds in overlaps({split: load_problems("demo:9", split) for split in SPLITS}).values()
        for ids in seconds.values()
    )
    assert json.dumps(parse_split_files("demo:9")) == "null"
