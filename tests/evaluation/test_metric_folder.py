"""The metric, loaded with `evaluate.load` from its folder or from a Hub, gives the figures of `mmcot.evaluate`."""

import json

import evaluate
import pytest
from conftest import REPOSITORY, run_script, shared
from loopback_hub import LoopbackHub, client_environment
from preloaded import run_python

from mmcot.evaluate import main
from mmcot.problems.sources import load_problems
from mmcot.storage.files import read_json, write_json

FOLDER = str(REPOSITORY / "metrics" / "mmcot_scienceqa")


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(FOLDER, cache_dir=str(tmp_path_factory.mktemp("metrics")))


def test_reproduces_published_figures_of_gpt3(metric, tmp_path):
    """The command and `evaluate.load` give equal figures, and these are the published ones."""
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


def test_accepts_rows_of_hub_dataset_as_references(metric):
    references = [row(0, image=object, hint="", solution="So."), row(1, image=None, hint="Look.", solution="So.")]
    references[0]["image"] = {"bytes": b"PNG", "path": None}
    predictions = [{"id": "0", "answer": 0, "scores": [0.75, 0.25]}, {"id": "1", "answer": 1, "scores": [0.5, 0.5]}]
    found = metric.compute(predictions=predictions, references=references)
    assert (found["accuracy"]["IMG"], found["accuracy"]["TXT"], found["accuracy"]["Avg"]) == (100, 0, 50)
    assert found["calibration"]["brier"] == pytest.approx((2 * 0.25**2 + 0.5) / 2)


def test_reports_accuracy_of_decoded_answers(metric):
    predictions = [{"id": "0", "answer": 0, "decoded_answer": -1}, {"id": "1", "answer": 0, "decoded_answer": 0}]
    found = metric.compute(predictions=predictions, references=[row(0), row(1)])
    assert (found["accuracy"]["Avg"], found["decoded_accuracy"]["Avg"]) == (100, 50)


def test_refuses_duplicate_id(metric):
    with pytest.raises(ValueError, match="1 of 2 predictions repeat an id"):
        metric.compute(predictions=[{"id": "0", "answer": 0}, {"id": "0", "answer": 1}], references=[row(0), row(1)])


def load_in_isolation(path, cwd, absent=("mmcot",), **environment):
    """Load and compute the metric in a new process that cannot import the packages in `absent`."""
    predictions = [{"id": "0", "answer": 0, "scores": [0.75, 0.25], "rationale": "It is so."}]
    references = [row(0, solution="It is so."), row(1, solution="It is not.")]
    code = f"""
import json, sys
sys.modules |= dict.fromkeys({absent!r})
import evaluate
metric = evaluate.load({str(path)!r})
print(json.dumps(metric.compute(predictions={[*predictions, {"id": "1", "answer": 1}]!r}, references={references!r})))
"""
    return run_python("-I", "-c", code, cwd=cwd, env=environment)


@pytest.fixture
def offline(tmp_path):
    return {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}


def test_folder_loads_without_mmcot(tmp_path, offline):
    result = load_in_isolation(FOLDER, tmp_path, absent=("mmcot", "modeling_mmcot"), **offline)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["accuracy"]["Avg"], found["accuracy"]["SOC"], found["n"]) == (50, None, 2)
    assert (found["rationale"]["bleu1"], found["rationale"]["rougeL"]) == pytest.approx((100, 100))
    assert found["calibration"] is None and found["intervals"]["accuracy"]["Avg"] == [0, 100]


UPLOAD = """
import sys
from huggingface_hub import create_repo, upload_folder
create_repo("ada/mmcot_scienceqa", repo_type="space", space_sdk="static")
upload_folder(repo_id="ada/mmcot_scienceqa", repo_type="space", folder_path=sys.argv[1])
"""


@pytest.mark.slow
def test_space_with_folder_loads_without_mmcot(tmp_path):
    with LoopbackHub() as hub:
        environment = client_environment(hub, tmp_path / "home", hub.add_user("ada"))
        run_script("-c", UPLOAD, FOLDER, cwd=tmp_path, **environment)
        result = load_in_isolation("ada/mmcot_scienceqa", tmp_path, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1])["accuracy"]["Avg"] == 50


@pytest.mark.slow
@pytest.mark.parametrize("package", ["nltk", "rouge", "scipy"])
def test_error_names_missing_package_and_install_command(tmp_path, offline, package):
    result = load_in_isolation(FOLDER, tmp_path, absent=(package,), **offline)
    assert f"you need to install the following dependencies['{package}'] using 'pip install {package}'" in result.stderr


@pytest.mark.parametrize("name", ["metrics.py", "uncertainty.py"])
def test_folder_copies_code_of_package(name):
    source = (REPOSITORY / "mmcot" / "evaluation" / name).read_text()
    copy = (REPOSITORY / "metrics" / "mmcot_scienceqa" / name).read_text()
    assert copy == source.replace("from mmcot.evaluation.", "from ."), (
        f"sed 's/^from mmcot[.]evaluation[.]/from ./' mmcot/evaluation/{name} gives the copy"
    )
