"""The demonstration, trained as by `make demo`: answers come from pictures and rationales. Takes 15 minutes or more."""

import json
import random

import pytest
from analysis.test_report import drive
from conftest import run_script
from demonstration import accuracy_in_percent, chance, select_picture_problems, train
from test_predict import predict_alone

from mmcot.evaluate import main as evaluate
from mmcot.prediction.predictor import PredictOptions, predict_stage
from mmcot.prediction.system import load_system
from mmcot.problems.demo import PICTURE_SKILLS, observation
from mmcot.problems.schema import without_gold
from mmcot.problems.sources import load_problems

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def problems():
    return load_problems("demo", "test")


@pytest.fixture(scope="module")
def picture_problems(problems):
    return select_picture_problems(problems)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    return folder, *train("demo/two_stages", folder)


def select_skill(problems, skill):
    return [row for row in problems if row["skill"] == skill]


def test_both_stages_answer_held_out_problems(demo):
    _, _, scores = demo
    assert scores["accuracy"]["IMG"] >= 95 and scores["accuracy"]["Avg"] >= 95


def test_predictions_match_predicting_each_problem_alone(demo, problems):
    """Compares every tenth problem with transformers' own decoding and a separate forward pass for each choice."""
    folder, predictions, _ = demo
    processor, models = load_system(str(folder))
    for problem in without_gold(problems.select(range(0, len(problems), 10))):
        columns = predictions[problem["id"]]
        rationale = predict_alone(models["rationale"], processor, processor.stages[0], problem)
        assert rationale == columns["rationale"]
        scores = predict_alone(models["answer"], processor, processor.stages[1], {**problem, "rationale": rationale})
        assert int(scores.argmax()) == columns["answer"]
        assert scores.tolist() == pytest.approx(columns["scores"], abs=1e-4)


def test_rationales_describe_the_picture(demo, picture_problems):
    _, predictions, _ = demo
    named = [
        observation(predictions[row["id"]]["rationale"]) == observation("Solution: " + row["solution"])
        for row in picture_problems
    ]
    assert sum(named) >= 0.9 * len(named)


def test_answers_depend_on_the_rationale(demo, picture_problems):
    """With the rationale of another problem of the same skill, accuracy is at chance."""
    folder, predictions, _ = demo
    swapped = {}
    for skill in PICTURE_SKILLS:
        ids = [row["id"] for row in select_skill(picture_problems, skill)]
        random.Random(skill).shuffle(ids)
        for problem_id, other in zip(ids, ids[1:] + ids[:1], strict=True):
            swapped[problem_id] = {"rationale": predictions[other]["rationale"]}
    processor, models = load_system(str(folder))
    predict_stage(
        models["answer"],
        processor,
        processor.stage("answer"),
        picture_problems,
        swapped,
        PredictOptions(batch_size=100),
    )
    assert accuracy_in_percent(picture_problems, swapped) <= chance(picture_problems) + 10
    for skill in PICTURE_SKILLS:
        rows = select_skill(picture_problems, skill)
        assert accuracy_in_percent(rows, swapped) <= chance(rows) + 12, skill


def test_predictions_pass_the_leak_check_and_the_report_works(demo, problems, tmp_path):
    folder, predictions, _ = demo
    run_script("-m", "mmcot.predict", folder, "--dataset", "demo", "--leak_check", "--limit", "200")
    wrong = [row["id"] for row in problems if predictions[row["id"]]["answer"] != row["answer"]]
    some = list(dict.fromkeys([*wrong, *problems["id"][:100]]))
    file, report = tmp_path / "some.json", tmp_path / "report"
    file.write_text(json.dumps({problem_id: predictions[problem_id] for problem_id in some}))
    evaluate([str(file), "--dataset", "demo", "--report", str(report), "--attention", str(folder), "--ids", *some])
    drive(report, tmp_path)
