"""Test the feature store at real size: kills and resumes, features against pixels, memory while reading.

    python -m benchmarks.feature_store kills  [--dataset ../shared/scienceqa] [--output DIR]
    python -m benchmarks.feature_store memory [--rows 100000]
    python -m benchmarks.feature_store pixels [--dataset ../shared/scienceqa]

`kills`: computes features of every picture of the dataset with DETR-ResNet-101-DC5 and the paper's preprocessing, once
uninterrupted and once killed five times at random moments; compares both stores byte for byte.
`memory`: measures resident memory while synthetic DETR features are read in random order.
`pixels`: compares training losses and choice scores from the stores with those from pixels.
Each prints a JSON object. All weights are random; no pre-trained ones are needed.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, DetrConfig, DetrForObjectDetection, DetrImageProcessor

from benchmarks.setting import machine
from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.feature_writer import FeatureWriter
from mmcot.pictures.featurizer import load_image_processor
from mmcot.problems.sources import load_all_splits
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.pictures_mmcot import as_pictures
from modeling_mmcot.stage_mmcot import PAPER_TEMPLATES, Stage
from modeling_mmcot.vision_mmcot import load_vision_tower

FILES = ("manifest.json", "rows.bin", "rows.jsonl")
KILLS = 5


def detr_checkpoint(folder: Path) -> Path:
    """Save DETR-ResNet-101-DC5 with the architecture of its authors' checkpoint and seeded random weights."""
    torch.manual_seed(0)
    config = DetrConfig(backbone="resnet101", use_timm_backbone=True, dilation=True, num_labels=91)
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor().save_pretrained(folder)
    return folder


def features_command(dataset: str, checkpoint: Path, output: Path, dtype: str) -> list[str]:
    options = ["--vision", str(checkpoint), "--preprocessing", "paper", "--dtype", dtype, "--output", str(output)]
    return [sys.executable, "-m", "mmcot.features", dataset, *options]


def write_picture_problems(dataset: str, file: Path) -> str:
    """Write a JSONL with a problem for each picture of a ScienceQA folder, including those not in problems.json."""
    pictures = sorted(Path(dataset).absolute().glob("images/*/*/image.png"))
    file.write_text(
        "\n".join(json.dumps({"question": "?", "images": [str(path)], "split": "test"}) for path in pictures)
    )
    return str(file)


def kills(dataset: str, output: Path) -> dict:
    checkpoint = detr_checkpoint(output / "detr")
    dataset = write_picture_problems(dataset, output / "pictures.jsonl")
    start = time.perf_counter()
    subprocess.run(features_command(dataset, checkpoint, output / "whole", "float16"), check=True)
    seconds = time.perf_counter() - start
    moments = random.Random(0)
    for number in range(KILLS):
        process = subprocess.Popen(features_command(dataset, checkpoint, output / "killed", "float16"))
        after = moments.uniform(5, 60)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        process.wait()
        rows = output / "killed/rows.jsonl"
        print(
            f"kill {number + 1} after {after:.1f} s: {rows.read_bytes().count(10) if rows.exists() else 0} batches",
            flush=True,
        )
    subprocess.run(features_command(dataset, checkpoint, output / "killed", "float16"), check=True)
    store = FeatureStore(output / "whole")
    return {
        "pictures": Path(dataset).read_text().count("\n") + 1,
        "distinct": len(store.rows),
        "bytes": (output / "whole/rows.bin").stat().st_size,
        "seconds_uninterrupted": round(seconds, 1),
        "seconds_a_picture": round(seconds / len(store.rows), 3),
        "kills": KILLS,
        "equal": {
            name: (output / "whole" / name).read_bytes() == (output / "killed" / name).read_bytes() for name in FILES
        },
    }


def memory(rows: int, output: Path) -> dict:
    record = np.dtype([("features", "<f2", (100, 256)), ("boxes", "<f4", (100, 4)), ("class_scores", "<f4", (100,))])
    batch = np.zeros(1000, dtype=record)
    batch["features"] = np.random.default_rng(0).normal(size=(1000, 100, 256)).astype("<f2")
    with FeatureWriter(output / "synthetic", {"repeats": 1, "keys": "id"}) as writer:
        for start in tqdm(range(0, rows, len(batch)), desc="writing"):
            writer.add([str(row) for row in range(start, start + len(batch))], batch)
    store = FeatureStore(output / "synthetic")
    order = np.random.default_rng(1).permutation(rows)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    start = time.perf_counter()
    for number, row in enumerate(tqdm(order, desc="reading")):
        store.features_of({"id": str(row), "images": [None]})
        if number % 100 == 0:
            peak = max(peak, process.memory_info().rss)
    seconds = time.perf_counter() - start
    return {
        "rows": rows,
        "bytes": (output / "synthetic/rows.bin").stat().st_size,
        "megabytes_grown": round((peak - before) / 1e6, 1),
        "microseconds_a_row": round(seconds / rows * 1e6, 1),
    }


