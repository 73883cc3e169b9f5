"""Stages with virtual tokens: decoding equal to PEFT's, training, saving, loading from the export alone."""

import json
import shutil

import pytest
import torch
from conftest import TINY_RECIPE, log_probability, run_isolated, run_script, tiny_model
from peft import get_peft_model
from safetensors.torch import load_file
from trl import ModelConfig

from mmcot.train import main
from mmcot.training.adapters import adapt, prompt_config
from modeling_mmcot.generation_mmcot import greedy_search
from modeling_mmcot.inference_mmcot import encode
from modeling_mmcot.loading_mmcot import StageAdapters

KINDS = ("PROMPT_TUNING", "PREFIX_TUNING")
NUM_VIRTUAL_TOKENS = 5
OPTIONS = ("--use_peft", "true", "--num_virtual_tokens", "5", "--learning_rate", "0.3")


@pytest.fixture(params=KINDS)
def prompted(request, build):
    """A model of PEFT with large virtual tokens and a fusion that differs from that of its base."""
    model = adapt(build(), ModelConfig(use_peft=True), False, request.param, NUM_VIRTUAL_TOKENS).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (2 if "prompt" in name else 0.1))
    return model


@pytest.fixture
def stage(prompted, build, tmp_path):
    """The same model, saved, and loaded as a stage over its base."""
    prompted.save_pretrained(tmp_path / "answer")
    prompted.get_base_model().generation_config.save_pretrained(tmp_path / "answer")
    return StageAdapters(build(), str(tmp_path), ["answer"])["answer"]


def test_decoding_from_shared_states_equals_the_forward_pass_of_peft(prompted, stage, build, batch, labels):
    with torch.no_grad():
        expected = prompted(**batch, labels=labels)
        found = stage(**encode(stage, batch), labels=labels)
    assert (found.logits - expected.logits).abs().max() < 1e-5
    plain = build()
    plain.encoder.fusion.load_state_dict(stage.encoder.fusion.modules_to_save["answer"].state_dict())
    with torch.no_grad():
        without = plain(**batch, labels=labels).logits
    assert (without - expected.logits).abs().max() > 1e-2, "the virtual tokens must change the logits"


def test_greedy_texts_have_the_highest_logits_of_peft(prompted, stage, batch):
    ours = stage.generate(**encode(stage, batch), custom_generate=greedy_search)
    assert torch.equal(ours, stage.generate(**encode(stage, batch)))
    for row, tokens in enumerate(ours):
        problem = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        with torch.no_grad():
            logits = prompted(**problem, decoder_input_ids=tokens[None, :-1]).logits[0]
        written = len(tokens) - 1
        if (tokens == 1).any():
            written = int((tokens == 1).nonzero()[0])  # because padding follows the end
        assert torch.equal(logits.argmax(dim=-1)[:written], tokens[1 : written + 1])


