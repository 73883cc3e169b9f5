"""Scores by the classes of a user's own columns, in text, JSON, report and card; the splits that the card describes."""

import pytest
from problem_files import has_all, jsonl

from mmcot import evaluate, predict, train
from mmcot.evaluation.metrics import score_by
from mmcot.hub.export import export
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json, write_json
from mmcot.storage.run_folder import RunFolder
from mmcot.training.preparation import prepare

LEVELS = ("easy", "hard", "easy", None, "easy", "hard")


def rows():
    for number, level in enumerate(LEVELS):
        skill = "adding" if number < 4 else "multiplying"
        row = {"id": str(number), "question": f"What is {number}?", "choices": ["a", "b"], "answer": 0, "skill": skill}
        yield {**row, "level": level, "year": 2020 + number // 3, "split": "test"}


@pytest.fixture
def command(tmp_path):
    """Options that score six predictions. The answers to 0, 1, 2 and 4 are right."""
    write_json(tmp_path / "p.json", {str(n): int(n in (3, 5)) for n in range(6)})
    return [str(tmp_path / "p.json"), "--dataset", jsonl(tmp_path, *rows())]


def test_scores_classes_of_own_columns(command, tmp_path, capsys):
    evaluate.main([*command, "--by", "skill", "level", "year", "--report", str(tmp_path / "page")])
    scores = read_json(tmp_path / "p.scores.json")
    by = scores["by"]
    assert {name: (one["n"], one["accuracy"]) for name, one in by["skill"].items()} == {
        "adding": (4, 75.0),
        "multiplying": (2, 50.0),
    }
    assert {name: (one["n"], one["accuracy"]) for name, one in by["level"].items()} == {
        "(none)": (1, 0.0),
        "easy": (3, 100.0),
        "hard": (2, 50.0),
    }
    assert list(by["year"]) == ["2020", "2021"]
    low, high = by["skill"]["adding"]["interval"]
    assert low < 75 < high
    assert scores["evaluate_options"] == {"by": ["skill", "level", "year"]} and scores["predict_options"] == {}
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "by level n accuracy 95 %, from to" in printed and "easy 3 100.00 100.00 100.00" in printed
    assert printed[0] == "NO Avg", "classes without problems are not printed"
    page = (tmp_path / "page" / "index.html").read_text()
    assert has_all(page, "<th>by skill</th>", "<td>multiplying</td>", "<th>by level</th>")
    assert "<th>NAT</th>" not in page and "<th>NO</th>" in page


def test_error_names_missing_column(command):
    with pytest.raises(SystemExit, match="there is no column 'levels'; found id, question"):
        evaluate.main([*command, "--by", "levels"])
    with pytest.raises(
        SystemExit, match="--by answer: problems have no text column of that name; text columns: id, question"
    ):
        evaluate.main([*command, "--by", "answer"])
    with pytest.raises(SystemExit, match="demo has the columns of its release: there is no 'level'"):
        evaluate.main([command[0], "--dataset", "demo", "--by", "level"])


def test_missing_prediction_counts_as_wrong_in_its_class():
    problems = [{"id": "1", "choices": ["a"], "answer": 0, "skill": "x"}]
    found = score_by(problems, {"1": {"answer": -1, "missing": True}}, ["skill"])
    assert found["skill"]["x"] == {"n": 1, "accuracy": 0.0, "interval": None}


# The tests below read the card.


def question(number: int, **columns) -> dict:
    solution = f"It is {number % 2}."
    gold = {"choices": ["0", "1"], "answer": number % 2, "solution": solution}
    return {"question": f"What is {number} modulo 2?", **gold, "level": "low" if number < 30 else "high", **columns}


def one_step_options(text_recipe, *options) -> list[str]:
    return [*text_recipe, "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", *options]


def test_card_shows_scores_by_class_and_split_seed(text_recipe, tmp_path):
    file = jsonl(tmp_path, *map(question, range(60)))
    options = ["--dataset", file, "--split_seed", "7"]
    train.main(one_step_options(text_recipe, *options))
    run = tmp_path / "run"
    predictions = run / "predictions" / "test.json"
    assert read_json(predictions.with_name("test.meta.json"))["split_seed"] == 7
    evaluate.main([str(predictions), *options, "--by", "level"])
    export(RunFolder(run), prepare(parse_recipe(one_step_options(text_recipe, *options))).processor)
    card, scores = (run / "hub" / "README.md").read_text(), read_json(RunFolder(run).scores("test"))
    one = scores["by"]["level"]["high"]
    assert has_all(card, "| level | n | accuracy |", f"| high | {one['n']} | {one['accuracy']:.2f} |")
    sizes = read_json(run / "splits.json")["n"]
    assert has_all(
        card,
        f"{sizes['train']} train, {sizes['val']} validation, {sizes['test']} test",
        "the rows had no split: a hash of their content (`split_seed` 7) divides them 8:1:1",
        "0 validation and 0 test problems are training problems too",
        "--output predictions.json --split_seed 7 --decode_answer\n",
        "--output scores.json --by level --split_seed 7\n",
    )
    assert "were trained on" not in card
    again = tmp_path / "again.json"
    predict.main([str(run), *options, "--decode_answer", "--output", str(again)])
    assert read_json(again) == read_json(predictions)
    assert read_json(tmp_path / "again.meta.json")["split_seed"] == 7


def test_card_warns_about_test_problems_in_training_data(text_recipe, tmp_path):
    rows = [question(number, split="train") for number in range(20)]
    rows += [question(number, split="val", id=f"v{number}") for number in range(20, 24)]
    rows += [question(number, split="test", id=f"t{number}") for number in (3, 4, 5, 30)]
    file = jsonl(tmp_path, *rows)
    with pytest.raises(SystemExit, match="3 of 4 test problems are in train too"):
        train.main(one_step_options(text_recipe, "--dataset", file))
    train.main(one_step_options(text_recipe, "--dataset", file, "--allow_overlap", "true"))
    card = (tmp_path / "run" / "hub" / "README.md").read_text()
    assert has_all(
        card,
        "On the test split of `problems.jsonl` (4 problems)",
        "**3 of them were trained on** (same texts and pictures), so these are not scores on unseen problems.",
        "0 validation and 3 test problems are training problems too",
    )
    assert "split_seed" not in card
