"""The reports of a training beside its loss, which do not change its results; frozen parts of a model."""

import pytest
import torch
import yaml
from conftest import TINY_RECIPE
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmcot.pictures.pixel_store import PixelStore
from mmcot.problems.sources import load_problems
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json
from mmcot.train import main
from mmcot.training.progress import Speed, ValidationReport, plot_curves
from mmcot.training.stage import training_arguments
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor

STAGES = ("rationale", "answer")


@pytest.fixture(scope="module")
def reporting_run(tiny_dataset, tmp_path_factory):
    """The run of `tiny_run`, with reports."""
    folder = tmp_path_factory.mktemp("reporting") / "run"
    options = ["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(folder)]
    main([*options, "--report_problems", "12", "--report_to", "tensorboard"])
    return folder


def history(run, stage: str) -> list[dict]:
    return read_json(run / stage / "train_results.json")["log_history"]


@pytest.mark.slow
def test_reports_do_not_change_the_results(reporting_run, tiny_run):
    for file in ("rationale/model.safetensors", "answer/model.safetensors", "predictions/test.json"):
        assert (reporting_run / file).read_bytes() == (tiny_run / file).read_bytes()


@pytest.mark.slow
def test_last_report_equals_the_validation_scores_of_the_run(reporting_run):
    scores = read_json(reporting_run / "scores/val.json")
    reports = {stage: [entry for entry in history(reporting_run, stage) if "eval_gate" in entry] for stage in STAGES}
    last = {stage: entries[-1] for stage, entries in reports.items()}
    assert {entry["step"] for entry in last.values()} == {24}
    for name in ("bleu1", "bleu4", "rougeL"):
        assert last["rationale"][f"eval_{name}"] == scores["rationale"][name]
    for name, value in scores["accuracy"].items():
        assert last["answer"].get(f"eval_accuracy_{name}") == value


@pytest.mark.slow
def test_writes_examples_with_pictures_and_texts(reporting_run, tiny_dataset):
    text = (reporting_run / "rationale/reports/step-24.md").read_text()
    written = read_json(reporting_run / "predictions/val.json")
    number, problem = next(
        (number, row) for number, row in enumerate(load_problems(str(tiny_dataset), "val")) if row["images"]
    )
    assert problem["question"] in text and f"- written: {written[problem['id']]['rationale']}" in text
    assert problem["solution"] in text
    with Image.open(reporting_run / f"rationale/reports/pictures/{number}-0.png") as picture:
        assert picture.size == (96, 96)


@pytest.mark.slow
def test_reports_curves_speed_and_memory(reporting_run):
    with Image.open(reporting_run / "answer/curves.png") as curves:
        assert curves.width > curves.height  # several panels
    for entry in history(reporting_run, "answer"):
        if "loss" in entry:
            assert entry["tokens_per_second"] > entry["problems_per_second"] > 0 and entry["memory_gb"] > 0.1


@pytest.mark.slow
def test_reports_scalars_to_tensorboard(reporting_run):
    (events,) = (reporting_run / "answer").rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    steps = [event.step for event in accumulator.Scalars("eval/accuracy_Avg")]
    assert steps == [12, 24]
    assert {"train/loss", "train/tokens_per_second", "eval/gate"} <= set(accumulator.Tags()["scalars"])


@pytest.mark.parametrize(("run_name", "expected"), [([], "run"), (["--run_name", "mine"], "mine")])
def test_names_reports_of_stages_and_folds_by_their_run(tiny_dataset, tmp_path, run_name, expected):
    options = ["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "run")]
    recipe = parse_recipe([*options, *run_name])
    for folder in ("rationale", "folds/0/rationale"):
        arguments = training_arguments(recipe.training_arguments, recipe.stages[0], tmp_path / "run" / folder)
        assert arguments.run_name == f"{expected}/{folder}"


def test_reports_the_gate_by_position_of_real_tokens(tiny_run, tiny_dataset, tmp_path):
    """With zero weights, the gate of every token is 0.5."""
    processor = MMCoTProcessor.from_pretrained(tiny_run / "hub")
    model = MMCoTForConditionalGeneration.from_pretrained(tiny_run / "rationale")
    for name in ("language_gate", "vision_gate"):
        torch.nn.init.zeros_(getattr(model.encoder.fusion, name).weight)
    problems = load_problems(str(tiny_dataset), "val")
    pictures = PixelStore(problems, processor.image_processor)
    report = ValidationReport(processor, processor.stages[0], problems, {}, pictures, tmp_path, batch_size=16)
    gate = report.gate_by_position(model, {})
    with_picture = [bool(images) for images in problems["images"]]
    seeing = [row for row, sees in zip(problems.remove_columns("images"), with_picture, strict=True) if sees]
    longest = max(len(processor.tokenizer(processor.stages[0].render_source(row))["input_ids"]) for row in seeing)
    assert gate.shape == (longest,) and torch.equal(gate, torch.full_like(gate, 0.5))


def test_speed_counts_real_tokens():
    speed = Speed(num_processes=1)
    speed.count({"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[5, -100, -100]])})
    speed.begin -= 1  # a second ago
    report = speed.report()
    assert report["tokens_per_second"] == pytest.approx(3, abs=1)
    assert report["problems_per_second"] == pytest.approx(1, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [[], ["--dtype", "bfloat16", "--bf16", "true"]], ids=["float32", "bfloat16"])
def test_reports_with_adapters(tiny_dataset, tmp_path, dtype):
    options = ["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "run")]
    options += ["--report_problems", "4", "--use_peft", "true", "--max_steps", "12", "--save_strategy", "no"]
    main([*options, *dtype])
    assert (tmp_path / "run/answer/reports/step-12.md").exists()
    assert any("eval_gate" in entry for entry in history(tmp_path / "run", "answer"))


def test_writes_no_curves_without_history(tmp_path):
    plot_curves([], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


# Frozen parts.


def train_first_stage(tiny_dataset, folder, *options: str) -> list[dict]:
    """The first stage's weights before training, from a run with a learning rate of 0, and after training."""
    weights = []
    command = ["--config", str(folder / "recipe.yaml"), "--dataset", str(tiny_dataset), *options]
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    recipe.update(max_steps=2, eval_strategy="no", save_strategy="no", decode_answer=False)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, rate in (("before", "0"), ("after", "1e-2")):
        main([*command, "--output_dir", str(folder / name), "--learning_rate", rate])
        weights.append(load_file(folder / name / "rationale/model.safetensors"))
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text", "fusion"])
def test_training_changes_all_parts_except_the_frozen_one(tiny_dataset, tmp_path, part):
    before, after = train_first_stage(tiny_dataset, tmp_path, f"--freeze_{part}", "true")
    for name, tensor in before.items():
        is_fusion = ".fusion." in name
        is_frozen = is_fusion if part == "fusion" else not is_fusion and ".vision_tower." not in name
        if is_frozen:
            assert torch.equal(after[name], tensor), name
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert any(".vision_tower." in name for name in changed)
    assert any(".fusion." in name for name in changed) == (part == "text")
    assert ("shared.weight" in changed) == (part == "fusion")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--freeze_text", "true", "--use_peft", "true"], "with use_peft the text model is never trained"),
        (["--freeze_text", "true", "--freeze_fusion", "true"], "leave nothing to train on problems without picture"),
        (["--freeze_text", "true", "--max_images", "0"], "the stage 'rationale' reads no pictures"),
    ],
)
def test_refuses_settings_that_leave_nothing_to_train(tiny_dataset, tmp_path, options, error):
    command = ["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=error):
        main([*command, *options])
