"""Every option of the Trainer and of `trl.ModelConfig` works in a run, or is refused by name before data is read."""

import dataclasses
import itertools
import json

import pytest
import yaml
from conftest import TINY_RECIPE
from transformers import Seq2SeqTrainingArguments
from trl import ModelConfig

from mmcot.problems.demo import generate
from mmcot.recipes.recipe import parse_recipe
from mmcot.recipes.trainer_options import REFUSED
from mmcot.train import main

WORKERS = {"dataloader_num_workers": 1}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
PEFT = {"use_peft": True, "lora_target_modules": ["q"]}
# Each option trains to the end with this value and its settings in REQUIRED_SETTINGS.
WORKS = {
    "per_device_train_batch_size": 3,
    "num_train_epochs": 0.5,
    "max_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-5},
    "warmup_steps": 1,
    "optim": "adafactor",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "gradient_accumulation_steps": 2,
    "average_tokens_across_devices": False,
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.1,
    "bf16": True,
    "fp16": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "torch_empty_cache_steps": 1,
    "logging_strategy": "epoch",
    "logging_steps": 1,
    "logging_first_step": True,
    "log_on_each_node": False,
    "log_level": "info",
    "log_level_replica": "error",
    "disable_tqdm": True,
    "report_to": "none",
    "run_name": "name",
    "project": "name",
    "eval_strategy": "epoch",
    "eval_steps": 1,
    "eval_delay": 1,
    "per_device_eval_batch_size": 3,
    "eval_on_start": True,
    "save_only_model": True,
    "save_strategy": "best",
    "save_steps": 1,
    "save_on_each_node": True,
    "save_total_limit": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
    "full_determinism": True,
    "seed": 5,
    "data_seed": 5,
    "use_cpu": True,
    "accelerator_config": {"split_batches": True},
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "fork",
    "dataloader_in_order": False,
    "train_sampling_strategy": "sequential",
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 10,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
    "ddp_timeout": 60,
    "local_rank": 0,
    "skip_memory_metrics": False,
    "dtype": "bfloat16",
    "attn_implementation": "eager",
    "use_peft": True,
    "lora_r": 2,
    "lora_alpha": 3,
    "lora_dropout": 0.1,
    "lora_target_modules": ["k"],
    "lora_modules_to_save": ["final_layer_norm"],
    "use_rslora": True,
    "use_dora": True,
}
REQUIRED_SETTINGS = {
    "lr_scheduler_type": {"lr_scheduler_kwargs": {"min_lr": 1e-5}},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr"},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
    "save_strategy": BEST,
    "load_best_model_at_end": BEST,
    "metric_for_best_model": BEST,
    "greater_is_better": BEST,
    "num_train_epochs": {"max_steps": -1},
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"), WORKERS),
    **dict.fromkeys(("dataloader_multiprocessing_context", "dataloader_in_order"), WORKERS),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_modules_to_save", "use_rslora", "use_dora"), PEFT),
    "lora_target_modules": {"use_peft": True},
}
# Options that a run on this machine cannot test, and why.
NOT_TESTED_HERE = {
    "output_dir": "every run sets it",
    "optim_args": "for optimizers of libraries that are not installed",
    "tf32": "needs a GPU",
    **dict.fromkeys(("fsdp", "fsdp_config", "ddp_backend"), "needs several processes (test_distributed.py)"),
    "deepspeed": "needs deepspeed and a GPU",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "compiles for five minutes"),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "needs the Hub"),
    "model_name_or_path": "test_text_models.py",
    "model_revision": "test_hub_options.py",
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type"), "needs a GPU"),
    **dict.fromkeys(("use_bnb_nested_quant", "bnb_4bit_quant_storage"), "needs a GPU"),
}
OPTIONS = {field.name: field for cls in (Seq2SeqTrainingArguments, ModelConfig) for field in dataclasses.fields(cls)}


def write_recipe(tmp_path, **settings):
    """Write a recipe of one stage and problems without pictures; return the arguments of the command."""
    values = yaml.safe_load(TINY_RECIPE.read_text())
    stage = {**values["stages"][1], "reads": ["question", "context", "choices"], "template": "QCM-A"}
    for name in ("vision_config", "image_processor"):
        del values[name]
    plain = {"max_images": 0, "max_steps": 2, "eval_steps": 2, "save_steps": 2, "decode_answer": False}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, **plain, "stages": [stage], **settings}))
    rows = itertools.islice((row for row in generate("val") if not row["images"]), 24)
    splits = ["train"] * 16 + ["val"] * 4 + ["test"] * 4
    data = tmp_path / "problems.jsonl"
    lines = [json.dumps({**row, "split": split}) for row, split in zip(rows, splits, strict=True)]
    data.write_text("\n".join(lines))
    return ["--config", str(file), "--dataset", str(data), "--output_dir", str(tmp_path / "run")]


def test_every_option_is_in_exactly_one_list():
    lists = [set(WORKS), set(REFUSED), set(NOT_TESTED_HERE)]
    assert set(OPTIONS) <= set().union(*lists), set(OPTIONS) - set().union(*lists)
    for one, other in itertools.combinations(lists, 2):
        assert not one & other


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refuses_unsupported_option_before_reading_data(name, tmp_path):
    if name not in OPTIONS:
        pytest.skip("this version of the library has no such option")
    default = OPTIONS[name].default
    value = (not default) if isinstance(default, bool) else 1
    value = {
        "include_num_input_tokens_seen": True,
        "hub_strategy": "end",
        "debug": "underflow_overflow",
        "parallelism_config": None,
    }.get(name, value)
    words = write_recipe(tmp_path, **{name: value})
    (tmp_path / "problems.jsonl").unlink()
    with pytest.raises(ValueError, match=f"{name} is set, which is not supported: ") as error:
        parse_recipe(words)
    assert REFUSED[name] in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "galore_adamw"}, "optim is 'galore_adamw', which cannot be used"),
        ({"optim_args": "foo=1"}, "optim_args is 'foo=1', which has no effect on adamw_torch"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "'linear' with lr_scheduler_kwargs {'foo': 1} cannot be used"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model is 'accuracy'; expected eval_loss"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config has dispatch_batches"),
        ({"dataloader_persistent_workers": True}, "requires dataloader_num_workers of 1 or more"),
        ({"model_revision": "v1"}, "model_revision is set, which requires model_name_or_path"),
        ({"bnb_4bit_quant_type": "fp4", **PEFT}, "bnb_4bit_quant_type is set, which requires load_in_4bit"),
        ({"fsdp": "full_shard"}, "fsdp is set, which requires several processes"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed"),
    ],
)
def test_refuses_unusable_value_before_reading_data(settings, message, tmp_path):
    words = write_recipe(tmp_path, **settings)
    (tmp_path / "problems.jsonl").unlink()
    with pytest.raises(ValueError, match=message):
        parse_recipe(words)


# Options that once ended in a traceback; the tests of the others are slow.
FIXED = ("label_smoothing_factor", "accelerator_config")


@pytest.mark.parametrize(
    "name", [name if name in FIXED else pytest.param(name, marks=pytest.mark.slow) for name in sorted(WORKS)]
)
def test_option_trains_to_the_end(name, tmp_path):
    if name not in OPTIONS:
        pytest.skip("this version of the library has no such option")
    main(write_recipe(tmp_path, **{**REQUIRED_SETTINGS.get(name, {}), name: WORKS[name]}))
    assert (tmp_path / "run" / "hub" / "README.md").is_file()
