"""The metric as users of `evaluate` know it: loaded from its folder, offline, with the figures of `mmcot.evaluate`."""

import evaluate
import pytest
from conftest import REPOSITORY, shared

from mmcot.evaluate import main
from mmcot.files import read_json, write_json
from mmcot.problems import load_problems

FOLDER = str(REPOSITORY / "metrics" / "mmcot_scienceqa")


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(FOLDER, cache_dir=str(tmp_path_factory.mktemp("metrics")))


def test_gpt3s_published_answers_give_its_published_figures(metric, tmp_path):
    """Through the command and through `evaluate.load`: the original's own numbers, and the same as each other."""
    published = read_json(shared("fixtures/reference_text/gpt3_test361.json"))
    dataset = str(shared("scienceqa"))
    write_json(tmp_path / "gpt3.json", published["predictions"])
    main([str(tmp_path / "gpt3.json"), "--dataset", dataset])
    by_command = read_json(tmp_path / "gpt3.scores.json")
    problems = load_problems(dataset, "test", pictures=False)
    predictions = [{"id": name, **columns} for name, columns in published["predictions"].items()]
    loaded = metric.compute(predictions=predictions, references=list(problems))
    assert loaded == {name: by_command[name] for name in loaded} and {"accuracy", "calibration"} <= loaded.keys()
    for name, figures in published["accuracy"].items():
        assert by_command["accuracy"][name] == pytest.approx(figures["accuracy"], abs=1e-3)
        assert by_command["class_n"][name] == figures["n"]
        low, high = by_command["intervals"]["accuracy"][name]
        assert low < figures["accuracy"] < high
    for name in ("bleu1", "bleu4", "rougeL"):
        assert by_command["rationale"][name] == pytest.approx(published["rationale"][name], abs=1e-6)


def row(number, **columns):
    columns |= {"id": str(number), "choices": ["a", "b"], "answer": 0}
    return {"subject": "natural science", "grade": "grade2"} | columns


def test_rows_of_the_hubs_dataset_are_references_too(metric):
    references = [row(0, image=object, hint="", solution="So."), row(1, image=None, hint="Look.", solution="So.")]
    references[0]["image"] = {"bytes": b"PNG", "path": None}
    predictions = [{"id": "0", "answer": 0, "scores": [0.75, 0.25]}, {"id": "1", "answer": 1, "scores": [0.5, 0.5]}]
    found = metric.compute(predictions=predictions, references=references)
    assert (found["accuracy"]["IMG"], found["accuracy"]["TXT"], found["accuracy"]["Avg"]) == (100, 0, 50)
    assert found["calibration"]["brier"] == pytest.approx((2 * 0.25**2 + 0.5) / 2)


def test_an_answer_that_was_generated_stands_beside_the_scored_one(metric):
    predictions = [{"id": "0", "answer": 0, "decoded_answer": -1}, {"id": "1", "answer": 0, "decoded_answer": 0}]
    found = metric.compute(predictions=predictions, references=[row(0), row(1)])
    assert (found["accuracy"]["Avg"], found["decoded_accuracy"]["Avg"]) == (100, 50)


def test_an_id_that_stands_there_twice_is_refused(metric):
    with pytest.raises(ValueError, match="1 of 2 predictions are of an id that stands there already"):
        metric.compute(predictions=[{"id": "0", "answer": 0}, {"id": "0", "answer": 1}], references=[row(0), row(1)])
