"""Choices of different lengths: whole targets are scored by their total, mean or calibrated log-probability."""

import json

import pytest
import torch
import yaml
from conftest import TINY_RECIPE, log_probability, run_script, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmcot.recipes.arguments import StageArguments
from mmcot.recipes.recipe import parse_recipe
from mmcot.training.building import build_stage, build_stages
from mmcot.training.preparation import prepare
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.inference_mmcot import choose_answers, encode
from modeling_mmcot.stage_mmcot import SCORES

WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, 60)}}
LONG = " ".join(f"w{number}" for number in range(7, 40))
PROBLEM = {"question": "w3 w4", "context": "w40 w41", "choices": [LONG, f"{LONG} w50", f"{LONG} w50 w5"]}


def processor_of(score, max_target_length=4):
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    stage = {
        "name": "answer",
        "reads": ["question", "context", "choices"],
        "writes": "answer_text",
        "source": "{{ question }} w51 {{ context }} w52 {{ choices | join(' w53 ') }}",
        "target": "{{ choices[answer] }}",
        "max_target_length": max_target_length,
        "score": score,
    }
    return MMCoTProcessor(tokenizer, None, [stage])


def log_probabilities(model, processor, source):
    """The log-probabilities of the whole targets, each from a separate pass, and the targets' lengths."""
    inputs = processor(text=source)
    targets = [processor.tokenizer(text, return_tensors="pt")["input_ids"][0] for text in PROBLEM["choices"]]
    return torch.stack([log_probability(model, inputs, target) for target in targets]), [len(one) for one in targets]


@torch.no_grad()
@pytest.mark.parametrize("score", SCORES)
def test_scores_choices_by_their_whole_targets(score):
    """Cut to `max_target_length`, 4 tokens, all targets would be equal."""
    model, processor = tiny_model(vision_config=None), processor_of(score)
    stage = processor.stages[0]
    totals, lengths = log_probabilities(model, processor, stage.render_source(PROBLEM))
    without, _ = log_probabilities(model, processor, f"w51 w52 {' w53 '.join(PROBLEM['choices'])}")
    expected = {"total": totals, "mean": totals / torch.tensor(lengths), "calibrated": totals - without}[score]
    inputs = processor(PROBLEM, stage="answer")
    (found,) = choose_answers(model, processor, stage, [PROBLEM], encode(model, dict(inputs)))
    torch.testing.assert_close(torch.tensor(found["scores"]), expected.softmax(dim=0), rtol=1e-3, atol=1e-6)
    assert found["answer"] == int(expected.argmax())
    assert found["scores"][1] != found["scores"][2]


def test_saves_and_loads_the_score_of_a_stage(tmp_path):
    processor_of("calibrated").save_pretrained(tmp_path)
    assert MMCoTProcessor.from_pretrained(tmp_path).stages[0].score == "calibrated"
    with pytest.raises(ValueError, match="score of a stage is 'median'; expected one of total, mean, calibrated"):
        processor_of("median")


def test_defaults_to_mean_score_for_texts_and_total_score_for_letters():
    common = {
        "name": "answer",
        "reads": ["question", "context", "choices"],
        "writes": "answer_text",
        "template": "QCM-A",
    }
    assert build_stage(StageArguments(**common)).score == "total"
    text = "The answer is {{ choices[answer] }}."
    assert build_stage(StageArguments(**common, target=text)).score == "mean"
    assert build_stage(StageArguments(**common, target=text, score="total")).score == "total"


def recipe_with(tmp_path, tiny_dataset, **changes):
    values = yaml.safe_load(TINY_RECIPE.read_text())
    values["stages"][1].update(changes)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return ["--config", str(file), "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "run")]


def test_warns_about_total_score_with_targets_of_different_lengths(tmp_path, tiny_dataset, caplog):
    text = {"target": "The answer is {{ choices[answer] }}."}
    with caplog.at_level("WARNING"):
        prepare(parse_recipe(recipe_with(tmp_path, tiny_dataset, **text, score="total")))
    assert "of 12 validation problems the choices' targets differ in length" in caplog.text


def test_refuses_an_unknown_score_and_a_score_without_choices(tmp_path, tiny_dataset):
    with pytest.raises(ValueError, match="stage 'answer' has score 'best'; expected one of total, mean, calibrated"):
        parse_recipe(recipe_with(tmp_path, tiny_dataset, score="best"))
    words = recipe_with(tmp_path, tiny_dataset)
    values = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    values["stages"][0]["score"] = "mean"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(
        ValueError, match="stage 'rationale' has score 'mean', which has no effect on a stage of kind 'generate'"
    ):
        parse_recipe(words)


@pytest.mark.slow
def test_run_uses_the_score_of_its_recipe(tmp_path, tiny_dataset):
    words = recipe_with(tmp_path, tiny_dataset, score="calibrated")
    run_script("train.py", *words, "--max_steps", "2")
    run = tmp_path / "run"
    assert json.loads((run / "hub" / "processor_config.json").read_text())["stages"][1]["score"] == "calibrated"
    meta = json.loads((run / "predictions" / "test.meta.json").read_text())
    assert meta["stages"][1]["score"] == "calibrated"


def test_refuses_a_source_template_with_a_column_that_the_stage_does_not_read():
    common = {
        "name": "answer",
        "reads": ["question", "choices"],
        "writes": "answer_text",
        "target": "{{ choices[answer] }}",
    }
    with pytest.raises(
        ValueError, match="stage 'answer': its source cannot be rendered from the columns that it reads .*'context'"
    ):
        build_stages([StageArguments(**common, source="{{ question }} {{ context }}")])
    with pytest.raises(ValueError, match="its source cannot be rendered"):
        build_stages([StageArguments(**common, source="{{ question }")])
    common["target"] = "{{ choices[answer] }} because {{ lecture }}"
    with pytest.raises(ValueError, match="its target cannot be rendered for a choice, without gold columns: 'lecture'"):
        build_stages([StageArguments(**common, source="{{ question }}")])
