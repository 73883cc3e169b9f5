"""A stage that checks answers, in a run: its targets, the predictions, the exported system, and a second training."""

import importlib.util
import json
import shutil

import pytest
import yaml
from conftest import REPOSITORY, TINY_RECIPE, run_isolated, run_script
from datasets import Dataset
from transformers import pipeline

from mmcot.evaluation.metrics import accuracy
from mmcot.hub.checks import code_faults, surplus_files
from mmcot.prediction.columns import columns_after
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json
from mmcot.storage.run_folder import CROSS_FITTED, RunFolder
from mmcot.training.preparation import prepare
from mmcot.training.stage import training_problems
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.stage_mmcot import RIGHT, WRONG

pytestmark = pytest.mark.slow

CHECK = {
    **{"name": "check", "kind": "check", "reads": ["question", "choices", "rationale", "answer_text", "images"]},
    "source": "{{ question }} {{ choices | join(' ') }} {{ rationale }} {{ answer_text }} Right?",
    **{"writes": "verdict", "max_source_length": 128, "inputs_from": "cross_fit", "num_train_epochs": 10},
}


@pytest.fixture(scope="module")
def command(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    recipe |= {"num_folds": 2, "max_steps": -1, "num_train_epochs": 0.5, "save_steps": 100, "eval_steps": 50}
    recipe["report_problems"] = 4
    recipe["stages"].append(CHECK)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ("train.py", "--config", folder / "recipe.yaml", "--dataset", tiny_dataset, "--output_dir", folder / "run")


@pytest.fixture(scope="module")
def output(command):
    return run_script(*command).stderr


@pytest.fixture(scope="module")
def run(command, output):
    return RunFolder(command[-1])


def rows_of(dataset, split):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    return {row["id"]: row for row in rows if row["split"] == split}


def test_learns_which_cross_fitted_answers_are_wrong(run, output, tiny_dataset):
    rows, written = rows_of(tiny_dataset, "train"), run.predictions_so_far(CROSS_FITTED)
    right_answers = {name: f"The answer is ({'ABCDE'[row['answer']]})." for name, row in rows.items()}
    count = sum(written[name]["answer_text"] != text for name, text in right_answers.items())
    assert 0 < count < 40
    assert f"check stage: the target of {count} of 40 train problems is 'wrong'" in output
    history = read_json(run.train_results("check"))["log_history"]
    assert any("eval_accuracy_verdict" in entry for entry in history)


def test_later_stage_is_cross_fitted_on_columns_after_the_check(command, tiny_dataset, tmp_path):
    recipe = yaml.safe_load(command[2].read_text())
    later = {"name": "later", "reads": ["rationale", "verdict"], "writes": "later", "inputs_from": "cross_fit"}
    later |= {"source": "{{ rationale }} {{ verdict }}", "target": "{{ solution }}", "max_target_length": 12}
    recipe |= {"stages": [*recipe["stages"], later], "report_problems": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--config", tmp_path / "recipe.yaml", "--dataset", tiny_dataset, "--output_dir", tmp_path / "run"]
    run_script("train.py", *options)
    prepared = prepare(parse_recipe([str(option) for option in options]))
    folder, stage = prepared.folder, prepared.stages.named("later")
    written = {}
    for fold in range(2):
        written |= folder.fold(fold).predictions_so_far("held_out")
    assert any("rejected" in columns for columns in written.values())
    rows = training_problems(prepared, stage, "train")
    assert rows["rationale"] == [written[name]["rationale"] for name in rows["id"]]
    rows = training_problems(prepared, prepared.stages.named("check"), "train")
    read = [{**written[name], **written[name].get("rejected", {})} for name in rows["id"]]
    assert rows["rationale"] == [columns["rationale"] for columns in read]


def test_replaces_columns_of_rejected_answers_only(run, tiny_dataset):
    for split in ("val", "test"):
        predictions = run.predictions_so_far(split)
        for columns in predictions.values():
            assert columns["verdict"] == (RIGHT if columns["verdict_score"] >= 0.5 else WRONG)
            assert ("rejected" in columns) == (columns["verdict"] == WRONG)
        rejected = [columns for columns in predictions.values() if "rejected" in columns]
        for columns in rejected:
            assert columns["rejected"].keys() == {"rationale", "answer", "answer_text", "scores", "decoded_answer"}
            assert columns["rejected"]["rationale"] != columns["rationale"]
        rows = [{**row, "images": []} for row in rows_of(tiny_dataset, split).values()]
        scored = accuracy(Dataset.from_list(rows), {name: columns["answer"] for name, columns in predictions.items()})
        scores = read_json(run.scores(split))
        assert scores["accuracy"]["Avg"] == scores["check"]["accuracy_after"] == scored["Avg"]
        assert scores["check"]["sent_back"] == len(rejected)
    assert rejected


def test_exported_system_checks_without_repository(run, tiny_dataset):
    name, columns = next((name, row) for name, row in run.predictions_so_far("test").items() if "rejected" in row)
    row = rows_of(tiny_dataset, "test")[name]
    problem = {name: row[name] for name in ("question", "choices", "context")}
    problem["image"] = [str(tiny_dataset.parent / picture) for picture in row["images"]]
    code = """
        answer = pipeline("multimodal-cot", model="hub", trust_remote_code=True)
        print(json.dumps(answer(json.loads(sys.argv[1]), decode_answer=True)))
        """
    found = run_isolated(code, run.path, json.dumps(problem))
    expected = {name: value for name, value in columns.items() if name != "answer_text"}
    assert found.pop("answer") == row["choices"][expected.pop("answer")]
    assert found.keys() - {"answer_index"} == expected.keys()
    assert found["rationale"] == columns["rationale"]
    assert found["rejected"]["rationale"] == columns["rejected"]["rationale"]
    assert found["verdict_score"] == pytest.approx(columns["verdict_score"], abs=1e-5)


def test_exported_system_reproduces_predictions_of_run_without_leak(run, tiny_dataset, tmp_path):
    common = ("-m", "mmcot.predict", run.path, "--dataset", tiny_dataset, "--split", "test")
    run_script(*common, "--batch_size", "16", "--decode_answer", "--output", tmp_path / "test.json")
    assert read_json(tmp_path / "test.json") == run.predictions_so_far("test")
    assert "No prediction of 20 differs" in run_script(*common, "--leak_check").stdout


def test_report_shows_rejected_texts_and_prompt_that_was_read(run, tiny_dataset, tmp_path):
    file = run.predictions("test")
    run_script(
        "-m", "mmcot.evaluate", file, "--dataset", tiny_dataset, "--split", "test", "--report", tmp_path / "page"
    )
    script = (tmp_path / "page" / "problems.js").read_text()
    shown = {row["id"]: row for row in json.loads(script.removeprefix("const PROBLEMS = ").rstrip(";\n"))}
    for name, columns in run.predictions_so_far("test").items():
        read = columns.get("rejected", columns)
        assert read["rationale"] in shown[name]["prompts"]["check"]
        assert shown[name]["texts"].get("rejected rationale") == columns.get("rejected", {}).get("rationale")


def test_card_and_probes_follow_the_recipe(run, tiny_dataset, tmp_path):
    card = (run.hub / "README.md").read_text()
    assert "rationale, then answer, then check" in card and 'result["verdict"]' in card
    assert [*surplus_files(run.hub), *code_faults(run.hub)] == []
    run_script("-m", "mmcot.probes", run.path, "--dataset", tiny_dataset, "--split", "test", "--output", tmp_path / "p")
    assert "rationale dropped" in (tmp_path / "p").read_text()


def test_space_shows_verdict_and_answers_again_from_edited_rationale(run, tiny_dataset):
    specification = importlib.util.spec_from_file_location("space_app", REPOSITORY / "space" / "app.py")
    app = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(app)
    answer = pipeline("multimodal-cot", model=str(run.hub), trust_remote_code=True)
    page = app.Page(answer, "model")
    row = next(row for row in rows_of(tiny_dataset, "test").values() if not row["images"])
    problem = {**{name: row[name] for name in ("question", "choices", "context")}, "image": None}
    *_, shown = page.respond(problem, {})
    result = answer(problem)
    assert shown[page.state]["given"] == {"rationale": result["rationale"]}
    assert result["verdict"] in shown[page.answered] and "Rejected rationale" in shown[page.answered]
    *_, shown = page.ask_again(shown[page.state], "Another rationale.")
    assert shown[page.state]["given"] == {"rationale": "Another rationale."}
    assert "Verdict" in shown[page.answered] and "Rejected" not in shown[page.answered]


def test_check_that_is_trained_again_reads_rejected_columns_again(run, command, tmp_path):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    before = {split: copy.predictions_so_far(split) for split in ("val", "test")}
    shutil.rmtree(copy.stage("check"))
    # Other weights, so that the stage writes its column again.
    run_script(*command[:-1], copy.path, "--report_problems", "0")
    earlier = MMCoTProcessor.from_pretrained(copy.hub, trust_remote_code=False).stages[:2]
    for split, predictions in before.items():
        again = copy.predictions_so_far(split)
        for name, columns in columns_after(again, earlier).items():
            unchecked = columns_after(predictions, earlier)[name]
            assert {key: columns[key] for key in ("rationale", "scores")} == {
                key: unchecked[key] for key in ("rationale", "scores")
            }
