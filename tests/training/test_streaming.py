"""Streamed training problems: the same examples as stored problems give, in an endless stream."""

import collections
import itertools
import json
import shutil

import datasets
import pytest
import torch
import yaml
from conftest import HUB_FEATURES, TINY_RECIPE, hub_rows, run_script

from mmcot.recipes.recipe import parse_recipe
from mmcot.train import main
from mmcot.training.preparation import prepare
from mmcot.training.stage import stage_examples
from mmcot.training.streaming import streamed_pictures
from mmcot.training.trainer import NamedCollator


@pytest.fixture
def recipe(hub_dataset, tmp_path):
    """The tiny recipe on a dataset of the Hub, with a given tokenizer, because a streamed run cannot train one."""
    values = {**yaml.safe_load(TINY_RECIPE.read_text()), "dataset": str(hub_dataset)}
    run = prepare(parse_recipe(write(values, tmp_path / "plain.yaml", tmp_path / "plain")))
    run.processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    del values["tokenizer_vocab_size"]
    values["tokenizer_name_or_path"] = str(tmp_path / "tokenizer")
    write(values, tmp_path / "recipe.yaml", tmp_path / "run")
    return tmp_path / "recipe.yaml"


def write(values, file, run):
    file.write_text(yaml.safe_dump(values))
    return ["--config", str(file), "--output_dir", str(run)]


def test_stream_gives_the_same_examples_as_stored_problems(recipe, tmp_path):
    options = ["--config", str(recipe), "--output_dir"]
    stored = prepare(parse_recipe([*options, str(tmp_path / "stored")]))
    streamed = prepare(parse_recipe([*options, str(tmp_path / "streamed"), "--streaming", "true"]))
    for number, stage in enumerate(stored.stages):
        expected = stage_examples(stored, stage, "train")
        stream = stage_examples(streamed, streamed.stages[number], "train")
        rows = list(itertools.islice(stream, 20 * len(expected)))
        counts = collections.Counter(json.dumps([row["input_ids"], row["labels"]]) for row in rows)
        assert counts.keys() == {json.dumps([row["input_ids"], row["labels"]]) for row in expected}
        orders = [[row["id"] for row in rows[start : start + 5]] for start in range(0, 100, 5)]
        assert len(set(map(tuple, orders))) > 10, "the order must change with each pass"
        again = list(itertools.islice(stream, 100))  # the same order, because resuming needs it
        assert [row["id"] for row in again] == [row["id"] for row in rows]
        by_id = {row["id"]: row for row in rows}
        batches = [
            NamedCollator(run.processor, stage, pictures)([source[problem_id] for problem_id in sorted(by_id)])
            for run, source, pictures in (
                (stored, {row["id"]: row for row in expected}, stored.pictures),
                (streamed, by_id, streamed_pictures(streamed.processor, streamed.problems["val"])),
            )
        ]
        assert batches[0].keys() == batches[1].keys() and "pixel_values" in batches[0]
        for name, tensor in batches[0].items():
            assert name == "ids" or torch.equal(tensor, batches[1][name]), name


@pytest.mark.slow
def test_resumes_an_interrupted_stream_with_identical_results(recipe, tmp_path):
    """The run is as if killed after the checkpoint of step 20 of the last stage, after more than four passes."""
    options = ("train.py", "--config", recipe, "--streaming", "true")
    run_script(*options, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "hub")
    shutil.rmtree(tmp_path / "killed" / "answer" / "checkpoint-24")
    for file in ("train_results.json", "model.safetensors"):
        (tmp_path / "killed" / "answer" / file).unlink()
    for split in ("val", "test"):
        (tmp_path / "killed" / "predictions" / f"{split}.json").unlink()
    assert (tmp_path / "killed" / "answer" / "checkpoint-20").is_dir()
    run_script(*options, "--output_dir", tmp_path / "killed")
    for name in ("answer/model.safetensors", "predictions/test.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_names_a_problem_without_answer(recipe, tmp_path):
    rows = hub_rows(5)
    rows[3]["answer"] = -1
    datasets.Dataset.from_list(rows, features=HUB_FEATURES).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    for split in ("validation", "test"):
        good = datasets.Dataset.from_list(hub_rows(2), features=HUB_FEATURES)
        good.to_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet")
    options = ["--config", str(recipe), "--dataset", str(tmp_path / "data"), "--streaming", "true"]
    run = prepare(parse_recipe([*options, "--output_dir", str(tmp_path / "run")]))
    with pytest.raises(ValueError, match="problem train-3: answer is -1"):
        list(itertools.islice(stage_examples(run, run.stages[0], "train"), 5))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--max_steps", "-1"), "max_steps is -1"),
        (("--tokenizer_vocab_size", "99"), "tokenizer_vocab_size is set"),
        (("--train_sampling_strategy", "group_by_length"), "group_by_length"),
        (("--dataset", "demo"), "dataset is 'demo'; streaming reads a dataset of the Hub"),
    ],
)
def test_refuses_settings_incompatible_with_streaming_before_it_writes(recipe, tmp_path, options, expected):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--streaming", "true", *options])
    assert expected in stopped.value.code
    assert not (tmp_path / "run").exists()


def test_resumes_a_stream_only_with_the_same_batch_size(recipe, tmp_path):
    options = ["--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--streaming", "true"]
    prepare(parse_recipe(options))
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        prepare(parse_recipe([*options, "--per_device_train_batch_size", "2"]))