def test_beam_scores_equal_log_probabilities_of_peft(prompted, stage, batch):
    settings = {"num_beams": 3, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
    beams = stage.generate(**encode(stage, batch), **settings)
    for row, (tokens, score) in enumerate(zip(beams.sequences, beams.sequences_scores, strict=True)):
        ended = (tokens == 1).nonzero()[:1, 0]
        target = tokens[1 : int(ended[0]) + 1] if len(ended) else tokens[1:]
        problem = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        assert score.item() == pytest.approx(log_probability(prompted, problem, target).item(), abs=1e-4)


def test_choice_scores_equal_log_probabilities_of_peft(prompted, stage, batch):
    torch.manual_seed(4)
    choices = torch.randint(3, 60, (3, 4, 5))
    choices[:, :, :2] = choices[:, :1, :2]  # a shared prefix
    choices[1, 2:] = -100
    choices[2, 1, 4:] = -100
    encoded = encode(stage, batch)
    scores = stage.score_choices(choices, encoded["attention_mask"], encoded["encoder_outputs"])
    for row in range(3):
        problem = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for number, target in enumerate(choices[row]):
            target = target[target != -100]
            if len(target):
                expected = log_probability(prompted, problem, target)
                assert scores[row, number].item() == pytest.approx(expected.item(), abs=1e-4)
            else:
                assert scores[row, number] == -torch.inf


def test_prefix_fits_heads_of_another_width_than_the_states(batch, labels):
    """As in FLAN-T5-small, with 6 heads of width 64 and states of width 512."""
    model = adapt(tiny_model(d_kv=6), ModelConfig(use_peft=True), False, "PREFIX_TUNING", NUM_VIRTUAL_TOKENS)
    model(**batch, labels=labels).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


def test_skip_logits_preserves_the_loss_of_a_plain_peft_model(batch, labels):
    model = tiny_model()
    prompted = get_peft_model(model, prompt_config(model.config, "PREFIX_TUNING", NUM_VIRTUAL_TOKENS))
    losses = [prompted(**batch, labels=labels, skip_logits=skip).loss.item() for skip in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze_fusion", [False, True])
def test_trains_virtual_tokens_and_the_fusion_unless_frozen(kind, freeze_fusion):
    model = adapt(tiny_model().bfloat16(), ModelConfig(use_peft=True), freeze_fusion, kind, NUM_VIRTUAL_TOKENS)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("prompt_encoder" in name or "fusion" in name for name in trained)
    assert any("fusion" in name for name in trained) == (not freeze_fusion)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.fixture(scope="module")
def prompt_run(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "prompts"
    options = ("--config", TINY_RECIPE, "--dataset", tiny_dataset, "--output_dir", folder)
    run_script("train.py", *options, *OPTIONS, "--peft_type", "PROMPT_TUNING")
    return folder


@pytest.mark.slow
def test_export_repeats_the_predictions_of_the_run(prompt_run, tiny_dataset, tmp_path):
    shutil.copytree(prompt_run / "hub", tmp_path / "model")
    for stage in ("rationale", "answer"):
        adapter = load_file(tmp_path / "model" / stage / "adapter_model.safetensors")
        assert adapter["prompt_embeddings"].shape[0] == NUM_VIRTUAL_TOKENS
        assert all("fusion" in name for name in adapter.keys() - {"prompt_embeddings"}) and len(adapter) > 1
        config = json.loads((tmp_path / "model" / stage / "adapter_config.json").read_text())
        assert config["peft_type"] == "PROMPT_TUNING"
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    keys = ("question", "choices", "context")
    problems = [
        {
            "image": [str(tiny_dataset.parent / name) for name in row["images"]] or None,
            **{key: row[key] for key in keys},
        }
        for row in rows
    ]
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    answers = run_isolated(
        """
        answer = pipeline("multimodal-cot", model="model", trust_remote_code=True)
        print(json.dumps(answer(json.load(open("problems.json")), batch_size=4)))
        """,
        tmp_path,
        needs="peft accelerate",
    )
    predictions = json.loads((prompt_run / "predictions" / "test.json").read_text())
    for row, answer in zip(rows, answers, strict=True):
        assert answer["rationale"] == predictions[row["id"]]["rationale"]
        assert answer["scores"] == pytest.approx(predictions[row["id"]]["scores"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_an_interrupted_stage_with_identical_results(kind, tiny_dataset, tmp_path):
    """The run is as if killed after the checkpoint of step 20 of the last stage."""
    options = ("--config", TINY_RECIPE, "--dataset", tiny_dataset, *OPTIONS, "--peft_type", kind)
    run_script("train.py", *options, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "hub")
    for file in ("train_results.json", "adapter_model.safetensors", "adapter_config.json", "checkpoint-24"):
        path = tmp_path / "killed" / "answer" / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for split in ("val", "test"):
        (tmp_path / "killed" / "predictions" / f"{split}.json").unlink()
    assert (tmp_path / "killed" / "answer" / "checkpoint-20").is_dir()
    run_script("train.py", *options, "--output_dir", tmp_path / "killed")
    for name in ("answer/adapter_model.safetensors", "predictions/test.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--peft_type", "PROMPT_TUNING"), ("peft_type", "use_peft: true")),
        (("--use_peft", "true", "--peft_type", "IA3"), ("'IA3'", "LORA, PROMPT_TUNING, PREFIX_TUNING")),
        (("--use_peft", "true", "--num_virtual_tokens", "9"), ("num_virtual_tokens", "LORA")),
        ((*OPTIONS, "--peft_type", "PROMPT_TUNING", "--lora_r", "4"), ("lora_r", "found PROMPT_TUNING")),
        ((*OPTIONS, "--peft_type", "PREFIX_TUNING", "--merge_adapters", "true"), ("merge_adapters", "PREFIX_TUNING")),
        ((*OPTIONS, "--peft_type", "PREFIX_TUNING", "--gradient_checkpointing", "true"), ("gradient_checkpointing",)),
        (("--use_peft", "true", "--peft_type", "PREFIX_TUNING", "--num_virtual_tokens", "0"), ("1 or more",)),
    ],
)
def test_refuses_conflicting_settings_before_it_writes(options, expected, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(TINY_RECIPE), "--output_dir", str(tmp_path / "run"), *options])
    assert all(word in stopped.value.code for word in expected), stopped.value.code
    assert not (tmp_path / "run").exists()
