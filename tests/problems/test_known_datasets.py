"""Tests of the built-in dataset formats: the demonstration, ScienceQA in its authors' format, A-OKVQA.

test_demo.py tests the content of the demonstration problems.
"""

import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY_RECIPE, run_script, shared
from PIL import Image
from problem_files import ROW, check_pictures, error_of, has_all, png, scienceqa

from mmcot.evaluate import main as evaluate
from mmcot.evaluation.metrics import rationale_scores
from mmcot.problems import demo
from mmcot.problems.schema import FEATURES, require_answers, with_all_columns, without_gold
from mmcot.problems.sources import load_problems
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json
from mmcot.training.preparation import prepare
from mmcot.training.stage import training_problems

# The original ScienceQA folder.


def test_loads_the_real_scienceqa_folder(caplog):
    with caplog.at_level(logging.INFO, logger="mmcot.problems"):
        problems = load_problems(str(shared("scienceqa")), "test")
    assert problems.features == FEATURES
    assert len(problems) == 361
    assert has_all(caplog.text, "3880 of 4241 test problems", "problems.json")
    assert sum(map(bool, problems["images"])) == 167
    assert all(row["caption"] for row in problems if row["images"])
    pictures = [picture for images in problems["images"] for picture in images]
    assert all(picture["bytes"] is None for picture in pictures)
    names = [[Path(picture["path"]).name for picture in images] for images in problems["images"] if images]
    assert all(files == ["image.png", *(f"choice_{n}.png" for n in range(len(files) - 1))] for files in names)
    assert max(map(len, names)) > 1
    first = load_problems(str(shared("scienceqa")), "test", max_images=1)
    assert {Path(picture["path"]).name for images in first["images"] for picture in images} == {"image.png"}
    check_pictures(problems)
    require_answers(problems)


def test_converts_a_scienceqa_problem_to_the_schema(tmp_path):
    folder = scienceqa(tmp_path, lecture="Colors.", solution="It is red.")
    (tmp_path / "captions.json").write_text(json.dumps({"model": "x", "captions": {"1": "A red square."}}))
    first, second = load_problems(folder, "test")
    assert first == {
        "id": "1",
        "question": "What is it?",
        "choices": ["a", "b"],
        "context": "Look.",
        "images": [{"bytes": None, "path": f"{folder}/images/test/1/image.png"}],
        "caption": "A red square.",
        "answer": 0,
        "lecture": "Colors.",
        "solution": "It is red.",
        "rationales": [],
        "direct_answers": [],
        "observation": "",
        "gold_passages": [],
        "subject": "natural science",
        "grade": "grade3",
        "topic": "",
        "category": "",
        "skill": "",
        "split": "test",
    }
    assert (second["id"], second["images"], second["caption"], second["lecture"]) == ("2", [], "", "")


def test_accepts_missing_captions_and_an_empty_split(tmp_path):
    folder = scienceqa(tmp_path)
    assert load_problems(folder, "test")["caption"] == ["", ""]
    assert len(load_problems(folder, "train")) == 0


@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json"])
def test_refuses_a_folder_without_its_json(tmp_path, name):
    folder = scienceqa(tmp_path)
    (tmp_path / name).unlink()
    assert has_all(error_of(load_problems, folder, "test"), folder, f"has no {name}", "ScienceQA folder")


@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json", "captions.json"])
def test_names_file_and_line_of_malformed_json(tmp_path, name):
    folder = scienceqa(tmp_path)
    (tmp_path / name).write_text('{\n"1": {},\n"2": oops\n}')
    assert has_all(error_of(load_problems, folder, "test"), f"{tmp_path / name}, line 3", "JSON")


@pytest.mark.parametrize(
    "name, data, found",
    [
        ("problems.json", {"1": "text"}, "'1' is 'text'; expected a dict"),
        ("pid_splits.json", {"train": []}, "'test' is None; expected a list"),
        ("captions.json", {"1": "A red square."}, "'captions' is None; expected a dict"),
    ],
)
def test_refuses_json_of_another_form(tmp_path, name, data, found):
    folder = scienceqa(tmp_path)
    (tmp_path / name).write_text(json.dumps(data))
    assert has_all(error_of(load_problems, folder, "test"), tmp_path / name, found)


@pytest.mark.parametrize(
    "fields, found",
    [
        ({"answer": 2}, ["answer is 2", "index from 0 to 1"]),
        ({"split": "minitest"}, ["split is 'minitest'", "train, val, test"]),
        ({"choices": "a, b"}, ["choices is 'a, b'", "list of texts"]),
        ({"question": ""}, ["question is ''"]),
    ],
)
def test_names_a_bad_scienceqa_problem(tmp_path, fields, found):
    folder = scienceqa(tmp_path, **fields)
    assert has_all(error_of(load_problems, folder, "test"), f"{folder}, problem 1:", *found)


