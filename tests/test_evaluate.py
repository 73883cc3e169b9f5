"""The command `python -m mmcot.evaluate`: scores file, table, and errors that leave an earlier scores file alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmcot.evaluate import default_scores_file, evaluate, format_table, main
from mmcot.files import read_json, write_json
from mmcot.metrics import CLASSES

ROOT = Path(__file__).parents[1]


def a_problem(id_, **columns):
    return {
        "id": id_,
        "question": "Which colour is it?",
        "choices": ["red", "blue"],
        "context": "",
        "answer": 0,
        "lecture": "",
        "solution": "The ball is red.",
        "subject": "natural science",
        "grade": "grade2",
        "split": "test",
    } | columns


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(a_problem(id_)) + "\n" for id_ in ("1", "2")), encoding="utf-8")
    return str(path)


@pytest.fixture
def predictions():
    return {"1": {"answer": 0, "rationale": "The ball is red."}, "2": {"answer": 1, "rationale": "The ball is blue."}}


@pytest.fixture
def predictions_file(tmp_path, predictions):
    write_json(tmp_path / "run" / "predictions" / "test.json", predictions)
    return tmp_path / "run" / "predictions" / "test.json"


def run(*arguments):
    command = [sys.executable, "-m", "mmcot.evaluate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_prints_the_table_and_writes_the_scores_file(dataset, predictions_file, tmp_path):
    done = run(predictions_file, "--dataset", dataset, "--split", "test", "--output", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    scores = read_json(tmp_path / "scores.json")
    assert scores == evaluate(predictions_file, dataset, "test")
    assert (scores["accuracy"]["NAT"], scores["accuracy"]["IMG"], scores["n"]) == (50, None, 2)
    table = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert table[0] == "NAT SOC LAN TXT IMG NO G1-6 G7-12 Avg"
    assert table[1] == "problems 2 0 0 0 0 2 2 0 2"
    assert table[2] == "accuracy 50.00 - - - - 50.00 50.00 - 50.00"
    assert table[-1] == f"scores: {tmp_path / 'scores.json'}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["problems.jsonl", "run", "scores.json"]


def test_the_command_fails_in_one_line_and_leaves_the_earlier_scores_file_alone(dataset, predictions_file, tmp_path):
    scores_file = tmp_path / "scores.json"
    scores_file.write_text("earlier", encoding="utf-8")
    predictions_file.write_text('{\n"1": {"answer" 0}\n}', encoding="utf-8")
    done = run(predictions_file, "--dataset", dataset, "--split", "test", "--output", scores_file)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {predictions_file}, line 2: not valid JSON (Expecting ':' delimiter)"]
    assert scores_file.read_text(encoding="utf-8") == "earlier"


def test_scores_of_a_run_lie_in_the_run(dataset, predictions_file, capsys):
    main([str(predictions_file), "--dataset", dataset])
    scores_file = predictions_file.parents[1] / "scores" / "test.json"
    assert read_json(scores_file)["n"] == 2
    assert capsys.readouterr().out.endswith(f"scores: {scores_file}\n")


def test_scores_of_a_lone_predictions_file_lie_beside_it(tmp_path):
    assert default_scores_file(tmp_path / "mine.json") == tmp_path / "mine.scores.json"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such predictions file"),
        ("[1, 2]", "expected a JSON object, found list"),
        ('{"1": 0, "2": 1}', "prediction 1 is 0, expected an object"),
        ('{"1": {"answer": 2}, "2": {"answer": 1}}', "prediction 1: 'answer' is 2, expected an integer from 0 to 1"),
        ('{"1": {"answer": 0}, "3": {"answer": 1}}', r"1 \(2\) without a prediction, 1 \(3\) without a problem"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bad_predictions_are_refused_by_name(dataset, predictions_file, content, found):
    predictions_file.unlink()
    if content is not None:
        predictions_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=found):
        evaluate(predictions_file, dataset, "test")


def test_problems_of_unknown_answer_are_refused(tmp_path, predictions_file):
    rows = [a_problem("1"), a_problem("2", answer=-1)]
    (tmp_path / "unknown.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match="answer"):
        evaluate(predictions_file, str(tmp_path / "unknown.jsonl"), "test")


def test_the_predictions_file_is_never_written_over(dataset, predictions_file, predictions):
    with pytest.raises(SystemExit, match=r"error: .* is the predictions file itself"):
        main([str(predictions_file), "--dataset", dataset, "--output", str(predictions_file)])
    assert read_json(predictions_file) == predictions


def test_the_table_has_a_second_row_for_decoded_answers():
    by_class = dict.fromkeys(CLASSES, 75.0)
    scores = {"accuracy": by_class, "rationale": {"bleu1": 30.5, "bleu4": 9.44, "rougeL": None}, "n": 4}
    assert format_table(scores).splitlines()[1:] == [
        "accuracy        " + "   75.00" * 9,
        "rationale         BLEU-1 30.50   BLEU-4 9.44   ROUGE-L -",
    ]
    with_decoded = format_table(scores | {"decoded_accuracy": by_class | {"NAT": 50.0}}).splitlines()
    assert with_decoded[2] == "decoded accuracy" + "   50.00" + "   75.00" * 8


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"text": "Größe"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "text": "Größe"\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"text": "new", "bad": object()})

    def full_disk(path, text, **_):
        path.write_bytes(text[:3].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"text": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"text": "Größe"}
