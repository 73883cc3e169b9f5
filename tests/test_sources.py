"""Sources of problems beside ScienceQA's folder: A-OKVQA as it is released, and datasets of the Hub."""

import json
import random
import shutil

import datasets
import pytest
import yaml
from conftest import HUB_FEATURES, TINY_RECIPE, hub_rows, run_script
from PIL import Image

from mmcot.evaluate import main as evaluate
from mmcot.files import read_json
from mmcot.metrics import rationale_scores
from mmcot.preparation import prepare
from mmcot.problems import FEATURES, without_gold
from mmcot.recipes import parse_recipe
from mmcot.sources import load_problems
from mmcot.training import main as train
from mmcot.training import training_problems

SIZES = {"train": 6, "val": 3, "test": 4}


def entry(split: str, number: int) -> dict:
    """As in the release (allenai/aokvqa, README)."""
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
    """The release's folder, and COCO's beside it."""
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


def test_aokvqa_s_release_is_read_as_it_is(aokvqa):
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


def test_no_gold_of_aokvqa_is_left_for_prediction(aokvqa):
    row = without_gold(load_problems(str(aokvqa), "val"))[0]
    gold = entry("val", 0)
    assert all(text not in json.dumps(row) for text in [*gold["rationales"], "his ride"])


def test_every_rationale_is_trained_on(aokvqa_run):
    """By the rationale stage as a target, by the answer stage as what it reads."""
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


def test_a_run_on_aokvqa_is_judged_on_val_and_predicts_test(aokvqa, aokvqa_run, tmp_path):
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


def test_each_gold_rationale_is_a_reference():
    problem = {"id": "1", "solution": "a train", "rationales": ["a train", "no man waits for bags here", "it is a cab"]}
    alone = [
        rationale_scores([{**problem, "rationales": [], "solution": text}], {"1": "it is a big cab"})
        for text in problem["rationales"]
    ]
    together = rationale_scores([problem], {"1": "it is a big cab"})
    assert together["rougeL"] == max(scores["rougeL"] for scores in alone) > 0
    assert together["bleu1"] == pytest.approx(100 * 4 / 5)  # of the five words "big" is in none


@pytest.mark.parametrize(
    ("change", "said"),
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
def test_what_is_wrong_with_a_release_is_named(aokvqa, tmp_path, change, said):
    shutil.copytree(aokvqa.parent, tmp_path / "datasets")
    change(tmp_path / "datasets")
    with pytest.raises(ValueError, match=said):
        load_problems(str(tmp_path / "datasets/aokvqa"), "val")


# A dataset of the Hub.


def test_a_dataset_of_the_hub_is_brought_into_the_schema(hub_dataset):
    problems = load_problems(str(hub_dataset), "val")
    assert problems.features == FEATURES and problems["id"] == [f"val-{row}" for row in range(5)]
    row, expected = problems[3], hub_rows(4)[3]
    assert row["context"] == "hint 3" and row["images"][0]["bytes"] == expected["image"]["bytes"]
    for name in ("question", "choices", "answer", "grade", "subject", "solution"):
        assert row[name] == expected[name]
    assert problems[2]["images"] == []


@pytest.mark.slow
def test_a_run_on_a_dataset_of_the_hub_ends(hub_dataset, tmp_path):
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "dataset": str(hub_dataset), "max_steps": 2}))
    train(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")])
    assert read_json(tmp_path / "run/scores/test.json")["n"] == 5


def test_a_dataset_that_is_not_there_or_has_other_columns_is_named(hub_dataset, tmp_path):
    with pytest.raises(
        ValueError, match="dataset is 'nobody/nothing'; expected .* As a dataset of the Hub it cannot be loaded"
    ):
        load_problems("nobody/nothing", "val")
    dataset = datasets.Dataset.from_list(hub_rows(2), features=HUB_FEATURES).rename_column("hint", "hints")
    dataset.to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="unknown column 'hints' .did you mean 'hint'"):
        load_problems(str(tmp_path), "test")