def test_refuses_an_id_that_occurs_twice_in_a_split(tmp_path):
    folder = scienceqa(tmp_path, splits={"test": ["1", "2", "1"]})
    assert has_all(error_of(load_problems, folder, "test"), folder, "problem 1", "twice")


def test_loads_a_scienceqa_problem_with_pictures_of_choices_only(tmp_path):
    """The original code uses the first of them, `choice_0.png`."""
    folder = scienceqa(tmp_path)
    for number in range(2):
        (tmp_path / "images/test/2").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/test/2/choice_{number}.png").write_bytes(png())
    names = [Path(picture["path"]).name for picture in load_problems(folder, "test")[1]["images"]]
    assert names == ["choice_0.png", "choice_1.png"]
    assert [Path(p["path"]).name for p in load_problems(folder, "test", max_images=1)[1]["images"]] == ["choice_0.png"]


def test_loads_a_scienceqa_problem_without_choices_unless_answers_are_required(tmp_path):
    problems = load_problems(scienceqa(tmp_path, choices=[], answer=-1), "test")
    assert problems[0]["choices"] == []
    assert has_all(error_of(require_answers, problems), "problem 1", "choices is empty")


# The demonstration.


def test_loads_the_rows_that_demo_generates():
    problems = load_problems("demo", "val")
    assert problems.features == FEATURES
    assert problems.to_list() == list(map(with_all_columns, demo.generate("val")))
    assert problems.cache_files, "the drawn problems are cached on disk"
    check_pictures(problems)
    require_answers(problems)


