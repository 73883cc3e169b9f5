"""Training on gold inputs first and on generated inputs at the end: `inputs_from: mixed`."""

import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import REPOSITORY, TINY_RECIPE, run_script

from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json, write_json
from mmcot.training.mixed_inputs import is_generated
from mmcot.training.preparation import prepare
from mmcot.training.stage import build_trainer, stage_examples

NUM_STEPS = 24


def write_recipe(file, stages):
    file.write_text(yaml.safe_dump({**yaml.safe_load(TINY_RECIPE.read_text()), "stages": stages}))
    return file


def tiny_stages():
    return yaml.safe_load(TINY_RECIPE.read_text())["stages"]


def share_generated(step, seed=0):
    return sum(is_generated(f"problem {number}", step, 100, seed) for number in range(1000)) / 1000


def test_share_of_generated_inputs_rises_linearly_from_0_to_1():
    assert share_generated(0) == 0 and share_generated(100) == 1
    for step in range(10, 100, 10):
        assert share_generated(step) == pytest.approx(step / 100, abs=0.05)


def test_draw_depends_on_seed_step_and_problem_only():
    draws = [is_generated("a problem", 50, 100, seed) for seed in range(20)]
    assert draws == [is_generated("a problem", 50, 100, seed) for seed in range(20)]
    assert draws != [is_generated("another problem", 50, 100, seed) for seed in range(20)]
    assert draws != [is_generated("a problem", 51, 100, seed) for seed in range(20)]
    assert len(set(draws)) == 2


@pytest.fixture(scope="module")
def mixed(tiny_dataset, tmp_path_factory):
    """A prepared run whose first two stages have written texts, its third stage, and the examples of that stage."""
    folder = tmp_path_factory.mktemp("mixed")
    rationale, answer = tiny_stages()
    templates = {"source": "{{ rationale }} / {{ second }}", "target": "{{ second }}", "max_target_length": 64}
    second = {"name": "second", "reads": ["question"], "writes": "second", "source": "{{ question }}"}
    third = {"name": "third", "reads": ["rationale", "second"], "writes": "third", "inputs_from": "mixed", **templates}
    stages = [rationale, {**second, "target": "{{ question }}"}, third, answer]
    config = write_recipe(folder / "recipe.yaml", stages)
    options = ["--config", str(config), "--dataset", str(tiny_dataset), "--output_dir", str(folder / "run")]
    prepared = prepare(parse_recipe(options))
    for split in ("train", "val"):
        texts = {"rationale": "a written rationale", "second": "a written text"}
        write_json(prepared.folder.predictions(split), dict.fromkeys(prepared.problems[split]["id"], texts))
    stage = prepared.stages.named("third")
    return prepared, stage, {split: stage_examples(prepared, stage, split) for split in ("train", "val")}


def texts_of(prepared, batch):
    """The sources and targets of a batch."""
    tokenizer = prepared.processor.tokenizer
    labels = batch["labels"].masked_fill(batch["labels"] == -100, tokenizer.pad_token_id)
    decoded = (tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (batch["input_ids"], labels))
    return list(zip(*decoded, strict=True))


WRITTEN = ("a written rationale / a written text", "a written text")


def test_columns_of_a_problem_are_all_gold_or_all_generated(mixed):
    prepared, stage, examples = mixed
    trainer = build_trainer(prepared, prepared.training_of(stage), examples, None)
    trainer.state.max_steps = NUM_STEPS
    num_generated = []
    for step in (0, NUM_STEPS // 2, NUM_STEPS):
        trainer.state.global_step = step
        loader = trainer.get_train_dataloader()
        batches, num_tokens = trainer.get_batch_samples(iter(loader), len(loader), trainer.args.device)
        assert num_tokens == sum((batch["labels"] != -100).sum() for batch in batches)
        pairs = [pair for batch in batches for pair in texts_of(prepared, batch)]
        gold = [pair for pair in pairs if pair != WRITTEN]
        assert len(pairs) == 40 and not any("a written" in text for pair in gold for text in pair)
        num_generated.append(40 - len(gold))
    assert num_generated[0] == 0 and 10 < num_generated[1] < 30 and num_generated[2] == 40


def test_evaluates_on_generated_inputs(mixed):
    prepared, stage, examples = mixed
    trainer = build_trainer(prepared, prepared.training_of(stage), examples, None)
    pairs = [pair for batch in trainer.get_eval_dataloader() for pair in texts_of(prepared, batch)]
    assert set(pairs) == {WRITTEN}


def test_omits_problems_without_target_in_one_version(mixed):
    prepared, stage, examples = mixed
    file = prepared.folder.predictions("train")
    predictions = read_json(file)
    first, second, *rest = examples["train"]["id"]
    write_json(file, {**predictions, second: {**predictions[second], "second": ""}})
    found = stage_examples(prepared, stage, "train")
    write_json(file, predictions)
    assert found["id"] == [first, *rest]


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(tiny_dataset, tmp_path):
    """The resumed call reads the data in two workers."""
    rationale, answer = tiny_stages()
    config = write_recipe(tmp_path / "recipe.yaml", [rationale, {**answer, "inputs_from": "mixed"}])
    command = ["train.py", "--config", str(config), "--dataset", str(tiny_dataset), "--output_dir"]
    run_script(*command, tmp_path / "whole")
    folder = tmp_path / "resumed"
    process = subprocess.Popen([sys.executable, *command, str(folder)], cwd=REPOSITORY)
    while not (folder / "answer" / "checkpoint-8").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143 and not (folder / "answer" / "train_results.json").exists()
    run_script(*command, folder, "--dataloader_num_workers", "2")
    for file in ("answer/model.safetensors", "predictions/train.json", "predictions/test.json"):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    losses = [
        [entry["loss"] for entry in read_json(run / "answer/train_results.json")["log_history"] if "loss" in entry]
        for run in (folder, tmp_path / "whole")
    ]
    assert len(losses[0]) == NUM_STEPS and losses[0] == losses[1]
