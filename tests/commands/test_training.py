"""Training as a user runs it: the run folder, resuming after a kill, two processes, invalid input."""

import json
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml
from analysis.test_report import drive
from conftest import REPOSITORY, TINY_RECIPE, run_script, shared
from safetensors.torch import load_file, save_file

from mmcot.evaluate import main as evaluate
from mmcot.pictures.reading import read_pictures
from mmcot.predict import main as predict
from mmcot.prediction.columns import with_gold_columns
from mmcot.prediction.provenance import stage_weights
from mmcot.problems.sources import load_problems
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import write_json
from mmcot.storage.journal import Journal
from mmcot.train import main
from mmcot.training.building import build_stage
from mmcot.training.preparation import prepare
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.pictures_mmcot import as_pictures

STAGES = ("rationale", "answer")


def train(dataset, folder, *options):
    return run_script("train.py", "--config", TINY_RECIPE, "--dataset", dataset, "--output_dir", folder, *options)


def assert_refused(command, *words):
    """Check that a command exits with an error message that contains the words."""
    with pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code.startswith("error: ")
    assert all(word in stopped.value.code for word in words), stopped.value.code


def test_run_folder_has_the_documented_contents(tiny_run, tiny_dataset):
    for stage in STAGES:
        assert (tiny_run / stage / "model.safetensors").is_file()
        assert len(list((tiny_run / stage).glob("checkpoint-*"))) == 2
        log = json.loads((tiny_run / stage / "train_results.json").read_text())
        assert len([entry for entry in log["log_history"] if "loss" in entry]) == 24
        assert len([entry for entry in log["log_history"] if "eval_loss" in entry]) == 2
    assert yaml.safe_load((tiny_run / "recipe.yaml").read_text())["dataset"] == str(tiny_dataset)
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    for split in ("val", "test"):
        predictions = json.loads((tiny_run / "predictions" / f"{split}.json").read_text())
        assert list(predictions) == [row["id"] for row in rows if row["split"] == split]
        for row in rows:
            if row["split"] != split:
                continue
            columns = predictions[row["id"]]
            assert set(columns) == {"rationale", "answer", "answer_text", "scores", "decoded_answer"}
            assert len(columns["scores"]) == len(row["choices"])
            assert sum(columns["scores"]) == pytest.approx(1, abs=1e-5)
            assert columns["answer"] == columns["scores"].index(max(columns["scores"]))
            assert columns["answer_text"] == f"The answer is ({'ABCDE'[columns['answer']]})."
        scores = json.loads((tiny_run / "scores" / f"{split}.json").read_text())
        right = [predictions[row["id"]]["answer"] == row["answer"] for row in rows if row["split"] == split]
        assert scores["accuracy"]["Avg"] == pytest.approx(100 * sum(right) / len(right))
        assert scores["n"] == len(right) and "decoded_accuracy" in scores


def test_repeating_a_finished_run_keeps_weights_and_prints_the_result(tiny_run, tiny_dataset):
    before = {stage: (tiny_run / stage / "model.safetensors").stat().st_mtime_ns for stage in STAGES}
    output = train(tiny_dataset, tiny_run).stdout
    assert before == {stage: (tiny_run / stage / "model.safetensors").stat().st_mtime_ns for stage in STAGES}
    assert "Avg" in output and f"Run folder: {tiny_run}" in output and "One test problem" in output


@pytest.mark.slow
def test_recipe_in_run_folder_reproduces_the_run(tiny_run, tmp_path):
    run_script(
        "train.py", "--config", tiny_run / "recipe.yaml", "--output_dir", tmp_path / "again", "--use_cpu", "true"
    )
    for stage in STAGES:
        again = (tmp_path / "again" / stage / "model.safetensors").read_bytes()
        assert again == (tiny_run / stage / "model.safetensors").read_bytes()


def test_answer_stage_trains_on_gold_rationales(tiny_dataset):
    recipe = parse_recipe(["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", "unused"])
    stages = [build_stage(arguments) for arguments in recipe.stages]
    problems = load_problems(str(tiny_dataset), "train")
    rows = with_gold_columns(problems, stages[:1])
    assert rows[0]["rationale"] == "Solution: " + problems[0]["solution"]


