"""Predictions over a split, as a user makes them: honest, complete, and in the order of the dataset."""

import json
import shutil

import pytest
import torch
from conftest import log_probability, run_script

from mmcot.pictures import read_pictures
from mmcot.predict import load_system, predict_stage
from mmcot.problems import load_problems, without_gold
from modeling_mmcot.pictures_mmcot import as_pictures


def predict(model, dataset, output, *options):
    run_script("-m", "mmcot.predict", model, "--dataset", dataset, "--split", "test", "--output", output, *options)
    return output


def changed_dataset(tiny_dataset, folder, change):
    """The tiny dataset with each row changed, its pictures beside it."""
    shutil.copytree(tiny_dataset.parent, folder)
    file = folder / tiny_dataset.name
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_gold_cannot_reach_a_prediction(tiny_run, tiny_dataset, tmp_path):
    """Byte-equal with answer, lecture and solution replaced by garbage, and equal to what training itself wrote."""

    def garbage(row):
        answer = (row["answer"] + 1) % len(row["choices"])
        return {**row, "answer": answer, "lecture": "zzz", "solution": "The answer is (A). zzz"}

    other = changed_dataset(tiny_dataset, tmp_path / "garbage", garbage)
    options = ("--decode_answer", "--batch_size", "16")
    expected = predict(tiny_run, tiny_dataset, tmp_path / "gold.json", *options).read_bytes()
    assert predict(tiny_run, other, tmp_path / "garbage.json", *options).read_bytes() == expected
    assert (tiny_run / "predictions/test.json").read_bytes() == expected


def test_problems_without_choices_or_with_one(tiny_run, tiny_dataset, tmp_path):
    def fewer(row):
        number = int(row["id"].split("-")[-1])
        choices = row["choices"] if number % 3 == 0 else row["choices"][: number % 3 - 1]
        return {**row, "choices": choices, "answer": -1}

    dataset = changed_dataset(tiny_dataset, tmp_path / "fewer", fewer)
    predictions = json.loads(predict(tiny_run, dataset, tmp_path / "fewer.json").read_text())
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    assert {min(len(row["choices"]), 2) for row in rows if row["split"] == "test"} == {0, 1, 2}
    for row in rows:
        if row["split"] == "test":
            columns = predictions[row["id"]]
            assert len(columns["scores"]) == len(row["choices"])
            assert (columns["answer"] == -1) == (row["choices"] == [])
            if len(row["choices"]) == 1:
                assert columns["answer"] == 0 and columns["scores"] == [1.0]


def plainly(model, processor, stage, problem):
    """What a stage writes for one problem, by transformers' own decoding and a pass of its own for each choice."""
    images = [as_pictures(read_pictures(problem))]
    inputs = processor([problem], stage=stage.name, images=images)
    if not stage.answers:
        return processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
    targets = [labels[labels != -100] for labels in processor.choice_labels([problem], stage.name)[0]]
    return torch.stack([log_probability(model, inputs, target) for target in targets]).softmax(dim=0)


def test_predictions_are_those_of_each_problem_alone(tiny_run, tiny_dataset):
    """Sorted by length, in batches, finished texts gone, choices packed, pictures kept: all of it changes nothing."""
    processor, models = load_system(str(tiny_run))
    predictions = json.loads((tiny_run / "predictions/test.json").read_text())
    for problem in without_gold(load_problems(str(tiny_dataset), "test")):
        columns = predictions[problem["id"]]
        rationale = plainly(models["rationale"], processor, processor.stages[0], problem)
        assert rationale == columns["rationale"]
        problem = {**problem, "rationale": rationale}
        scores = plainly(models["answer"], processor, processor.stages[1], problem)
        assert scores.tolist() == pytest.approx(columns["scores"], abs=1e-5)
        assert int(scores.argmax()) == columns["answer"]


def test_a_loaded_stage_writes_as_long_as_it_was_trained_to(tiny_run):
    """Not as long as the last stage, whose files lie at the root."""
    _, models = load_system(str(tiny_run))
    limits = {name: model.generation_config.max_new_tokens for name, model in models.items()}
    assert limits == {"rationale": 12, "answer": 16}


def test_two_processes_predict_what_one_does(tiny_run, tiny_dataset, tmp_path):
    """Whoever got which problems, every one of them is there, in the order of the dataset."""
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    options = ("--dataset", tiny_dataset, "--split", "test", "--batch_size", "4", "--decode_answer")
    command = (*launch, "-m", "mmcot.predict", tiny_run, *options, "--output", tmp_path / "two.json")
    run_script(*command)
    two = json.loads((tmp_path / "two.json").read_text())
    one = json.loads((tiny_run / "predictions/test.json").read_text())
    assert list(two) == list(one)
    for problem_id, columns in one.items():
        scores = two[problem_id].pop("scores")
        assert scores == pytest.approx(columns.pop("scores"), abs=1e-5)
        assert two[problem_id] == columns


def test_a_problem_that_an_earlier_stage_left_out_is_named(tiny_run, tiny_dataset):
    processor, models = load_system(str(tiny_run))
    problems = load_problems(str(tiny_dataset), "test")
    first = problems["id"][0]
    predictions = {problem_id: {"rationale": "so"} for problem_id in problems["id"] if problem_id != first}
    with pytest.raises(ValueError, match=f"1 problems have no 'rationale' from an earlier stage: {first}"):
        predict_stage(models["answer"], processor, processor.stages[1], problems, predictions)


def test_pictures_change_what_is_predicted(tiny_run, tiny_dataset, tmp_path):
    blind = changed_dataset(tiny_dataset, tmp_path / "blind", lambda row: {**row, "images": []})
    without = json.loads(predict(tiny_run, blind, tmp_path / "blind.json").read_text())
    with_pictures = json.loads((tiny_run / "predictions/test.json").read_text())
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    for row in rows:
        if row["split"] == "test":
            same = without[row["id"]]["scores"] == pytest.approx(with_pictures[row["id"]]["scores"], abs=1e-6)
            assert same == (row["images"] == []), row["id"]


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_what_is_no_model_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "predictions.json"
    result = run_script("-m", "mmcot.predict", tmp_path / name, "--dataset", "demo", "--output", output, check=False)
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert str(tmp_path / name) in result.stderr and "Traceback" not in result.stderr and not output.exists()
