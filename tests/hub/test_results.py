"""Evaluation results in the Hub's formats, and tables of several scores files."""

import csv
import json
import shutil

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from mmcot.evaluate import main
from mmcot.evaluation.metrics import score
from mmcot.hub.results import eval_entries, eval_results, write_eval_results
from mmcot.storage.files import read_json, write_json


def scores(right, count=4, **columns):
    rows = [
        {"id": str(number), "answer": 0, "choices": ["a", "b"], "context": "", "images": [], "solution": "So it is."}
        | {"subject": "natural science", "grade": "grade2"}
        | columns
        for number in range(count)
    ]
    predictions = {
        row["id"]: {"answer": int(number >= right), "decoded_answer": -1, "rationale": "So it is."}
        for number, row in enumerate(rows)
    }
    problems = {"texts": str(count), "pictures": None}
    return score(rows, predictions) | {"problems_digest": problems}


def test_eval_results_file_parses_with_huggingface_hub(tmp_path):
    entries = eval_entries(scores(3), "derek-thomas/ScienceQA", "test, 4 problems")
    file = tmp_path / ".eval_results" / "scienceqa.yaml"
    write_eval_results(file, entries)
    data = yaml.safe_load(file.read_text())
    assert data[0] == {
        "dataset": {"id": "derek-thomas/ScienceQA", "task_id": "default"},
        "value": 75.0,
        "notes": "test, 4 problems",
    }
    assert parse_eval_result_entries(data) == entries
    assert entries[1] == EvalResultEntry("derek-thomas/ScienceQA", "decoded_answer", 0.0, notes="test, 4 problems")


def test_model_index_parses_with_huggingface_hub():
    results = eval_results(scores(3), "derek-thomas/ScienceQA", "test")
    index = ModelCardData(model_name="mine", eval_results=results).to_dict()["model-index"]
    name, parsed = model_index_to_eval_results(index)
    assert name == "mine"
    found = {result.metric_name: result.metric_value for result in parsed}
    assert found["accuracy, natural science"] == found["accuracy, Avg"] == 75 and found["rougeL"] == 100
    assert "accuracy, social science" not in found
    assert {result.dataset_split for result in parsed} == {"test"}


@pytest.fixture
def files(tmp_path):
    for name, right in (("worse", 1), ("better", 3)):
        write_json(tmp_path / f"{name}.json", scores(right))
    return [str(tmp_path / "worse.json"), str(tmp_path / "better.json")]


@pytest.mark.parametrize("form", ["text", "markdown", "csv"])
def test_leaderboard_lists_best_system_first(files, capsys, form):
    main(["--leaderboard", *files, "--format", form])
    lines = capsys.readouterr().out.splitlines()
    rows = {
        "text": lambda: [line.split() for line in lines],
        "markdown": lambda: [line.strip("| ").split(" | ") for line in lines if "---" not in line],
        "csv": lambda: list(csv.reader(lines)),
    }[form]()
    assert rows[0][:3] == ["system", "n", "NAT"]
    assert [row[0] for row in rows[1:]] == [files[1], files[0]]
    assert rows[1][1:3] == ["4", "75.00"] and "SOC" not in rows[0]


def test_leaderboard_finds_scores_of_run_and_cached_repository(files, tmp_path, capsys, monkeypatch):
    (tmp_path / "run" / "scores").mkdir(parents=True)
    shutil.copy(files[0], tmp_path / "run" / "scores" / "test.json")
    commit = tmp_path / "cache" / "models--user--model" / "snapshots" / ("a" * 40)
    commit.mkdir(parents=True)
    shutil.copy(files[1], commit / "scores.json")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    main(["--leaderboard", str(tmp_path / "run"), "user/model"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("user/model") and lines[2].startswith(str(tmp_path / "run"))


def test_leaderboard_refuses_scores_of_other_problems(files, tmp_path):
    write_json(tmp_path / "other.json", scores(3, count=5))
    with pytest.raises(SystemExit, match=r"covers other problems \(5\) than .*worse.json \(4\)"):
        main(["--leaderboard", *files, str(tmp_path / "other.json")])


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"accuracy": 3}', "not a scores file"), (None, "no such file or folder; expected a scores file")],
)
def test_leaderboard_names_invalid_scores_file(files, tmp_path, content, message):
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match=message):
        main(["--leaderboard", *files, str(file)])


def test_scores_are_plain_json(files):
    assert json.loads(json.dumps(read_json(files[0]))) == scores(1)
