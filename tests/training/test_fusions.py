"""Runs with each fusion: the trained system answers in a fresh process as in the run, whole and as adapters."""

import json

import pytest
import torch
import yaml
from conftest import LORA, TINY_RECIPE, pipeline_problems, run_isolated, run_script, tiny_model
from transformers import Seq2SeqTrainingArguments

from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json
from mmcot.storage.run_folder import RunFolder
from mmcot.training.building import build_model
from mmcot.training.trainer import StageTrainer
from modeling_mmcot.fusion_mmcot import FUSIONS

OPTIONS = {"resampler": {"num_latents": 3, "num_layers": 1}}
ANSWERS = """
answer = pipeline("multimodal-cot", model="hub", trust_remote_code=True)
problems = json.load(open("problems.json"))
print(json.dumps({problem["id"]: answer(problem) for problem in problems}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fusion", "adapts"),
    [(name, False) for name in FUSIONS if name not in ("gated", "gated_mha")] + [("prefix", True), ("flamingo", True)],
)
def test_exported_system_answers_in_fresh_process_like_run(fusion, adapts, adapter_recipe, tiny_dataset, tmp_path):
    recipe = adapter_recipe if adapts else TINY_RECIPE
    values = {**yaml.safe_load(recipe.read_text()), "fusion": fusion, "fusion_options": OPTIONS.get(fusion)}
    recipe, run = tmp_path / "recipe.yaml", RunFolder(tmp_path / "run")
    recipe.write_text(yaml.safe_dump(values))
    words = ("--config", recipe, "--dataset", tiny_dataset, "--output_dir", run.path, "--report_problems", "4")
    run_script("train.py", *words, *(LORA if adapts else ()))
    config = read_json(run.hub / "config.json")
    assert config["fusion"] == fusion and config["fusion_options"] == OPTIONS.get(fusion)
    assert f"and the fusion `{fusion}`" in (run.hub / "README.md").read_text()
    (run.path / "problems.json").write_text(json.dumps(pipeline_problems(tiny_dataset)))
    found = run_isolated(ANSWERS, run.path, needs="peft accelerate" if adapts else "")
    predictions = run.predictions_so_far("test")
    assert found.keys() == predictions.keys()
    for problem_id, result in found.items():
        columns = predictions[problem_id]
        assert result["rationale"] == columns["rationale"] and result["answer_index"] == columns["answer"]
        assert result["scores"] == pytest.approx(columns["scores"], abs=1e-5)


def test_gates_of_flamingo_do_not_decay(tmp_path):
    model = tiny_model(fusion="flamingo")
    trainer = StageTrainer(model, Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    decaying = set(trainer.get_decay_parameter_names(model))
    fusion = {name for name, _ in model.named_parameters() if ".fusion." in name}
    assert {name.rsplit(".", 1)[-1] for name in fusion - decaying} == {
        *("attention_gate", "feed_forward_gate", "weight", "bias")
    }
    assert all("norm" in name or name.endswith("_gate") for name in fusion - decaying)
    matrices = {name for name, parameter in model.named_parameters() if ".fusion." in name and parameter.dim() == 2}
    assert matrices <= decaying and len(matrices) == 2 * 6


def test_replacing_the_fusion_of_an_initial_checkpoint_keeps_text_model_and_tower(tmp_path):
    model = tiny_model(fusion="gated")
    model.save_pretrained(tmp_path / "initial")
    values = {**yaml.safe_load(TINY_RECIPE.read_text()), "text_config": None, "vision_config": None}
    values |= {"model_name_or_path": str(tmp_path / "initial"), "fusion": "flamingo", "fusion_options": {"every": 2}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="has the fusion 'gated'"):
        build_model(parse_recipe(["--config", str(recipe)]), None, None)
    built = build_model(parse_recipe(["--config", str(recipe), "--replace_fusion", "true"]), None, None)
    before, after = model.state_dict(), built.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if ".fusion." not in name)
    assert [index for index, block in enumerate(built.encoder.block) if hasattr(block, "fusion")] == [0]
