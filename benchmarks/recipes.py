"""Run the recipes of `configs/` at full model size: one step of each stage, cost of a training, memory of a base.

    python -m benchmarks.recipes steps [NAME …]      # each recipe from YAML to exported folder, one step per stage
    python -m benchmarks.recipes memory              # parameters and memory, by size of the base and method
    python -m benchmarks.recipes cost                # FLOPs of a whole training, and hours estimated from them

Weights are random, with the shapes of the checkpoints that a recipe names (FLAN-T5-base for UnifiedQA). `steps`
shortens a recipe: a few real problems, one step per stage, texts of at most 32 tokens. A-OKVQA's recipes use
ScienceQA's problems in A-OKVQA's layout. `benchmarks.xl` runs `scienceqa/xl_lora`. Prints a JSON object.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration, ViTConfig, ViTImageProcessor, ViTModel
from trl import ModelConfig

from benchmarks.feature_store import detr_checkpoint
from benchmarks.setting import DATASET, DETR, FLAN_T5, SHAPES, TOKENIZER, report
from benchmarks.training import forward_flops
from mmcot.prediction.columns import with_gold_columns
from mmcot.prediction.examples import lengths_of, tokenized
from mmcot.problems.sources import load_problems
from mmcot.recipes.arguments import StageArguments
from mmcot.storage.files import read_json, write_json
from mmcot.training.adapters import adapt
from mmcot.training.building import build_stage
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor

NAMES = ("scienceqa/small", "scienceqa/base", "scienceqa/base_detr", "scienceqa/large", "aokvqa/base", "aokvqa/xl_lora")
PROBLEMS = {"train": 16, "val": 2, "test": 2}
TEXT_LENGTH = 32
# Rows of ScienceQA's training split, and of A-OKVQA's 17,056 questions with three rationales each.
TRAINING_ROWS = {"scienceqa": 12726, "aokvqa": 3 * 17056}
CPU_FLOPS = 127.6e9  # a training step at FLAN-T5-base's shape, measured (benchmarks/README.md)
A100_FLOPS = 0.1 * 312e12  # 10 % of its bfloat16 peak, an ASSUMED utilization for batches this small


def size_of(name: str) -> str:
    """Return the T5 shape that a checkpoint's name contains."""
    return next(size for size in SHAPES if size in name)


