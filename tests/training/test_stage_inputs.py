"""The training inputs and initial weights of a stage: `inputs_from`, `init_from`, folds."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_RECIPE
from filelock import FileLock
from safetensors.torch import load_file

from mmcot.predict import main as predict
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.checkpoints import RunStopped
from mmcot.storage.files import read_json
from mmcot.storage.run_folder import RunFolder
from mmcot.train import main
from mmcot.training import stage as training_stage
from mmcot.training.preparation import prepare
from mmcot.training.stage import training_problems
from mmcot.training.stage_inputs import assign_folds

QUICK = ["--max_steps", "8", "--eval_strategy", "no", "--save_strategy", "no"]


def recipe(file: Path, **answer) -> Path:
    """The tiny recipe with other settings of its answer stage."""
    values = yaml.safe_load(TINY_RECIPE.read_text())
    values["stages"][1].update(answer)
    file.write_text(yaml.safe_dump(values))
    return file


def command(config: Path, dataset: Path, folder: Path, *more: str) -> list[str]:
    return ["--config", str(config), "--dataset", str(dataset), "--output_dir", str(folder), *QUICK, *more]


def trained_on(options: list[str]) -> dict[str, str]:
    prepared = prepare(parse_recipe(options))
    rows = training_problems(prepared, prepared.stages[1], "train")
    return dict(zip(rows["id"], rows["rationale"], strict=True))


@pytest.fixture(scope="module")
def cross_fit(tiny_dataset, tmp_path_factory):
    """A run whose answer stage is cross-fitted over two folds, and its command."""
    folder = tmp_path_factory.mktemp("cross_fit")
    options = command(recipe(folder / "recipe.yaml", inputs_from="cross_fit"), tiny_dataset, folder / "run")
    options += ["--num_folds", "2"]
    main(options)
    return folder / "run", options


def test_assigns_each_problem_to_one_fold_of_about_equal_size():
    folds = assign_folds(11, 3, seed=5)
    assert sorted(folds.count(fold) for fold in range(3)) == [3, 4, 4]
    assert folds == assign_folds(11, 3, seed=5) != assign_folds(11, 3, seed=6)


def test_cross_fitted_texts_come_from_stages_not_trained_on_the_problem(cross_fit, tiny_dataset, tmp_path):
    """A fold's stage has exactly the weights of a stage trained on data without the fold's problems."""
    run, _ = cross_fit
    written = read_json(run / "predictions/train_cross_fit.json")
    parts = [read_json(run / f"folds/{fold}/predictions/held_out.json") for fold in (0, 1)]
    assert parts[0].keys() & parts[1].keys() == set() and {**parts[0], **parts[1]} == written
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    assert written.keys() == {row["id"] for row in rows if row["split"] == "train"}

    values = yaml.safe_load(TINY_RECIPE.read_text())
    del values["tokenizer_vocab_size"]
    values["tokenizer_name_or_path"] = str(run / "hub")  # trained on all problems
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with (tmp_path / "problems.jsonl").open("w") as file:
        for row in rows:
            if row["id"] not in parts[0]:
                images = [str(tiny_dataset.parent / name) for name in row["images"]]
                file.write(json.dumps({**row, "images": images}) + "\n")
    main(command(tmp_path / "recipe.yaml", tmp_path / "problems.jsonl", tmp_path / "run"))
    expected = load_file(tmp_path / "run/rationale/model.safetensors")
    found = load_file(run / "folds/0/rationale/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_trains_the_answer_stage_on_the_cross_fitted_texts(cross_fit):
    run, options = cross_fit
    written = read_json(run / "predictions/train_cross_fit.json")
    assert trained_on(options) == {problem_id: columns["rationale"] for problem_id, columns in written.items()}


@pytest.mark.slow
def test_trains_folds_in_separate_calls(cross_fit, tiny_dataset, tmp_path, capsys):
    run, options = cross_fit
    options = [*options, "--output_dir", str(tmp_path / "run")]
    main([*options, "--fold", "1"])
    assert str(tmp_path / "run/folds/1") in capsys.readouterr().out
    assert not (tmp_path / "run/rationale").exists() and not (tmp_path / "run/folds/0").exists()
    fold = tmp_path / "run/folds/1/rationale/model.safetensors"
    written_at = fold.stat().st_mtime_ns
    main(options)
    assert fold.stat().st_mtime_ns == written_at
    for file in ("answer/model.safetensors", "predictions/test.json"):
        assert (tmp_path / "run" / file).read_bytes() == (run / file).read_bytes()


@pytest.mark.slow
def test_generated_inputs_are_predictions_of_the_previous_stage_on_train(tiny_dataset, tmp_path):
    options = command(recipe(tmp_path / "recipe.yaml", inputs_from="generated"), tiny_dataset, tmp_path / "run")
    main(options)
    predict(
        [str(tmp_path / "run"), "--dataset", str(tiny_dataset), "--split", "train", "--output", str(tmp_path / "p")]
    )
    expected = {problem_id: columns["rationale"] for problem_id, columns in read_json(tmp_path / "p").items()}
    assert trained_on(options) == expected


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["--use_peft", "true", "--lora_r", "2"], marks=pytest.mark.slow)],
    ids=["whole", "adapters"],
)
def test_stage_starts_from_the_previous_stage(tiny_dataset, tmp_path, more):
    """With a learning rate of 0, its weights stay equal to those of the previous stage."""
    values = recipe(tmp_path / "recipe.yaml", init_from="previous_stage", learning_rate=0.0)
    main(command(values, tiny_dataset, tmp_path / "run", *more))
    name = "adapter_model.safetensors" if more else "model.safetensors"
    rationale, answer = (load_file(tmp_path / "run" / stage / name) for stage in ("rationale", "answer"))
    assert all(torch.equal(answer[key], tensor) for key, tensor in rationale.items())


@pytest.mark.parametrize(
    ("stage", "more", "error"),
    [
        ({"inputs_from": "golden"}, [], "stage 'answer' has inputs_from 'golden'; expected one of gold, generated"),
        ({"init_from": "rationale"}, [], "stage 'answer' has init_from 'rationale'; expected one of base, previous"),
        (
            {"inputs_from": "cross_fit"},
            ["--num_folds", "41"],
            "num_folds is 41, but there are only 40 training problems",
        ),
        ({"inputs_from": "cross_fit"}, ["--num_folds", "1"], "num_folds is 1; expected 2 or more"),
        ({"inputs_from": "cross_fit"}, ["--fold", "5"], "fold is 5; expected 0 to num_folds - 1"),
        ({}, ["--fold", "0"], "and a stage with inputs_from: cross_fit"),
    ],
)
def test_refuses_invalid_stage_inputs(tiny_dataset, tmp_path, stage, more, error):
    config = recipe(tmp_path / "recipe.yaml", **stage)
    with pytest.raises(SystemExit, match=error):
        main(command(config, tiny_dataset, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["inputs_from", "init_from"])
def test_refuses_inputs_of_a_previous_stage_for_the_first_stage(tiny_dataset, tmp_path, key):
    values = yaml.safe_load(TINY_RECIPE.read_text())
    values["stages"][0][key] = {"inputs_from": "generated", "init_from": "previous_stage"}[key]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match=f"stage 'rationale' has {key} .*, but no stage before it"):
        main(command(tmp_path / "recipe.yaml", tiny_dataset, tmp_path / "run"))


def test_refuses_a_single_fold_if_a_later_stage_needs_all_folds(tiny_dataset, tmp_path):
    values = yaml.safe_load(TINY_RECIPE.read_text())
    rationale, answer = values["stages"]
    second = {**rationale, "name": "second", "writes": "second", "inputs_from": "cross_fit"}
    values["stages"] = [rationale, second, {**answer, "inputs_from": "cross_fit"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match="several stages have inputs_from: cross_fit"):
        main(command(tmp_path / "recipe.yaml", tiny_dataset, tmp_path / "run", "--fold", "0"))


@pytest.mark.slow
def test_cross_fits_three_stages_in_sequence(tiny_dataset, tmp_path):
    values = yaml.safe_load(TINY_RECIPE.read_text())
    rationale, answer = values["stages"]
    second = {**rationale, "name": "second", "writes": "second", "inputs_from": "cross_fit"}
    second["reads"] = [*rationale["reads"], "rationale"]
    values["stages"] = [rationale, second, {**answer, "inputs_from": "cross_fit"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    main(command(tmp_path / "recipe.yaml", tiny_dataset, tmp_path / "run", "--num_folds", "2", "--max_steps", "2"))
    written = read_json(tmp_path / "run/predictions/train_cross_fit.json")
    assert len(written) == 40 and all(columns.keys() >= {"rationale", "second"} for columns in written.values())


def test_separate_commands_train_same_stages_as_one_run(tiny_run, tiny_dataset, tmp_path):
    common = ["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "run")]
    for stage in ("answer", "rationale"):
        main([*common, "--stage", stage])
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        *("answer", "inputs.json", "rationale", "recipe.yaml", "splits.json")
    ]
    for stage in ("answer", "rationale"):
        own, other = (load_file(run / stage / "model.safetensors") for run in (folder, tiny_run))
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_stage, "train", None)  # neither stage is trained again
        main(common)
    assert (folder / "hub" / "known_answer.json").is_file()


def test_refuses_stage_that_another_command_trains(tiny_dataset, tmp_path):
    options = ["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "run")]
    with prepare(parse_recipe(options)).lock:
        pass  # creates the run folder
    with (
        FileLock(RunFolder(tmp_path / "run").stage_lock("answer")),
        pytest.raises(SystemExit, match="holds .lock-stage-answer"),
    ):
        main([*options, "--stage", "answer"])


@pytest.mark.parametrize(
    ("settings", "stage", "message"),
    [
        ({}, "think", "stage is 'think'; expected one of rationale, answer"),
        ({"inputs_from": "generated"}, "answer", "stage is 'answer', which has inputs_from 'generated'"),
        (
            {"init_from": "previous_stage"},
            "answer",
            "'answer', which has inputs_from 'gold' and init_from 'previous_stage'",
        ),
    ],
)
def test_refuses_to_train_one_stage_that_depends_on_others(tiny_dataset, tmp_path, settings, stage, message):
    config = recipe(tmp_path / "recipe.yaml", **settings)
    with pytest.raises(ValueError, match=message):
        parse_recipe([*command(config, tiny_dataset, tmp_path / "run"), "--stage", stage])


def test_omits_problems_without_target_from_training(tiny_dataset, tmp_path, caplog):
    ids = [row["id"] for row in map(json.loads, tiny_dataset.read_text().splitlines()) if row["split"] == "train"]
    (tmp_path / "texts.json").write_text(json.dumps({name: "" if name == ids[0] else "a text" for name in ids}))
    target = ("--target_column", f"rationale={tmp_path / 'texts.json'}")
    prepared = prepare(parse_recipe(command(TINY_RECIPE, tiny_dataset, tmp_path / "run", *target)))
    examples = training_stage.stage_examples(prepared, prepared.stages[0], "train")
    assert examples["id"] == ids[1:]
    assert f"rationale stage: 1 of {len(ids)} train problems have an empty target" in caplog.text
    (tmp_path / "texts.json").write_text(json.dumps(dict.fromkeys(ids, "")))
    prepared = prepare(parse_recipe(command(TINY_RECIPE, tiny_dataset, tmp_path / "other", *target)))
    with pytest.raises(RunStopped, match="The rationale stage has no target: it is empty for all"):
        training_stage.stage_examples(prepared, prepared.stages[0], "train")