def test_validation_loss_is_the_mean_over_all_target_tokens(tiny_run, tiny_dataset):
    """Batches do not change it: the expected value is computed from the model's loss of each problem alone."""
    processor = MMCoTProcessor.from_pretrained(tiny_run / "hub")
    problems = load_problems(str(tiny_dataset), "val")
    log = json.loads((tiny_run / "rationale/train_results.json").read_text())["log_history"]
    model = MMCoTForConditionalGeneration.from_pretrained(tiny_run / "rationale").eval()
    losses, items = 0.0, 0
    for problem in problems:
        images = [as_pictures(read_pictures(problem))]
        inputs = processor([{**problem, "images": []}], stage="rationale", images=images, with_targets=True)
        with torch.no_grad():
            losses += float(model(**inputs, num_items_in_batch=1).loss)
        items += int((inputs["labels"] != -100).sum())
    assert [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1] == pytest.approx(losses / items, abs=1e-5)


def is_whole(checkpoint, seconds_later=0.0):
    def moment():
        reached = checkpoint.exists()
        time.sleep(seconds_later if reached else 0)
        return reached

    return moment


def is_being_written(checkpoint):
    return lambda: (checkpoint.parent / "unfinished" / checkpoint.name).is_dir()


@pytest.mark.slow
def test_resumes_after_sigkill_to_the_same_weights(tiny_run, tiny_dataset, tmp_path):
    """Three kills in each stage, one while a checkpoint is written; then the same command runs to its end."""
    folder = tmp_path / "killed"
    seeded = random.Random(7)
    command = [sys.executable, "train.py", "--config", TINY_RECIPE, "--dataset", tiny_dataset, "--output_dir", folder]

    def start():
        return subprocess.Popen([str(word) for word in command], cwd=REPOSITORY, stderr=subprocess.DEVNULL)

    def kill_at(moment):
        process = start()
        while process.poll() is None and not moment():
            pass
        assert process.poll() is None, "the run ended before the moment to kill it"
        process.kill()
        process.wait()

    def is_cut_off_by_a_kill(checkpoint):
        kill_at(is_being_written(checkpoint))
        return not checkpoint.exists()

    for stage in STAGES:
        early, *written, late = (folder / stage / f"checkpoint-{n}" for n in (seeded.choice((4, 8)), 12, 16, 20))
        kill_at(is_whole(early))
        # Because writing takes milliseconds, a kill that comes too late is repeated at the next checkpoint.
        assert any(is_cut_off_by_a_kill(checkpoint) for checkpoint in written)
        kill_at(is_whole(late, seconds_later=seeded.uniform(0, 0.3)))
    train(tiny_dataset, folder)
    for stage in STAGES:
        assert (folder / stage / "model.safetensors").read_bytes() == (
            tiny_run / stage / "model.safetensors"
        ).read_bytes()
    for split in ("val", "test"):
        name = f"predictions/{split}.json"
        assert (folder / name).read_bytes() == (tiny_run / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_processes_train_like_one(tiny_dataset, tmp_path, strategy):
    """With the same 16 problems a step (unequal targets, accumulation), one and two processes have the same losses."""
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    recipe["text_config"]["dropout_rate"] = 0.0  # because each process draws its own mask
    recipe.update(max_steps=4, save_steps=1, eval_steps=4, gradient_accumulation_steps=2, dataset=str(tiny_dataset))
    recipe.update(train_sampling_strategy=strategy)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    script = ("train.py", "--config", tmp_path / "recipe.yaml", "--per_device_train_batch_size")
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    run_script(*script, "8", "--output_dir", tmp_path / "one")
    run_script(*launch, *script, "4", "--output_dir", tmp_path / "two")
    for stage in STAGES:
        one, two = (json.loads((tmp_path / n / stage / "train_results.json").read_text()) for n in ("one", "two"))
        assert (one["world_size"], two["world_size"]) == (1, 2)
        losses = [[entry["loss"] for entry in run["log_history"] if "loss" in entry] for run in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4
        weights = [load_file(tmp_path / n / stage / "model.safetensors") for n in ("one", "two")]
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4)
    predictions = [json.loads((tmp_path / n / "predictions/test.json").read_text()) for n in ("one", "two")]
    assert list(predictions[0]) == list(predictions[1])
    if strategy == "group_by_length":
        # As if killed in the middle of the second epoch, a step before the end of the last stage.
        answer = tmp_path / "two" / "answer"
        finished = (answer / "model.safetensors").read_bytes()
        (answer / "train_results.json").unlink()
        (answer / "model.safetensors").unlink()
        shutil.rmtree(answer / "checkpoint-4")
        run_script(*launch, *script, "4", "--output_dir", tmp_path / "two")
        assert (answer / "model.safetensors").read_bytes() == finished


def test_resumes_predictions_at_the_killed_batch(tiny_run, tiny_dataset, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "hub")
    (run / "predictions" / "test.json").unlink()
    command = ["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(run)]
    written, write = [], Journal.write

    def interrupt_second_write(journal, of, ids, columns):
        if written:
            raise KeyboardInterrupt
        written.append((of, ids))
        write(journal, of, ids, columns)

    monkeypatch.setattr(Journal, "write", interrupt_second_write)
    with pytest.raises(SystemExit, match="130"):
        main(command)
    monkeypatch.setattr(Journal, "write", lambda journal, *batch: (written.append(batch[:2]), write(journal, *batch)))
    main(command)
    assert (run / "predictions/test.json").read_bytes() == (tiny_run / "predictions/test.json").read_bytes()
    assert len(written) == len(set(written)) == 4, "two batches for each stage"
    names = ["test.json", "test.meta.json", "val.json", "val.meta.json"]
    assert sorted(file.name for file in (run / "predictions").iterdir()) == names


@pytest.mark.parametrize("has_written", [True, False])
def test_predicts_again_after_weights_change(tiny_run, tiny_dataset, tmp_path, monkeypatch, has_written):
    """The stages that read these columns also predict again, even after a kill between the two files of a stage."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    file = run / "rationale" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.final_layer_norm.weight"] *= -3
    save_file(tensors, file, metadata={"format": "pt"})
    if not has_written:
        shutil.rmtree(run / "predictions")
    command = ["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(run)]
    written = []

    def interrupt_second_write(path, data):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_json(path, data)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr("mmcot.storage.predictions.write_json", interrupt_second_write)
        main(command)
    main(command)
    before, after = (json.loads((folder / "predictions/test.json").read_text()) for folder in (tiny_run, run))
    predict([str(run), "--dataset", str(tiny_dataset), "--output", str(tmp_path / "p.json")])
    expected = json.loads((tmp_path / "p.json").read_text())
    for name, columns in expected.items():
        assert after[name]["rationale"] == columns["rationale"]
        assert after[name]["scores"] == pytest.approx(columns["scores"], abs=1e-5)
    assert any(before[name]["scores"] != pytest.approx(after[name]["scores"], abs=1e-4) for name in before)
    scores = json.loads((run / "scores/test.json").read_text())
    assert scores["weights"] == {name: stage_weights(run, name) for name in STAGES}


def test_prediction_refuses_folder_without_weights(tiny_run, tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(tiny_run / "hub", folder)
    (folder / "model.safetensors").unlink()
    command = [str(folder), "--dataset", "demo", "--output", str(tmp_path / "p.json")]
    assert_refused(lambda: predict(command), "model.safetensors", str(folder))


def test_refuses_run_folder_of_another_recipe(tiny_run, tiny_dataset):
    before = (tiny_run / "recipe.yaml").read_bytes()
    command = ["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(tiny_run)]
    words = (str(tiny_run), "another recipe", "learning_rate", "0.001", "0.5")
    assert_refused(lambda: main([*command, "--learning_rate", "0.5"]), *words)
    assert (tiny_run / "recipe.yaml").read_bytes() == before


def test_refuses_damaged_picture_before_training(tiny_dataset, tmp_path):
    shutil.copytree(tiny_dataset.parent, tmp_path / "data")
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    row = next(row for row in reversed(rows) if row["images"] and row["split"] == "test")
    picture = tmp_path / "data" / row["images"][0]
    picture.write_bytes(picture.read_bytes()[:300])
    command = ["--config", str(TINY_RECIPE), "--dataset", str(tmp_path / "data" / "problems.jsonl")]
    assert_refused(lambda: main([*command, "--output_dir", str(tmp_path / "run")]), row["id"], str(picture))
    assert not (tmp_path / "run").exists()


def test_run_without_pictures_does_not_read_them(tmp_path):
    """Picture files may be absent, and a problem may have more than one."""
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "solution": "It is a.", "images": ["gone"] * 2}
    rows = [{**row, "question": f"Which {split}?", "split": split} for split in ("train", "val", "test")]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--dataset",
        str(tmp_path / "problems.jsonl"),
        "--output_dir",
        str(tmp_path / "run"),
        "--max_images",
        "0",
    ]
    prepared = prepare(parse_recipe(["--config", str(TINY_RECIPE), *options]))
    assert prepared.pictures is None and prepared.processor.image_processor is None
    # The column stays, because scores group problems by whether they have pictures.
    assert len(prepared.problems["train"][0]["images"]) == 2


@pytest.mark.slow
def test_error_for_missing_rationales_names_the_alternatives(tiny_dataset, tmp_path):
    shutil.copytree(tiny_dataset.parent, tmp_path / "data")
    file = tmp_path / "data" / "problems.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "solution": ""}) + "\n" for row in rows))
    command = ["--config", str(TINY_RECIPE), "--dataset", str(file), "--output_dir", str(tmp_path / "run")]
    words = ("'rationale'", "solution", "configs/demo/one_stage.yaml", "--target_column rationale=FILE.json")
    assert_refused(lambda: main(command), str(file), *words)
    texts = tmp_path / "rationales.json"
    texts.write_text(json.dumps({row["id"]: f"Because of {row['id']}." for row in rows}))
    train(file, tmp_path / "run", "--target_column", f"rationale={texts}", "--max_steps", "1")
    assert (tmp_path / "run" / "hub").is_dir()


@pytest.mark.slow
def test_trains_smoke_recipe_on_scienceqa(tmp_path):
    """On real problems and pictures, every problem is predicted, losses fall, and pictures change predictions."""
    dataset = shared("scienceqa")
    shared("t5_tokenizer")
    run = tmp_path / "smoke"
    run_script("train.py", "--config", "configs/scienceqa/smoke.yaml", "--output_dir", run, "--dataset", dataset)
    predictions = json.loads((run / "predictions/test.json").read_text())
    assert len(predictions) == 361
    for stage in STAGES:
        log = json.loads((run / stage / "train_results.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert losses[-1] <= 0.7 * losses[0], (stage, losses)
    withheld = run / "withheld.json"
    problems = {p: {**q, "image": None} for p, q in json.loads((dataset / "problems.json").read_text()).items()}
    blind = tmp_path / "blind"
    blind.mkdir()
    (blind / "problems.json").write_text(json.dumps(problems))
    for name in ("pid_splits.json", "captions.json"):
        shutil.copy(dataset / name, blind / name)
    run_script("-m", "mmcot.predict", run, "--dataset", blind, "--split", "test", "--output", withheld)
    without = json.loads(withheld.read_text())
    assert any(without[p]["rationale"] != predictions[p]["rationale"] for p in predictions)
    assert any(without[p]["scores"] != pytest.approx(predictions[p]["scores"], abs=1e-3) for p in predictions)
    run_script("-m", "mmcot.predict", run, "--dataset", dataset, "--leak_check", "--limit", "100")
    report = ["--report", str(tmp_path / "report"), "--attention", str(run), "--without_picture", str(withheld)]
    evaluate([str(run / "predictions/test.json"), "--dataset", str(dataset), *report])
    drive(tmp_path / "report", tmp_path)