def t5_checkpoint(size: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a sharded checkpoint like FLAN-T5's: with an untied head, which transformers' class would tie."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = T5ForConditionalGeneration(T5Config(**FLAN_T5, **SHAPES[size], tie_word_embeddings=False))
    head = torch.randn_like(model.shared.weight) * SHAPES[size]["d_model"] ** -0.5
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="200MB")
    save_file({"lm_head.weight": head}, folder / "head.safetensors", metadata={"format": "pt"})
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def tower_checkpoint(name: str, folder: Path) -> Path:
    """Save DETR-ResNet-101-DC5 or ViT-L/32-384, whichever the name contains."""
    if "detr" in name:
        return detr_checkpoint(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    ViTModel(ViTConfig(**shape, image_size=384, patch_size=32)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder


def some_problems() -> dict[str, list[dict]]:
    """Return real problems with a picture, by split."""
    rows = {}
    for split, count in PROBLEMS.items():
        with_picture = (row for row in load_problems(DATASET, split, max_images=1) if row["images"])
        rows[split] = list(itertools.islice(with_picture, count))
    return rows


def as_scienceqa(folder: Path) -> str:
    """Write the problems as JSONL."""
    with (folder / "problems.jsonl").open("w") as lines:
        for split, rows in some_problems().items():
            for row in rows:
                images = [str(Path(image["path"]).resolve()) for image in row["images"]]
                lines.write(json.dumps({**row, "images": images, "split": split}) + "\n")
    return str(folder / "problems.jsonl")


def as_aokvqa(folder: Path) -> str:
    """Write the problems in A-OKVQA's layout, with the rationale repeated three times."""
    for split, rows in some_problems().items():
        (folder / f"coco/{split}2017").mkdir(parents=True)
        entries = []
        for number, row in enumerate(rows):
            with Image.open(row["images"][0]["path"]) as picture:
                picture.convert("RGB").save(folder / f"coco/{split}2017/{number:012}.jpg")
            entry = {"question_id": row["id"], "image_id": number, "question": row["question"], "split": split}
            entry |= {"choices": row["choices"], "difficult_direct_answer": False}
            if split != "test":
                entry |= {"correct_choice_idx": row["answer"], "rationales": [row["solution"]] * 3}
                entry |= {"direct_answers": [row["choices"][row["answer"]]] * 10}
            entries.append(entry)
        (folder / f"aokvqa_v1p0_{split}.json").write_text(json.dumps(entries))
    return str(folder)


def short_recipe(name: str, folder: Path, max_steps: int, text_length: int) -> Path:
    """Write a recipe of `configs/` shortened to a few problems and steps, with random checkpoints."""
    recipe = yaml.safe_load(Path(f"configs/{name}.yaml").read_text())
    for stage in recipe["stages"]:
        if "max_target_length" in stage:  # a stage that retrieves has no target
            stage["max_target_length"] = min(stage["max_target_length"], text_length)
    dtype = getattr(torch, recipe.get("dtype", "float32"))
    (folder / "data").mkdir()
    recipe.update(
        dataset=(as_aokvqa if name.startswith("aokvqa") else as_scienceqa)(folder / "data"),
        model_name_or_path=str(t5_checkpoint(size_of(recipe["model_name_or_path"]), folder / "t5", dtype)),
        vision_model_name_or_path=str(tower_checkpoint(recipe["vision_model_name_or_path"], folder / "tower")),
        **{"max_steps": max_steps, "eval_strategy": "no", "logging_steps": 1, "decode_answer": False},
        **{"dataloader_num_workers": 0, "use_cpu": True, "report_to": "none"},
    )
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


class Peak(threading.Thread):
    """Samples the peak resident memory of a process, in bytes, every tenth of a second."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.resident, self.anonymous = psutil.Process(pid), 0, 0
        self.start()

    def run(self) -> None:
        try:
            while True:
                memory = self.process.memory_info()
                self.resident = max(self.resident, memory.rss)
                self.anonymous = max(self.anonymous, memory.rss - memory.shared)
                time.sleep(0.1)
        except psutil.NoSuchProcess:
            return


def train(recipe: Path, run: Path, *options: str, kill_after: Path | None = None) -> dict:
    """Run train.py and return seconds and memory; with `kill_after`, kill it (SIGKILL) as soon as that file exists."""
    start = time.perf_counter()
    with (run.parent / "log.txt").open("a") as log:
        command = [sys.executable, "train.py", "--config", str(recipe), "--output_dir", str(run), *options]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        peak = Peak(process.pid)
        while process.poll() is None:
            if kill_after is not None and kill_after.exists():
                process.kill()
            time.sleep(0.2)
    if process.returncode != (0 if kill_after is None else -9):
        raise RuntimeError(f"train.py ended with {process.returncode}: {(run.parent / 'log.txt').read_text()[-3000:]}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_resident_gb": round(peak.resident / 1e9, 2),
        "peak_not_mapped_gb": round(peak.anonymous / 1e9, 2),
    }


def stage_results(run: Path) -> dict:
    """Return the losses of each stage's steps, and the size of its saved weights."""
    results = {}
    for file in sorted(run.glob("*/train_results.json")):
        stage, finished = file.parent.name, read_json(file)
        if "log_history" not in finished:  # an index, which is built and not trained
            results[stage] = {"passages": finished["num_passages"]}
            continue
        losses = [entry["loss"] for entry in finished["log_history"] if "loss" in entry]
        weights = sum(file.stat().st_size for file in (run / stage).glob("*.safetensors"))
        results[stage] = {"losses": losses, "saved_mb": round(weights / 1e6, 1)}
    return results


def parameters(hub: Path) -> dict[str, int]:
    """Return the numbers of parameters of the whole system, including the tower."""
    model = MMCoTForConditionalGeneration.from_pretrained(hub)
    counts = {"all": 0, "tower": 0, "fusion": 0}
    for name, parameter in model.named_parameters():
        part = next((part for part in ("tower", "fusion") if part in name), None)
        counts["all"] += parameter.numel()
        if part is not None:
            counts[part] += parameter.numel()
    return {**counts, "text_model": counts["all"] - counts["tower"] - counts["fusion"]}


def measure_steps(names: list[str], work: str | None) -> dict:
    results = {}
    for name in tqdm(names, desc="recipes"):
        folder = Path(tempfile.mkdtemp(dir=work))
        try:
            recipe, run = short_recipe(name, folder, max_steps=1, text_length=TEXT_LENGTH), folder / "run"
            results[name] = {**train(recipe, run, "--save_strategy", "no"), **stage_results(run)}
            results[name]["parameters"] = parameters(run / "hub")
            results[name]["predicted"] = len(read_json(run / "predictions" / "test.json"))
            if "xl" not in name:  # a run without pictures differs only in its inputs, so the long one is skipped
                options = ("--save_strategy", "no", "--max_images", "0")
                results[name]["without_pictures"] = train(recipe, folder / "without_pictures", *options)
        finally:
            shutil.rmtree(folder)
    return results


# Parameters and memory.

METHODS = ("full", "lora", "qlora")
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}
# Cases that fit 24 GB; full training of FLAN-T5-large does not.
MEASURED = [("small", "full"), ("small", "lora"), ("base", "full"), ("base", "lora"), ("large", "lora")]
BYTES = {"full": 4, "lora": 2, "qlora": 2}  # per weight of the base; a trained weight always takes 4
QUANTIZED_BYTES = 4.5 / 8  # NF4: 4 bits, and a float32 per block of 64


def build(size: str, method: str):
    """Build the model as it is trained, on the current default device."""
    config = MMCoTConfig(**FLAN_T5, **SHAPES[size], vision_hidden_size=DETR[1])
    model = MMCoTForConditionalGeneration(config)
    # FLAN-T5 has an untied head; a new model ties it to the embeddings.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.02)
    if method == "full":
        return model
    return adapt(model.to(torch.bfloat16), ModelConfig(use_peft=True, **LORA))


def estimate_memory(size: str, method: str) -> dict:
    """Estimate memory of weights, gradients and AdamW's two moments, without activations."""
    with torch.device("meta"):
        model = build(size, method)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    quantized = 0
    if method == "qlora":
        names = [name for name, _ in model.named_modules() if name.endswith("base_layer")]
        quantized = sum(model.get_submodule(name).weight.numel() for name in names)
    weights = (total - trained - quantized) * BYTES[method] + quantized * QUANTIZED_BYTES
    state = weights + trained * (4 + 4 + 8)
    return {"parameters": total, "trained": trained, "estimated_gb": round(state / 1e9, 2)}


def step_alone(size: str, method: str) -> float:
    """Return a step's peak resident memory over two problems of 512 and 512 tokens, in GB above an empty process."""
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    model = build(size, method).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)  # the Trainer's default; otherwise AdamW copies all weights
    peak = Peak(os.getpid())
    for _ in range(2):
        ids = torch.randint(3, 32000, (2, 512))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(3, 32000, (2, 512))}
        features = torch.randn(2, *DETR, dtype=model.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=method != "full"):
            loss = model(**batch, vision_features=features).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return round((peak.resident - before) / 1e9, 2)


