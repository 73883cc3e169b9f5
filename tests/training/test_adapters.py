"""Stages as adapters of one base: training, saving, loading from the export, switching, merging, an unchanged base."""

import json
import shutil

import pytest
import torch
from conftest import LORA, TINY_RECIPE, run_isolated, run_script, tiny_model
from peft import PeftModelForSeq2SeqLM
from safetensors.torch import load_file, save_file
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import ModelConfig

from mmcot.hub.merging import shared_modules
from mmcot.prediction.system import load_system
from mmcot.recipes.recipe import parse_recipe
from mmcot.train import main
from mmcot.training.adapters import adapt, check_adapters, quantization
from mmcot.training.preparation import prepare
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.inference_mmcot import run_stages

STAGES = ("rationale", "answer")


def train(recipe, folder, *options, check=True):
    return run_script("train.py", "--config", recipe, "--output_dir", folder, *options, check=check)


@pytest.fixture
def problems(tiny_dataset):
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    return [
        {
            "image": [str(tiny_dataset.parent / name) for name in row["images"]] or None,
            **{name: row[name] for name in ("id", "question", "choices", "context")},
        }
        for row in rows
    ]


def merged(hub, stage):
    """A stage's whole model, merged by PEFT."""
    base = MMCoTForConditionalGeneration.from_pretrained(hub)
    model = PeftModelForSeq2SeqLM.from_pretrained(base, hub, subfolder=stage).merge_and_unload()
    model.generation_config = model.generation_config.from_pretrained(hub, f"{stage}/generation_config.json")
    return model.eval()


