"""Time training steps against the original's method, plain T5 and the machine's peak; time the start of train.py.

    python -m benchmarks.training                      # all measurements except the following
    python -m benchmarks.training --original DIR       # only our baseline against the authors' code
    python -m benchmarks.training --scale              # only cost and memory from 250 to 4,000 problems

A step is forward, backward, clipping and AdamW over 8 problems on average, with dropout as published. Batches differ,
so a few batches that represent an epoch are timed, from its fullest to its emptiest. Prints a JSON object.

`--original DIR` expects the files of amazon-science/mm-cot in DIR, and DIR/.venv with transformers 4.30 and torch.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import yaml
from tqdm.auto import tqdm

from benchmarks import original
from benchmarks.setting import (
    BATCH_SIZE,
    DATASET,
    DETR,
    REPEATS,
    SHAPES,
    TOKENIZER,
    RandomFeatures,
    gemm_flops,
    our_model,
    padded,
    parse_arguments,
    plain_t5,
    problems,
    processor,
    ratio,
    report,
    summary,
    timed,
)
from mmcot.prediction.batching import LengthBatchSampler, cost
from mmcot.prediction.examples import StageCollator, lengths_of, tokenized
from mmcot.problems.schema import with_column

STEPS, BASE_STEPS = 4, 6  # batches per repeat, at FLAN-T5-small's and FLAN-T5-base's shape
SIZES = (250, 4000)


def examples_of(stage: str):
    """Return the training split's sources and gold targets."""
    rows = problems("train")
    if stage == "answer":
        rows = with_column(rows, "rationale", list(rows["gold_rationale"]))
    return tokenized(rows, processor().stage(stage), processor(), with_targets=True)