def measure_memory() -> dict:
    results = {}
    for size, method in tqdm(list(itertools.product(SHAPES, METHODS)), desc="bases"):
        results[f"{size}, {method}"] = estimate_memory(size, method)
        if (size, method) in MEASURED:
            command = [sys.executable, "-m", "benchmarks.recipes", "step", size, method]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[f"{size}, {method}"]["measured_gb"] = float(printed.splitlines()[-1])
    return results


# Cost.


def measure_cost() -> dict:
    """
    Estimate a whole training: FLOPs of the matrix products over real tokens, from the lengths of the available
    problems, and hours. A-OKVQA's lengths are assumed to equal ScienceQA's.
    """
    results = {}
    for name in ("scienceqa/xl_lora", *NAMES):
        recipe = yaml.safe_load(Path(f"configs/{name}.yaml").read_text())
        flops = 0.0
        stages = [build_stage(StageArguments(**entry)) for entry in recipe["stages"]]
        processor = MMCoTProcessor(AutoTokenizer.from_pretrained(TOKENIZER), None, stages)
        for number, stage in enumerate(stages):
            rows = with_gold_columns(load_problems(DATASET, "train", max_images=1), stages[:number])
            lengths = lengths_of(tokenized(rows, stage, processor, with_targets=True))
            sources, targets = ([length[side] for length in lengths] for side in (0, 1))
            one = forward_flops(SHAPES[size_of(recipe["model_name_or_path"])], sources, targets, len(lengths) // 2)
            # Adapters save the pass for gradients of the base's weights; checkpointing adds a forward pass.
            passes = 3 - bool(recipe.get("use_peft")) + bool(recipe.get("gradient_checkpointing"))
            flops += one / len(lengths) * passes
        total = flops * TRAINING_ROWS[name.split("/")[0]] * recipe["num_train_epochs"]
        hours = {"A100": total / A100_FLOPS / 3600, "these two cores": total / CPU_FLOPS / 3600}
        results[name] = {"petaflop": round(total / 1e15), **{where: round(value, 1) for where, value in hours.items()}}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=("steps", "memory", "cost", "step"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--work", metavar="DIR", help="folder for checkpoints and runs")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.measurement == "step":  # a separate process for each, because peak memory never falls
        print(step_alone(*arguments.names))
        return
    if arguments.measurement == "steps":
        result = measure_steps(arguments.names or list(NAMES), arguments.work)
    else:
        result = measure_memory() if arguments.measurement == "memory" else measure_cost()
    report(f"recipes {arguments.measurement}", result, arguments.output)


if __name__ == "__main__":
    main()
