"""FLAN-T5-XL's shape with LoRA on this machine: a step of each stage, generation, saving, a kill and the way on.

    python -m benchmarks.xl [--work DIR] [--output FILE]

Weights are random, made layer by layer in bfloat16; the recipe is configs/scienceqa_xl_lora.yaml but for its length: a
few real problems, two steps a stage of which the first is saved, and texts of 16 tokens. `train.py` is killed (SIGKILL)
when the answer stage has saved its first step, and then called again. DIR (a temporary one by default)
holds the base three times, 6 GB each.
Prints a JSON object: seconds, and the peak of resident memory of each run, sampled from outside.
"""

import argparse
import json
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
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from benchmarks.feature_store import detr_checkpoint
from benchmarks.setting import DATASET, FLAN_T5, TOKENIZER, report
from mmcot.files import read_json, write_json
from mmcot.problems import load_problems
from modeling_mmcot import MMCoTForConditionalGeneration

# google/flan-t5-xl: https://huggingface.co/google/flan-t5-xl/blob/main/config.json
XL = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32}
RECIPE = "configs/scienceqa_xl_lora.yaml"
PROBLEMS = {"train": 16, "val": 2, "test": 2}
TEXT_LENGTH = 16


def checkpoint(folder: Path) -> Path:
    """As FLAN-T5-XL's own: in shards, with a head of its own, which transformers' class would tie."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = T5ForConditionalGeneration(T5Config(**FLAN_T5, **XL, tie_word_embeddings=False))
    head = torch.randn_like(model.shared.weight) * XL["d_model"] ** -0.5
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="1GB")
    save_file({"lm_head.weight": head}, folder / "head.safetensors", metadata={"format": "pt"})
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def some_problems(file: Path) -> Path:
    """Real problems with pictures, as a JSONL."""
    with file.open("w") as lines:
        for split, count in PROBLEMS.items():
            rows = (row for row in load_problems(DATASET, split, max_images=1) if row["images"])
            for row, _ in zip(rows, range(count), strict=False):
                images = [str(Path(image["path"]).resolve()) for image in row["images"]]
                lines.write(json.dumps({**row, "images": images, "split": split}) + "\n")
    return file


def short_recipe(folder: Path) -> Path:
    recipe = yaml.safe_load(Path(RECIPE).read_text())
    for stage in recipe["stages"]:
        stage["max_target_length"] = TEXT_LENGTH
    recipe.update(
        dataset=str(some_problems(folder / "problems.jsonl")),
        model_name_or_path=str(checkpoint(folder / "t5")),
        vision_model_name_or_path=str(detr_checkpoint(folder / "detr")),
        **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "logging_steps": 1},
        **{"decode_answer": False, "dataloader_num_workers": 0, "use_cpu": True, "report_to": "none"},
    )
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


class Peak(threading.Thread):
    """The most resident memory of a process, in bytes, looked at every tenth of a second."""

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


def train(recipe: Path, run: Path, kill_after: Path | None = None) -> dict:
    start = time.perf_counter()
    with (run.parent / "log.txt").open("a") as log:
        command = [sys.executable, "train.py", "--config", str(recipe), "--output_dir", str(run)]
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
        "of_which_not_files": round(peak.anonymous / 1e9, 2),
    }


def parameters(hub: Path) -> dict[str, int]:
    """Of the whole system, tower included."""
    model = MMCoTForConditionalGeneration.from_pretrained(hub)
    tower = sum(parameter.numel() for parameter in model.encoder.vision_tower.parameters())
    fusion = sum(parameter.numel() for parameter in model.encoder.fusion.parameters())
    every = sum(parameter.numel() for parameter in model.parameters())
    return {"text_model": every - tower - fusion, "tower": tower, "fusion": fusion, "all": every}


def measure(folder: Path) -> dict:
    recipe, run = short_recipe(folder), folder / "run"
    result = {"until killed": train(recipe, run, run / "answer" / "checkpoint-1" / "trainer_state.json")}
    result["called again"] = train(recipe, run)
    for stage in ("rationale", "answer"):
        finished = json.loads((run / stage / "train_results.json").read_text())
        losses = [entry["loss"] for entry in finished["log_history"] if "loss" in entry]
        adapter = (run / stage / "adapter_model.safetensors").stat().st_size
        result[stage] = {"losses": losses, "adapter_mb": round(adapter / 1e6, 1)}
    predictions = json.loads((run / "predictions" / "test.json").read_text())
    result["predicted"] = {"problems": len(predictions), "rationales": [p["rationale"] for p in predictions.values()]}
    result["parameters"] = parameters(run / "hub")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", metavar="DIR", help="where the checkpoint and the run are made")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        report("xl", measure(folder), arguments.output)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
