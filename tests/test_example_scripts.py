"""Runs each script and the notebook of `examples/` offline, in a process of its own."""

import json

import pytest
from conftest import REPOSITORY, run_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder that `examples/fine_tune.py` writes."""
    run = tmp_path_factory.mktemp("examples") / "own_data"
    result = run_script("-m", "examples.fine_tune", "--output_dir", run, HF_HUB_OFFLINE="1")
    assert f"Run folder: {run}" in result.stdout
    return run


def test_answers_default_picture(trained):
    result = run_script("-m", "examples.answer", trained / "hub", HF_HUB_OFFLINE="1")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("rationale:") and [line.split()[-1] for line in lines[2:]] == ["red", "green", "black"]


def test_answers_question_about_own_picture(trained):
    picture = REPOSITORY / "space" / "examples" / "map.png"
    result = run_script("-m", "examples.answer", trained / "hub", picture, "Which?", "one", "two", HF_HUB_OFFLINE="1")
    assert [line.split()[-1] for line in result.stdout.splitlines()[2:]] == ["one", "two"]


def test_look_inside_draws_maps_and_probes_answers(trained, tmp_path):
    result = run_script("-m", "examples.look_inside", trained / "hub", tmp_path / "maps.png", HF_HUB_OFFLINE="1")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert "without the picture:" in result.stdout and "another rationale:" in result.stdout


def test_notebook_cells_run(tmp_path):
    notebook = json.loads((REPOSITORY / "examples" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(cells))
    result = run_script("cells.py", cwd=tmp_path, HF_HUB_OFFLINE="1", PYTHONPATH=str(REPOSITORY))
    assert "maps of shape" in result.stdout.splitlines()[-1]
