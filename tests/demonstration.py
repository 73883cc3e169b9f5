"""Trains recipes of the demonstration and computes their figures, for the tests of these recipes."""

import json

from conftest import run_script

from mmcot.problems.demo import PICTURE_SKILLS


def select_picture_problems(problems):
    chosen = problems.filter(lambda row: row["skill"] in PICTURE_SKILLS)
    assert len(chosen) >= 1000
    return chosen


def train(recipe, folder):
    run_script("train.py", "--config", f"configs/{recipe}.yaml", "--output_dir", folder)
    predictions = json.loads((folder / "predictions/test.json").read_text())
    return predictions, json.loads((folder / "scores/test.json").read_text())


def accuracy_in_percent(problems, predictions):
    right = [predictions[row["id"]]["answer"] == row["answer"] for row in problems]
    return 100 * sum(right) / len(right)


def chance(problems):
    return sum(100 / len(row["choices"]) for row in problems) / len(problems)
