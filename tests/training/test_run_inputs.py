"""A run resumes only with the data, pictures, captions, features and checkpoints that it started with."""

import json
import shutil

import pytest
import torch
from conftest import TINY_RECIPE, run_script
from PIL import Image
from transformers import T5Config, T5ForConditionalGeneration

from mmcot.recipes.recipe import parse_recipe
from mmcot.training.preparation import prepare


@pytest.fixture
def finished(tiny_run, tiny_dataset, tmp_path):
    """Copies of a finished run and of its dataset, which a test can change."""
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copytree(tiny_dataset.parent, tmp_path / "data")
    return tmp_path / "run", tmp_path / "data" / tiny_dataset.name


def prepared(run, dataset, *options):
    words = ("--config", TINY_RECIPE, "--dataset", dataset, "--output_dir", run, *options)
    return prepare(parse_recipe([str(word) for word in words]))


def content(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def rewrite(dataset, change):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    rows = change(rows) or rows
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_other_solutions(rows):
    training = [row for row in rows if row["split"] == "train"]
    solutions = [row["solution"] for row in training]
    for row, solution in zip(training, solutions[1:] + solutions[:1], strict=True):
        row["solution"] = solution


def with_other_questions(rows):
    for row in [row for row in rows if row["split"] == "test"][:5]:
        row["question"] = "Another question?"


CHANGES = {
    "solutions": (with_other_solutions, "Of 40 train problems 40 have other texts or answers"),
    "test questions": (with_other_questions, "Of 20 test problems 5 have other texts or answers"),
    "an answer": (lambda rows: rows[45].update(answer=1 - rows[45]["answer"]), "Of 12 val problems 1 have other texts"),
    "a missing row": (lambda rows: rows[1:], "Of 40 train problems 1 are gone"),
    "order": (lambda rows: rows[::-1], "Of 40 train problems all 40 are the same, in another order"),
}


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_refuses_changed_problems_with_their_count(finished, name, is_finished):
    run, dataset = finished
    if not is_finished:  # killed in the middle of the second stage
        shutil.rmtree(run / "hub")
        (run / "answer" / "train_results.json").unlink()
    change, expected = CHANGES[name]
    rewrite(dataset, change)
    before = content(run)
    with pytest.raises(ValueError, match="started with different data") as error:
        prepared(run, dataset)
    assert expected in str(error.value) and "Choose another --output_dir" in str(error.value)
    assert content(run) == before


def test_refuses_a_picture_changed_in_place(finished):
    run, dataset = finished
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    row = next(row for row in rows if row["images"])
    Image.new("RGB", (96, 96), "red").save(dataset.parent / row["images"][0])
    with pytest.raises(ValueError, match=rf"Of 40 train problems 1 have other pictures \({row['id']}\)"):
        prepared(run, dataset)


def test_resumes_after_a_move_of_data_and_run(finished, tmp_path):
    run, dataset = finished
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    run.rename(moved / "run")
    assert prepared(moved / "run", dataset).folder.path == moved / "run"


def test_refuses_changed_captions(tiny_dataset, tmp_path):
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    captions, solutions = tmp_path / "captions.json", tmp_path / "solutions.json"
    captions.write_text(json.dumps({"captions": {row["id"]: "A picture." for row in rows}}))
    solutions.write_text(json.dumps({row["id"]: "Because." for row in rows}))
    options = ("--captions", captions, "--target_column", f"rationale={solutions}")
    prepared(tmp_path / "run", tiny_dataset, *options).lock.__exit__(None, None, None)
    captions.write_text(json.dumps({"captions": {row["id"]: "A drawing." for row in rows}}))
    with pytest.raises(ValueError, match="Of 40 train problems 40 have other texts.*Of 12 val problems 12 have"):
        prepared(tmp_path / "run", tiny_dataset, *options)


def test_refuses_a_changed_base_checkpoint_or_tokenizer(tiny_dataset, tiny_run, tmp_path):
    torch.manual_seed(0)
    size = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    base = tmp_path / "base"
    for file in (tiny_run / "hub").glob("tokenizer*"):
        base.mkdir(exist_ok=True)
        shutil.copy(file, base)
    recipe = tmp_path / "recipe.yaml"
    text = TINY_RECIPE.read_text().replace("tokenizer_vocab_size: 300", f"model_name_or_path: {base}")
    lines = [line for line in text.splitlines() if not line.startswith(("text_config", "vision_config", "image_proc"))]
    lines = [line for line in lines if "num_attention_heads" not in line]
    recipe.write_text("\n".join(lines))
    config = T5Config(**size, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(base)
    words = ["--config", str(recipe), "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "run")]
    words += ["--max_images", "0"]
    prepare(parse_recipe(words)).lock.__exit__(None, None, None)
    T5ForConditionalGeneration(config).save_pretrained(base)
    with pytest.raises(ValueError, match="model_name_or_path has different content"):
        prepare(parse_recipe(words))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["lstrip"] = not tokenizer["added_tokens"][-1]["lstrip"]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizer has different content. model_name_or_path has different content"):
        prepare(parse_recipe(words))


def test_refuses_changed_features(store, tiny_dataset, tmp_path):
    features = tmp_path / "features"
    shutil.copytree(store, features)
    recipe = tmp_path / "recipe.yaml"
    lines = TINY_RECIPE.read_text().splitlines()
    lines = [line for line in lines if not line.startswith(("vision_config", "image_proc")) and "num_att" not in line]
    recipe.write_text("\n".join(lines))
    words = ["--config", str(recipe), "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "run")]
    words += ["--features", str(features)]
    prepare(parse_recipe(words)).lock.__exit__(None, None, None)
    rows = bytearray((features / "rows.bin").read_bytes())
    rows[100] ^= 255
    (features / "rows.bin").write_bytes(rows)
    with pytest.raises(ValueError, match="features has different content"):
        prepare(parse_recipe(words))


@pytest.mark.slow
def test_command_reports_changed_data_in_one_line(finished):
    run, dataset = finished
    rewrite(dataset, with_other_questions)
    words = ("--config", TINY_RECIPE, "--dataset", dataset, "--output_dir", run)
    result = run_script("train.py", *words, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: {run} contains a run that started with different data: ")