def batches_of(examples, stage: str, count: int) -> tuple[list[dict[str, torch.Tensor]], float]:
    """Return some batches of an epoch, as the Trainer receives them, and how many average problems cost the same."""
    collate = StageCollator(processor(), processor().stage(stage), RandomFeatures())
    lengths = lengths_of(examples)
    epoch = list(LengthBatchSampler(lengths, BATCH_SIZE, batches_per_step=1, seed=0))
    epoch.sort(key=lambda batch: sum(sum(lengths[index]) for index in batch) / cost(batch, lengths))
    chosen = [epoch[(2 * number + 1) * len(epoch) // (2 * count)] for number in range(count)]
    share = sum(cost(batch, lengths) for batch in chosen) / sum(cost(batch, lengths) for batch in epoch)
    return [collate([examples[index] for index in batch]) for batch in chosen], share * len(examples)


def stepper(model, **settings) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return a function that runs one optimisation step of a model, as in the Trainer."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch, **settings).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def original_batch(examples, stage: str) -> dict[str, torch.Tensor]:
    """Return the original's batch of 8: sources padded to 512, targets to 512 or 64, zeros for no picture."""
    rows = [examples[index] for index in range(BATCH_SIZE)]
    sources = padded([row["input_ids"] for row in rows], 0, 512)
    targets = padded([row["labels"] for row in rows], 0, 512 if stage == "rationale" else 64)
    features = RandomFeatures()
    pictures = [features.features_of(row["id"]) if row["images"] else torch.zeros(DETR) for row in rows]
    return {
        "input_ids": sources,
        "attention_mask": (sources != 0).long(),
        "labels": targets,
        "vision_features": torch.stack(pictures),
    }


def original_method() -> Callable[[dict[str, torch.Tensor]], None]:
    return stepper(our_model("small", fusion="gated_mha", zeros_for_missing_pictures=True))


def measure_stage(stage: str) -> dict:
    examples = examples_of(stage)
    batches, num_problems = batches_of(examples, stage, STEPS)
    texts = [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")} for batch in batches]
    slow_batch = original_batch(examples, stage)
    ours = stepper(our_model("small"), skip_logits=True)
    t5 = stepper(plain_t5("small"))
    baseline = original_method()
    seconds = timed(
        {
            "ours": lambda: [ours(batch) for batch in batches],
            "plain T5": lambda: [t5(batch) for batch in texts],
            "original's method": lambda: baseline(slow_batch),
        }
    )
    per_step = {
        "ours": [value / num_problems * BATCH_SIZE for value in seconds["ours"]],
        "plain T5": [value / num_problems * BATCH_SIZE for value in seconds["plain T5"]],
        "original's method": seconds["original's method"],
    }
    return {
        "problems_of_each_step": [len(batch["labels"]) for batch in batches],
        "seconds_of_8_problems": {name: summary(values) for name, values in per_step.items()},
        "original's method / ours": ratio(per_step["original's method"], per_step["ours"]),
        "ours / plain T5": ratio(per_step["ours"], per_step["plain T5"]),
    }


def compare_original(stage: str, directory: str) -> dict:
    """Time the same step in our baseline and in the authors' code, one after the other."""
    batch, baseline = original_batch(examples_of(stage), stage), original_method()
    seconds = {
        "original's method": timed({stage: lambda: baseline(batch)})[stage],
        "the original itself": original.run(directory, "training", batch, SHAPES["small"]),
    }
    return {
        "seconds_of_8_problems": {name: summary(values) for name, values in seconds.items()},
        "our baseline / the original itself": ratio(*seconds.values()),
    }


def forward_flops(shape: dict, sources: list[int], targets: list[int], num_pictures: int) -> float:
    """Return FLOPs of a forward pass's matrix products over real tokens, two per multiplication and addition."""
    d, inner, ff = shape["d_model"], shape["num_heads"] * shape["d_kv"], shape["d_ff"]
    encoder = shape["num_layers"] * sum(
        length * (4 * d * inner + 3 * d * ff) + 2 * length * length * inner for length in sources
    )
    decoder = shape["num_decoder_layers"] * sum(
        target * (6 * d * inner + 3 * d * ff)
        + source * 2 * d * inner
        + target * target * inner  # causal: half of the square
        + 2 * target * source * inner
        for source, target in zip(sources, targets, strict=True)
    )
    head = sum(targets) * d * 32128
    patches, width = DETR
    fusion = num_pictures * patches * width * d + 2 * sum(sources) / len(sources) * num_pictures * (d * d + patches * d)
    return 2 * (encoder + decoder + head + fusion)


def measure_utilization() -> dict:
    """Compare model FLOP/s of a step (three forward passes) at FLAN-T5-base's shape with a matrix product."""
    batches, _ = batches_of(examples_of("rationale"), "rationale", BASE_STEPS)
    step = stepper(our_model("base"), skip_logits=True)
    flops = 0.0
    for batch in batches:
        sources = batch["attention_mask"].sum(dim=1).tolist()
        targets = (batch["labels"] != -100).sum(dim=1).tolist()
        pictures = int(batch["vision_mask"].any(dim=1).sum()) if "vision_mask" in batch else 0
        flops += 3 * forward_flops(SHAPES["base"], sources, targets, pictures)
    seconds = timed({"base": lambda: [step(batch) for batch in batches]}, repeats=3)["base"]
    machine_flops = gemm_flops()
    return {
        "seconds_of_a_step": summary([value / len(batches) for value in seconds]),
        "gemm_gflops": round(machine_flops / 1e9, 1),
        "model_gflops": round(flops / statistics.median(seconds) / 1e9, 1),
        "mfu": round(flops / statistics.median(seconds) / machine_flops, 3),
    }


START = """
import os, sys, time
from transformers import TrainerCallback
from mmcot import train
from mmcot.training import trainer
class FirstStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        print("FIRST STEP", time.time(), flush=True)
        os._exit(0)
train = trainer.StageTrainer.train
trainer.StageTrainer.train = lambda self, **kwargs: (self.add_callback(FirstStep()), train(self, **kwargs))
train.main(sys.argv[1:])
"""


def measure_start() -> dict:
    """Time from the command to the first step of a run on the real problems, with a warm cache and without."""
    recipe = yaml.safe_load(Path("configs/scienceqa/smoke.yaml").read_text())
    recipe.update(dataset=str(Path(DATASET).resolve()), tokenizer_name_or_path=str(Path(TOKENIZER).resolve()))
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "recipe.yaml"
        config.write_text(yaml.safe_dump(recipe))
        for number in tqdm(range(1 + REPEATS), desc="start of train.py", leave=False):
            start = time.time()
            options = ["--config", config, "--output_dir", Path(folder) / f"run{number}"]
            output = subprocess.run([sys.executable, "-c", START, *options], capture_output=True, text=True).stdout
            seconds.append(float(output.split("FIRST STEP")[1].split()[0]) - start)
    return {"first_time": round(seconds[0], 1), "seconds": summary(seconds[1:])}


def measure_scale() -> dict:
    """Measure the cost of a real token, and memory, by the number of problems of real lengths, in one pass each."""
    data = json.loads((Path(DATASET) / "problems_trainval_qa.json").read_text())
    tokenizer, stage = processor().tokenizer, processor().stage("rationale")
    generator = random.Random(0)
    gold = [length for _, length in lengths_of(examples_of("rationale"))]
    rows = generator.sample(list(data.values()), max(SIZES))
    texts = [stage.render_source({**row, "context": row["hint"], "caption": ""}) for row in rows]
    sources = tokenizer(texts, truncation=True, max_length=512)["input_ids"]
    targets = [[generator.randrange(3, 32000) for _ in range(generator.choice(gold))] for _ in rows]
    step, result = stepper(our_model("small"), skip_logits=True), {}
    for size in SIZES:
        lengths = [(len(source), len(target)) for source, target in zip(sources[:size], targets[:size], strict=True)]
        sampler = LengthBatchSampler(lengths, BATCH_SIZE, batches_per_step=1, seed=0)
        peak, start = 0, time.perf_counter()
        for indices in tqdm(sampler, desc=f"{size} problems", leave=False):
            ids = padded([sources[index] for index in indices], 0)
            labels = padded([targets[index] for index in indices], -100)
            step({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})
            peak = max(peak, psutil.Process().memory_info().rss)
        seconds = time.perf_counter() - start
        tokens = sum(map(sum, lengths))
        result[size] = {
            "microseconds_a_token": round(seconds / tokens * 1e6, 1),
            "peak_resident_gb": round(peak / 1e9, 2),
        }
    return result


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.scale:
        result = {"scale": measure_scale()}
    elif arguments.original is not None:
        result = {stage: compare_original(stage, arguments.original) for stage in ("rationale", "answer")}
    else:
        result = {stage: measure_stage(stage) for stage in ("rationale", "answer")}
        result.update(utilization=measure_utilization(), start=measure_start())
    report("training", result, arguments.output)


if __name__ == "__main__":
    main()
