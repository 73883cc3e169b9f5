"""Predictions over a split, as a user makes them: honest, complete, and in the order of the dataset."""

import json
import shutil

import pytest
from conftest import run_script


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