def test_does_not_load_a_changed_demo_from_the_cache(tmp_path):
    """In a copy of the package whose demo.py changes between two processes."""
    shutil.copytree(REPOSITORY / "mmcot", tmp_path / "mmcot", ignore=shutil.ignore_patterns("__pycache__"))
    show = "from mmcot.problems.sources import load_problems; print(len(load_problems('demo', 'val')))"
    for rows in (1, 2):
        row = {**ROW, "split": "val", "images": [], "lecture": "", "solution": "", "context": "", "caption": ""}
        row |= dict.fromkeys(("subject", "grade", "topic", "category", "skill"), "")
        row |= {"rationales": [], "direct_answers": []}
        code = f"def generate(split, difficulty):\n    for n in range({rows}):\n"
        code += f"        yield {{**{row!r}, 'id': str(n)}}\n"
        (tmp_path / "mmcot" / "problems" / "demo.py").write_text(code)
        environment = {"HF_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(
            [sys.executable, "-c", show], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == str(rows)


# A-OKVQA.


SIZES = {"train": 6, "val": 3, "test": 4}


def entry(split: str, number: int) -> dict:
    """An entry as in the release (allenai/aokvqa, README)."""
    drawn = random.Random(f"{split}{number}")
    question = {
        "split": split,
        "image_id": 299207 + number,
        "question_id": f"22MexNkBPpdZGX6sxb{split}{number}",
        "question": f"What is the man by the bags awaiting number {number}?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
    }
    if split == "test":
        return {**question, "difficult_direct_answer": False}
    rationales = [f"A {word} would not be on the street, so it is {number}." for word in ("train", "bag", "cab")]
    return {
        **question,
        "correct_choice_idx": drawn.randrange(4),
        "direct_answers": ["ride", "ride", "bus", "taxi", "travelling", "traffic", "taxi", "cab", "cab", "his ride"],
        "difficult_direct_answer": False,
        "rationales": rationales,
    }


@pytest.fixture(scope="module")
def aokvqa(tmp_path_factory):
    """The folder of the release, with COCO's folder beside it."""
    root = tmp_path_factory.mktemp("datasets")
    (root / "aokvqa").mkdir()
    for split, size in SIZES.items():
        entries = [entry(split, number) for number in range(size)]
        (root / f"aokvqa/aokvqa_v1p0_{split}.json").write_text(json.dumps(entries))
        (root / f"coco/{split}2017").mkdir(parents=True)
        for number in range(size):
            color = (40 * number, 120, 200)
            Image.new("RGB", (64, 48), color).save(root / f"coco/{split}2017/{299207 + number:012}.jpg")
    return root / "aokvqa"


@pytest.fixture(scope="module")
def aokvqa_run(aokvqa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aokvqa_run")
    options = ["--config", str(TINY_RECIPE), "--dataset", str(aokvqa), "--output_dir", str(folder / "run")]
    options += ["--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "no"]
    printed = run_script("train.py", *options).stdout
    return folder / "run", options, printed


def test_loads_the_release_of_aokvqa(aokvqa):
    rows = {split: load_problems(str(aokvqa), split) for split in SIZES}
    assert {split: len(problems) for split, problems in rows.items()} == SIZES
    row, expected = rows["train"][2], entry("train", 2)
    for column, name in (("id", "question_id"), ("answer", "correct_choice_idx")):
        assert row[column] == expected[name]
    for name in ("question", "choices", "direct_answers", "rationales"):
        assert row[name] == expected[name]
    assert row["solution"] == expected["rationales"][0]
    with Image.open(row["images"][0]["path"]) as picture:
        assert picture.size == (64, 48) and row["images"][0]["path"].endswith("train2017/000000299209.jpg")
    assert set(rows["test"]["answer"]) == {-1} and set(rows["test"]["solution"]) == {""}


def test_removes_gold_of_aokvqa_for_prediction(aokvqa):
    row = without_gold(load_problems(str(aokvqa), "val"))[0]
    gold = entry("val", 0)
    assert all(text not in json.dumps(row) for text in [*gold["rationales"], "his ride"])


@pytest.mark.slow
def test_trains_on_every_rationale(aokvqa_run):
    """The rationale stage learns each as a target, and the answer stage reads each in a source."""
    _, options, _ = aokvqa_run
    prepared = prepare(parse_recipe(options))
    every = sorted(f"Solution: {text}" for number in range(6) for text in entry("train", number)["rationales"])
    rationale, answer = prepared.stages
    rows = training_problems(prepared, rationale, "train")
    assert sorted(rationale.render_target(row) for row in rows.remove_columns("images")) == every
    rows = training_problems(prepared, answer, "train")
    assert sorted(rows["rationale"]) == every
    for row in rows:
        assert row["rationale"].removeprefix("Solution: ") in row["rationales"]


@pytest.mark.slow
def test_run_on_aokvqa_scores_val_and_predicts_test(aokvqa, aokvqa_run, tmp_path):
    run, _, printed = aokvqa_run
    assert "One val problem, answered" in printed
    assert not (run / "scores/test.json").exists()
    assert "On the validation split of `aokvqa` (3 problems)" in (run / "hub/README.md").read_text()

    predictions = read_json(run / "predictions/val.json")
    right = [
        predictions[entry("val", n)["question_id"]]["answer"] == entry("val", n)["correct_choice_idx"] for n in range(3)
    ]
    scores = read_json(run / "scores/val.json")
    assert scores["accuracy"]["Avg"] == pytest.approx(100 * sum(right) / 3)  # eval_predictions.py, multiple_choice
    assert scores["accuracy"]["NAT"] is None

    submission = tmp_path / "predictions_test.json"
    command = [str(run / "predictions/test.json"), "--dataset", str(aokvqa), "--split", "test"]
    evaluate([*command, "--submission", str(submission)])
    answers = read_json(run / "predictions/test.json")
    assert read_json(submission) == {
        problem_id: {"multiple_choice": entry("test", 0)["choices"][columns["answer"]]}
        for problem_id, columns in answers.items()
    }
    with pytest.raises(SystemExit, match="answer is -1; training and scoring need"):
        evaluate(command)


def test_scores_against_each_gold_rationale():
    problem = {"id": "1", "solution": "a train", "rationales": ["a train", "no man waits for bags here", "it is a cab"]}
    alone = [
        rationale_scores([{**problem, "rationales": [], "solution": text}], {"1": "it is a big cab"})
        for text in problem["rationales"]
    ]
    together = rationale_scores([problem], {"1": "it is a big cab"})
    assert together["rougeL"] == max(scores["rougeL"] for scores in alone) > 0
    assert together["bleu1"] == pytest.approx(100 * 4 / 5)  # four of five words: no reference contains "big"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda root: (root / "coco/val2017/000000299208.jpg").unlink(), "val1: picture .*299208.jpg is missing"),
        (lambda root: (root / "aokvqa/aokvqa_v1p0_val.json").unlink(), "has no aokvqa_v1p0_val.json"),
        (lambda root: (root / "aokvqa/aokvqa_v1p0_val.json").write_text("{}"), "expected a JSON list, found dict"),
        (
            lambda root: (root / "aokvqa/aokvqa_v1p0_val.json").write_text('[{"question_id": "a"}]'),
            "entry 1: .* has no image_id of type int",
        ),
    ],
)
def test_names_a_defect_of_the_aokvqa_release(aokvqa, tmp_path, change, error):
    shutil.copytree(aokvqa.parent, tmp_path / "datasets")
    change(tmp_path / "datasets")
    with pytest.raises(ValueError, match=error):
        load_problems(str(tmp_path / "datasets/aokvqa"), "val")