def pixels(dataset: str, output: Path) -> dict:
    """Compare losses of 20 training steps, and choice scores of 16 problems by one model, between the sources."""
    checkpoint = detr_checkpoint(output / "detr")
    problems = load_all_splits(dataset, ("val",), 1, True)
    chosen = [row for row in problems if row["images"]][:12] + [row for row in problems if not row["images"]][:4]
    subset = output / "problems.jsonl"
    columns_kept = ("id", "question", "choices", "context", "answer", "solution")
    rows = [{name: row[name] for name in columns_kept} for row in chosen]
    for row, problem in zip(rows, chosen, strict=True):
        row.update(split="val", images=[str(Path(picture["path"]).absolute()) for picture in problem["images"]])
    subset.write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(Path(dataset).parent / "t5_tokenizer")
    columns = ["question", "context", "choices", "images"]
    stages = [
        Stage("rationale", columns, "rationale", **PAPER_TEMPLATES["QCM-E"]),
        Stage("answer", columns, "answer_text", **PAPER_TEMPLATES["QCM-A"]),
    ]
    processor = MMCoTProcessor(tokenizer, load_image_processor(str(checkpoint), "paper"), stages)
    losses, model = train(chosen, processor, checkpoint, None)
    probabilities = score(model, chosen, processor, None)
    result = {}
    for dtype in ("float32", "float16"):
        subprocess.run(features_command(str(subset), checkpoint, output / dtype, dtype), check=True)
        store = FeatureStore(output / dtype)
        store.check_model(model, processor.image_processor)
        result[dtype] = {
            "losses": float((train(chosen, processor, checkpoint, store)[0] - losses).abs().max()),
            "scores": float((score(model, chosen, processor, store) - probabilities).abs().max()),
        }
    return result


def train(
    rows: list[dict], processor: MMCoTProcessor, checkpoint: Path, store: FeatureStore | None
) -> tuple[torch.Tensor, MMCoTForConditionalGeneration]:
    torch.manual_seed(0)
    size = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = MMCoTConfig(
        vocab_size=len(processor.tokenizer),
        decoder_start_token_id=0,
        vision_hidden_size=256,
        freeze_vision=True,
        **size,
    )
    model = MMCoTForConditionalGeneration(config)
    model.attach_tower(load_vision_tower(str(checkpoint)))
    losses, optimizer = [], torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
    for step in tqdm(range(20), desc="training"):
        batch = rows[step % 4 * 4 :][:4]
        loss = model(**inputs(batch, processor, "rationale", store, with_targets=True)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses), model.eval()


def score(
    model: MMCoTForConditionalGeneration, rows: list[dict], processor: MMCoTProcessor, store: FeatureStore | None
) -> torch.Tensor:
    labels = processor.choice_labels(rows, "answer")
    return model.score_choices(labels, **inputs(rows, processor, "answer", store)).softmax(dim=-1)


def inputs(rows: list[dict], processor: MMCoTProcessor, stage: str, store: FeatureStore | None, **kwargs) -> dict:
    if store is not None:
        return {**processor(rows, stage=stage, **kwargs), **store.batch(rows)}
    images = [as_pictures([picture["path"] for picture in row["images"]]) for row in rows]
    return dict(processor(rows, stage=stage, images=images, **kwargs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=("kills", "memory", "pixels"))
    parser.add_argument("--dataset", default="../shared/scienceqa")
    parser.add_argument("--rows", type=int, default=100_000, help="number of rows of the synthetic store")
    parser.add_argument("--output", type=Path, help="folder that is kept; by default a temporary folder")
    arguments = parser.parse_args()
    output = arguments.output or Path(tempfile.mkdtemp(prefix="feature_store-"))
    output.mkdir(parents=True, exist_ok=True)
    if arguments.measurement == "kills":
        result = kills(arguments.dataset, output)
    elif arguments.measurement == "memory":
        result = memory(arguments.rows, output)
    else:
        result = pixels(arguments.dataset, output)
    if arguments.output is None:
        shutil.rmtree(output)
    print(json.dumps({"measurement": arguments.measurement, **result, **machine()}, indent=2))


if __name__ == "__main__":
    main()
