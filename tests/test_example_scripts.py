"""The scripts and the notebook of `examples/`: each runs, offline, in a process of its own."""

import json

import pytest
from conftest import REPOSITORY, run_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run that `examples/fine_tune.py` leaves."""
    run = tmp_path_factory.mktemp("examples") / "own_data"
    result = run_script("-m", "examples.fine_tune", "--output_dir", run, HF_HUB_OFFLINE="1")
    assert f"Run folder: {run}" in result.stdout
    return run


def test_a_picture_is_answered(trained):
    result = run_script("-m", "examples.answer", trained / "hub", HF_HUB_OFFLINE="1")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("rationale:") and [line.split()[-1] for line in lines[2:]] == ["red", "green", "black"]


def test_a_question_of_ones_own_is_answered(trained):
    picture = REPOSITORY / "space" / "examples" / "map.png"
    result = run_script("-m", "examples.answer", trained / "hub", picture, "Which?", "one", "two", HF_HUB_OFFLINE="1")
    assert [line.split()[-1] for line in result.stdout.splitlines()[2:]] == ["one", "two"]


def test_a_model_is_looked_into(trained, tmp_path):
    result = run_script("-m", "examples.look_inside", trained / "hub", tmp_path / "maps.png", HF_HUB_OFFLINE="1")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert "without the picture:" in result.stdout and "another rationale:" in result.stdout


def test_the_notebooks_cells_run(tmp_path):
    notebook = json.loads((REPOSITORY / "examples" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(cells))
    result = run_script("cells.py", cwd=tmp_path, HF_HUB_OFFLINE="1", PYTHONPATH=str(REPOSITORY))
    assert "maps of shape" in result.stdout.splitlines()[-1]
