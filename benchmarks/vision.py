"""Time features of DETR-ResNet-101-DC5 over real picture files, against one picture at a time in one process.

    python -m benchmarks.vision                           # every ninth of the dataset's pictures, five times
    python -m benchmarks.vision --every 1 --repeats 1     # all of them, once

Weights are random, preprocessing is the paper's, and the store has float16. Our method is that of `mmcot.features`:
batches of pictures of one shape, with the tower in float32 and in bfloat16. Prints a JSON object.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.feature_store import detr_checkpoint, write_picture_problems
from benchmarks.setting import DATASET, REPEATS, ratio, report, summary, timed
from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.feature_writer import FeatureWriter
from mmcot.pictures.featurizer import (
    FeatureOptions,
    Featurizer,
    TowerOptions,
    compute_missing,
    featurizer_settings,
    load_featurizer,
)
from mmcot.pictures.reading import distinct_pictures, read_picture
from mmcot.problems.sources import load_problems
from modeling_mmcot.pictures_mmcot import as_rgb, picture_pixels


def one_at_a_time(featurizer: Featurizer, pictures: list) -> None:
    """Compute features like the authors' extract_features.py: read, prepare, run and store each picture."""
    features = []
    with torch.no_grad():
        for _, picture, problem_id in pictures:
            pixels = picture_pixels(featurizer.image_processor, as_rgb(read_picture(picture, problem_id)))
            states = featurizer.tower(pixel_values=pixels[None]).last_hidden_state
            features.append(states[0].numpy().astype("<f2"))


def store_all(featurizer: Featurizer, rows, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with FeatureWriter(folder, featurizer_settings(featurizer, "float16")) as writer:
        compute_missing(writer, rows, featurizer, FeatureOptions())


def relative_errors(exact: FeatureStore, rounded: FeatureStore, keys: list[str]) -> list[float]:
    errors = []
    for key in keys:
        expected, found = (store.read(key)["features"].astype("f4") for store in (exact, rounded))
        errors.append(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=9, help="use every n-th of the dataset's 879 pictures")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        rows = load_problems(write_picture_problems(DATASET, Path(folder) / "pictures.jsonl"), "test")
    rows = rows.select(range(0, len(rows), arguments.every))
    pictures = distinct_pictures(rows)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(detr_checkpoint(Path(folder)))
        single, half = (load_featurizer(TowerOptions(checkpoint, "paper", bf16=bf16)) for bf16 in (False, True))
    with tempfile.TemporaryDirectory() as folder:
        exact, rounded = Path(folder) / "float32", Path(folder) / "bfloat16"
        work = {
            "one at a time": lambda: one_at_a_time(single, pictures),
            "float32": lambda: store_all(single, rows, exact),
            "bfloat16": lambda: store_all(half, rows, rounded),
        }
        seconds = timed(work, arguments.repeats, warm_up=0)
        errors = relative_errors(FeatureStore(exact), FeatureStore(rounded), [key for key, *_ in pictures])
    result = {
        "dataset": DATASET,
        "pictures": len(pictures),
        "seconds_a_picture": {name: summary([v / len(pictures) for v in values]) for name, values in seconds.items()},
        "one at a time / ours": {name: ratio(seconds["one at a time"], seconds[name]) for name in list(work)[1:]},
        "relative error of bfloat16": {"median": statistics.median(errors), "max": max(errors)},
    }
    report("vision", result, arguments.output)


if __name__ == "__main__":
    main()