def test_run_contains_one_base_and_an_adapter_for_each_stage(adapter_run):
    hub = adapter_run / "hub"
    assert (hub / "model.safetensors").read_bytes() == (adapter_run / "base" / "model.safetensors").read_bytes()
    assert not (hub / "adapter_config.json").exists(), "a repository id would lead to another base"
    assert json.loads((hub / "config.json").read_text())["stage_adapters"] == list(STAGES)
    for stage in STAGES:
        files = sorted(file.name for file in (hub / stage).iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors", "generation_config.json"]
        adapter = load_file(hub / stage / "adapter_model.safetensors")
        assert any("fusion" in name for name in adapter) and any(name.endswith("q.lora_B.weight") for name in adapter)
        assert not any("vision_tower" in name for name in adapter)
        assert str(adapter_run) not in (hub / stage / "adapter_config.json").read_text()
    fusions = [load_file(hub / stage / "adapter_model.safetensors") for stage in STAGES]
    for name, tensor in fusions[0].items():
        assert not torch.equal(tensor, fusions[1][name]), f"{name} was not trained"


@pytest.mark.parametrize("source", [pytest.param("folder", marks=pytest.mark.slow), "repository"])
def test_export_answers_like_merged_models_with_one_base(adapter_run, problems, tmp_path, source):
    hub, name = adapter_run / "hub", "model"
    if source == "folder":
        shutil.copytree(hub, tmp_path / name)
    else:
        name, commit = "user/model", "a" * 40
        repository = tmp_path / "hf_home" / "hub" / "models--user--model"
        shutil.copytree(hub, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    answers, size, num_bases, is_base = run_isolated(
        """
        name = sys.argv[1]
        answer = pipeline("multimodal-cot", model=name, trust_remote_code=True)
        answers = answer(json.load(open("problems.json")), batch_size=5)
        models = list(answer.models.values())
        size = sum(tensor.nbytes for tensor in {id(t): t for m in models for t in m.parameters()}.values())
        plain = AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=True).state_dict()
        adapted = models[0].state_dict().items()
        base = {key.replace(".base_layer", "").replace("original_module.", ""): tensor for key, tensor in adapted}
        is_base = all(torch.equal(base[key], tensor) for key, tensor in plain.items())
        print(json.dumps([answers, size, len({id(model) for model in models}), is_base]))
        """,
        tmp_path,
        name,
        needs="peft accelerate",
    )
    models = {stage: merged(hub, stage) for stage in STAGES}
    processor = MMCoTProcessor.from_pretrained(hub)
    images = [problem["image"] for problem in problems]
    rows = [{**problem, "caption": ""} for problem in problems]
    expected = run_stages(models, processor, rows, images)
    for answer, columns in zip(answers, expected, strict=True):
        assert answer["rationale"] == columns["rationale"] and answer["answer_index"] == columns["answer"]
        assert answer["scores"] == pytest.approx(columns["scores"], abs=1e-5)
    assert num_bases == 1 and is_base
    adapters = sum((hub / stage / "adapter_model.safetensors").stat().st_size for stage in STAGES)
    assert size <= (hub / "model.safetensors").stat().st_size + adapters


def test_export_names_peft_if_it_is_missing(adapter_run, tmp_path):
    shutil.copytree(adapter_run / "hub", tmp_path / "model")
    message = run_isolated(
        """
        try:
            pipeline("multimodal-cot", model="model", trust_remote_code=True)
        except ImportError as error:
            print(json.dumps(str(error)))
        """,
        tmp_path,
    )
    assert "pip install peft" in message


def test_predict_repeats_the_predictions_of_the_run(adapter_run, tiny_dataset, tmp_path):
    output = tmp_path / "test.json"
    options = ("--dataset", tiny_dataset, "--decode_answer", "--batch_size", "16")
    run_script("-m", "mmcot.predict", adapter_run, *options, "--output", output)
    assert output.read_bytes() == (adapter_run / "predictions" / "test.json").read_bytes()


def test_switches_adapter_and_generation_config_by_stage(adapter_run):
    _, models = load_system(str(adapter_run))
    limits, weights = [], []
    for stage in (*STAGES, *STAGES):
        model = models[stage]
        limits.append(model.generation_config.max_new_tokens)
        fusion = load_file(adapter_run / "hub" / stage / "adapter_model.safetensors")
        name = next(name for name in fusion if name.endswith("vision_gate.weight"))
        weights.append(torch.equal(model.encoder.fusion.vision_gate.weight, fusion[name]))
    assert limits == [12, 16, 12, 16] and all(weights)


@pytest.mark.slow
def test_merged_stages_are_whole_models_with_equal_answers(adapter_run, adapter_recipe, tmp_path):
    train(adapter_recipe, tmp_path / "run", *LORA, "--merge_adapters", "true")
    hub = tmp_path / "run" / "hub"
    assert not list(hub.rglob("adapter_*")) and not (tmp_path / "run" / "base").exists()
    assert (hub / "rationale" / "model.safetensors").exists()
    assert not any("lora" in name or "modules_to_save" in name for name in load_file(hub / "model.safetensors"))
    whole, adapted = (
        json.loads((folder / "predictions" / "test.json").read_text()) for folder in (tmp_path / "run", adapter_run)
    )
    for problem_id, columns in adapted.items():
        assert whole[problem_id]["rationale"] == columns["rationale"]
        assert whole[problem_id]["scores"] == pytest.approx(columns["scores"], abs=1e-5)


@pytest.mark.slow
def test_merges_a_bfloat16_base_in_bfloat16(adapter_recipe, tmp_path):
    options = ("--dtype", "bfloat16", "--bf16", "true", "--merge_adapters", "true", "--max_steps", "2")
    train(adapter_recipe, tmp_path / "run", *LORA, *options)
    weights = load_file(tmp_path / "run" / "hub" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert (tmp_path / "run" / "predictions" / "test.json").exists()


@pytest.mark.slow
def test_saves_a_trained_tower_for_each_stage(adapter_recipe, problems, tmp_path):
    train(adapter_recipe, tmp_path / "run", *LORA, "--lora_modules_to_save", "vision_tower", "--max_steps", "6")
    processor, models = load_system(str(tmp_path / "run"))
    apart = {stage: merged(tmp_path / "run" / "hub", stage) for stage in STAGES}
    towers = [apart[stage].encoder.vision_tower.state_dict() for stage in STAGES]
    assert not all(torch.equal(towers[1][name], tensor) for name, tensor in towers[0].items())
    images = [problem["image"] for problem in problems]
    rows = [{**problem, "caption": ""} for problem in problems]
    found = run_stages(models, processor, rows, images)
    expected = run_stages(apart, processor, rows, images)
    for columns, other in zip(found, expected, strict=True):
        assert columns["rationale"] == other["rationale"]
        assert columns["scores"] == pytest.approx(other["scores"], abs=1e-5)


@pytest.mark.slow
def test_resumes_an_interrupted_stage_with_identical_results(adapter_run, adapter_recipe, tmp_path):
    """The run is as if killed after the checkpoint of step 20 of the last stage."""
    folder = tmp_path / "run"
    shutil.copytree(adapter_run, folder)
    shutil.rmtree(folder / "hub")
    for file in ("train_results.json", "adapter_model.safetensors", "adapter_config.json"):
        (folder / "answer" / file).unlink()
    shutil.rmtree(folder / "answer" / "checkpoint-24")
    assert (folder / "answer" / "checkpoint-20").is_dir()
    for split in ("val", "test"):
        (folder / "predictions" / f"{split}.json").unlink()
    train(adapter_recipe, folder, *LORA)
    for name in ("answer/adapter_model.safetensors", "predictions/test.json"):
        assert (folder / name).read_bytes() == (adapter_run / name).read_bytes()


def test_training_an_adapter_does_not_change_the_base(batch, labels, tmp_path):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model, ModelConfig(use_peft=True, lora_r=2, lora_target_modules=["q", "wo"]))
    rows = [{name: tensor[row] for name, tensor in {**batch, "labels": labels}.items()} for row in range(3)]
    arguments = Seq2SeqTrainingArguments(
        tmp_path, max_steps=3, learning_rate=0.1, report_to="none", use_cpu=True, remove_unused_columns=False
    )
    Seq2SeqTrainer(adapted, arguments, train_dataset=rows).train()
    after = {
        name.replace(".base_layer", "").replace("original_module.", ""): tensor
        for name, tensor in model.state_dict().items()
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "fusion" in name for name in trained)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, {"q", "v"}),
        ({"lora_target_modules": ["wo"]}, {"wo"}),
        ({"lora_target_modules": "all-linear"}, {"q", "k", "v", "o", "wi", "wo"}),
        ({"lora_target_modules": [r".*decoder.*\.(k|o)"]}, {"k", "o"}),
        ({"lora_target_modules": ["q", "v"], "use_dora": True}, {"q", "v"}),
    ],
)
def test_adapts_the_selected_layers(options, layers):
    adapted = adapt(tiny_model(), ModelConfig(use_peft=True, **options))
    names = [name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name]
    assert {name.rsplit(".", 1)[-1] for name in names} == layers
    assert not any("vision_tower" in name or "fusion" in name for name in names)


