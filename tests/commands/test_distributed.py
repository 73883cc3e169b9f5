"""Several processes, on CPU with gloo: sharded weights, resuming with another world size, splits of unequal size.

test_training.py compares DDP with one process. FSDP and DeepSpeed through accelerate need GPUs, so this file only loads
their configurations with accelerate.
"""

import json
import shutil

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPOSITORY, TINY_RECIPE, run_script, tiny_model
from safetensors.torch import load_file

LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes")

# A step on two problems: one process trains on both, or two processes train on one each and shard the weights.
STEP = """
import os, sys, torch, torch.distributed as dist
from safetensors.torch import save_file
sys.path.insert(0, {tests!r})
from conftest import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
model = tiny_model(fusion={fusion!r}).train()
if size > 1:
    mesh = init_device_mesh("cpu", (size,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert model.shared.weight.to_local().shape[0] == 32
torch.manual_seed(1)
batch = dict(
    input_ids=torch.randint(3, 60, (2, 7)), attention_mask=torch.ones(2, 7, dtype=torch.long),
    pixel_values=torch.randn(2, 1, 3, 32, 32), labels=torch.randint(3, 60, (2, 5)),
)
batch["labels"][0, 2:] = -100
own = {{name: tensor[rank::size] for name, tensor in batch.items()}}
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
loss = model(**own, num_items_in_batch=7).loss * size  # because sharding averages over processes
loss.backward()
optimizer.step()
weights = {{
    name: (tensor.full_tensor() if size > 1 else tensor).clone().contiguous()
    for name, tensor in model.named_parameters()
}}
if rank == 0:
    save_file(weights, sys.argv[1])
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # because torch 2.14 sometimes aborts in its threads at interpreter exit
"""


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["gated", "gated_mha", "prefix", "flamingo"])
def test_sharded_step_equals_unsharded_step(fusion, tmp_path):
    script = tmp_path / "step.py"
    script.write_text(STEP.format(tests=str(REPOSITORY / "tests"), fusion=fusion))
    for size in ("1", "2"):
        run_script(
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", size, script, tmp_path / size),
            **{"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )
    whole, sharded = load_file(tmp_path / "1"), load_file(tmp_path / "2")
    assert whole.keys() == sharded.keys() and any("fusion" in name for name in whole)
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_resumes_with_another_number_of_processes(tiny_dataset, tmp_path):
    """With the same 8 problems a step: two processes train half of the answer stage, one process the rest."""
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    recipe["text_config"]["dropout_rate"] = 0.0  # because each process draws its own mask
    recipe.update(max_steps=4, save_steps=2, eval_steps=4, train_sampling_strategy="group_by_length")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    script = ("train.py", "--config", tmp_path / "recipe.yaml", "--dataset", tiny_dataset)
    two, one = ("--per_device_train_batch_size", "4"), ("--per_device_train_batch_size", "8")
    run_script(*LAUNCH, "2", *script, *two, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "changed")
    answer = tmp_path / "changed" / "answer"
    for name in ("train_results.json", "model.safetensors"):
        (answer / name).unlink()
    shutil.rmtree(answer / "checkpoint-4")
    refused = run_script(*script, *two, "--output_dir", tmp_path / "changed", check=False)
    assert refused.returncode == 1 and "5.0 steps per epoch, and an epoch now has 10" in refused.stderr
    run_script(*script, *one, "--output_dir", tmp_path / "changed")
    results = [json.loads((tmp_path / name / "answer/train_results.json").read_text()) for name in ("whole", "changed")]
    assert [result["world_size"] for result in results] == [2, 1]
    losses = [[entry["loss"] for entry in result["log_history"] if "loss" in entry] for result in results]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    weights = [load_file(tmp_path / name / "answer/model.safetensors") for name in ("whole", "changed")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_three_processes_predict_seven_problems_like_one(tiny_run, tiny_dataset, tmp_path):
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    rows = [{**row, "images": [str(tiny_dataset.parent / name) for name in row["images"]]} for row in rows[:7]]
    dataset = tmp_path / "seven.jsonl"
    dataset.write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows))
    command = ("mmcot.predict", tiny_run, "--dataset", dataset, "--batch_size", "2", "--output")
    run_script("-m", *command, tmp_path / "one.json", OMP_NUM_THREADS="1")
    run_script(*LAUNCH, "3", "-m", *command, tmp_path / "three.json", OMP_NUM_THREADS="1")
    assert len(json.loads((tmp_path / "one.json").read_text())) == 7
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "three.json").read_bytes()


CONFIGS = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_loads_launch_settings_and_layers_to_wrap_exist(file):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "bf16" and config.num_processes in (1, 4)
    expected = {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == expected[file.stem]
    wrapped = config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap", "T5Block").split(",")
    assert set(wrapped) <= {type(module).__name__ for module in tiny_model().modules()}


@pytest.mark.slow
def test_refuses_unknown_layer_to_wrap_before_reading_data(tmp_path):
    """The recipe has no tower, because the layers of a tower are allowed names too."""
    options = ["--config", TINY_RECIPE, "--dataset", tmp_path / "nothing.jsonl", "--output_dir", tmp_path / "run"]
    options += ["--max_images", "0"]
    result = run_script("train.py", *options, check=False, FSDP_TRANSFORMER_CLS_TO_WRAP="T5Block,T5Blok")
    assert result.returncode != 0
    assert "fsdp_transformer_layer_cls_to_wrap is 'T5Blok'" in result.stderr and "T5Block" in result.stderr
