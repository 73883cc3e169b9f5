"""The demonstration trained without pictures, in ten minutes.

This is a separate file because pytest-xdist then runs it in parallel with `test_demo_run.py`.
"""

import pytest
from demonstration import accuracy_in_percent, chance, select_picture_problems, train

from mmcot.problems.sources import load_problems


@pytest.mark.slow
def test_picture_skills_are_at_chance_without_pictures(tmp_path):
    problems = select_picture_problems(load_problems("demo", "test"))
    predictions, _ = train("demo/no_vision", tmp_path / "demo_no_vision")
    assert accuracy_in_percent(problems, predictions) == pytest.approx(chance(problems), abs=5)