def test_trains_float32_parameters_with_a_bfloat16_base():
    adapted = adapt(tiny_model().bfloat16(), ModelConfig(use_peft=True))
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in adapted.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_refuses_unknown_target_modules_and_lists_the_known_ones():
    layers = ["encoder.block.0.layer.0.SelfAttention.q", "lm_head"]
    for asked in (["q", "query"], ["query"], r".*decoder.*"):
        with pytest.raises(ValueError, match="matches no linear layer of the text model; expected one of lm_head, q"):
            check_adapters(ModelConfig(use_peft=True, lora_target_modules=asked), layers)
    check_adapters(ModelConfig(use_peft=True, lora_target_modules=["SelfAttention.q"]), layers)


def test_refuses_quantization_without_bitsandbytes_or_gpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="load_in_4bit is set, but needs bitsandbytes"):
        quantization(ModelConfig(use_peft=True, load_in_4bit=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="load_in_8bit is set, but needs a GPU"):
        quantization(ModelConfig(use_peft=True, load_in_8bit=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--lora_r", "4"), ("lora_r", "use_peft")),
        (("--merge_adapters", "true"), ("merge_adapters", "use_peft")),
        (("--use_peft", "true", "--lora_target_modules", "query", "value"), ("'query'", "q, v")),
        (("--use_peft", "true", "--dtype", "bfloat16"), ("bfloat16", "bf16: true")),
        (("--use_peft", "true", "--freeze_vision", "false"), ("freeze_vision", "lora_modules_to_save")),
        (("--use_peft", "true", "--load_in_4bit", "true", "--merge_adapters", "true"), ("merge_adapters", "quantized")),
    ],
)
def test_refuses_conflicting_settings_before_it_writes(options, expected, adapter_recipe, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(adapter_recipe), "--output_dir", str(tmp_path / "run"), *options])
    assert all(word in stopped.value.code for word in expected), stopped.value.code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["fusion", "shape"])
def test_refuses_an_adapter_with_other_names_or_shapes(adapter_run, tmp_path, change):
    shutil.copytree(adapter_run / "hub", tmp_path / "hub")
    file = tmp_path / "hub" / "answer" / "adapter_model.safetensors"
    tensors = load_file(file)
    if change == "fusion":
        tensors = {name.replace("vision_gate", "gate"): tensor for name, tensor in tensors.items()}
    else:
        tensors = {name: tensor[:, :8].contiguous() if "lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="adapter in .*answer was trained on another base or fusion"):
        load_system(str(tmp_path / "hub"))


def test_refuses_adapter_of_other_base_with_same_shape(adapter_run, tmp_path):
    """One weight of the base differs. Another dtype does not make it another base."""
    shutil.copytree(adapter_run / "hub", tmp_path / "hub")
    for dtype in (torch.bfloat16, torch.float16):
        load_system(str(tmp_path / "hub"), dtype)
    file = tmp_path / "hub" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("SelfAttention.q.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="adapter in .*rationale was trained on another base: sha256:.*, this one is sha"
    ):
        load_system(str(tmp_path / "hub"))


@pytest.mark.parametrize("asked", [{"lora_target_modules": ["q", "lm_head"]}, {"lora_modules_to_save": ["shared"]}])
def test_refuses_to_adapt_a_module_with_a_shared_weight(asked, tiny_dataset, tmp_path):
    """Because PEFT merges into the shared weight, which changes the embeddings with the head."""
    model = tiny_model()
    assert "lm_head" in shared_modules(model)
    with pytest.raises(ValueError, match="An adapter changes (lm_head|shared), which shares its weight"):
        adapt(model, ModelConfig(use_peft=True, **asked))
    words = [word for name, values in asked.items() for word in (f"--{name}", *values)]
    words = ["--config", TINY_RECIPE, "--dataset", tiny_dataset, "--output_dir", tmp_path / "run", *words]
    words += ["--use_peft", "true", "--merge_adapters", "true"]
    if "lora_target_modules" not in asked:
        words += ["--lora_target_modules", "q"]
    with pytest.raises(ValueError, match="shares its weight with"):
        prepare(parse_recipe([str(word) for word in words]))


def test_adapts_and_merges_an_untied_head(batch, labels):
    model = tiny_model(scale_decoder_outputs=False)
    assert "lm_head" not in shared_modules(model)
    adapted = adapt(model, ModelConfig(use_peft=True, lora_target_modules=["q", "lm_head"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = adapted.eval()(**batch, labels=labels).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch, labels=labels).logits, expected, rtol=1e-4, atol=1e-4)
