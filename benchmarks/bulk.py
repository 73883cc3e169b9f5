"""Run the pipeline over a generator of 2,000 problems: compare answers and speed with `mmcot.predict`; measure memory.

    python -m benchmarks.bulk RUN [--count 2000]

RUN is a finished run of the demonstration. The problems come from the demonstration's test split and, if more are
needed, from its other splits. The pipeline is loaded as users load it, with `trust_remote_code` from the exported
folder. Pipeline and `mmcot.predict` each run twice, in turns and in separate processes, with 32 problems per batch.
Prints a JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import psutil

from benchmarks.setting import report
from mmcot.problems.demo import generate
from mmcot.storage.files import read_json

BATCH_SIZE = 32
TIMES = 2


def rows(count: int) -> Iterator[dict[str, Any]]:
    return islice(chain.from_iterable(map(generate, ("test", "val", "train"))), count)


def problems(count: int) -> Iterator[dict[str, Any]]:
    for row in rows(count):
        yield {name: row[name] for name in ("question", "choices", "context", "images")}


def in_pipeline(run: Path, count: int) -> dict[str, Any]:
    """Return answers, seconds, and the resident memory in MB after each fifth of the problems."""
    from tqdm import tqdm
    from transformers import pipeline

    answer = pipeline("multimodal-cot", model=str(run / "hub"), trust_remote_code=True)
    start, answers, memory = time.perf_counter(), [], []
    for result in tqdm(answer(problems(count), batch_size=BATCH_SIZE), total=count):
        answers.append([result["answer_index"], result["rationale"]])
        if len(answers) % (count // 5) == 0:
            memory.append(round(psutil.Process().memory_info().rss / 1e6))
    return {"answers": answers, "seconds": time.perf_counter() - start, "memory": memory}


def in_predict(run: Path, count: int) -> dict[str, Any]:
    """Return the same for `mmcot.predict`, without startup and loading; memory is measured at the end."""
    import datasets

    from mmcot.prediction.predictor import PredictOptions, predict
    from mmcot.prediction.system import load_system
    from mmcot.problems.schema import FEATURES

    dataset = datasets.Dataset.from_list(list(rows(count)), features=FEATURES)
    processor, models = load_system(str(run))
    start = time.perf_counter()
    predictions = predict(processor, models, dataset, PredictOptions(batch_size=BATCH_SIZE))
    seconds = time.perf_counter() - start
    answers = [[predictions[name]["answer"], predictions[name]["rationale"]] for name in dataset["id"]]
    return {"answers": answers, "seconds": seconds, "memory": round(psutil.Process().memory_info().rss / 1e6)}


WAYS = {"pipeline": in_pipeline, "predict": in_predict}


def run_in_process(way: str, run: Path, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.bulk", run, "--count", str(count)]
        subprocess.run([*map(str, command), "--way", way, "--output", str(output)], check=True)
        return read_json(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        arguments.output.write_text(json.dumps(WAYS[arguments.way](arguments.run, arguments.count)))
        return
    runs_by_way: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(TIMES):
        for way in WAYS:
            runs_by_way[way].append(run_in_process(way, arguments.run, arguments.count))
    pairs = list(zip(runs_by_way["pipeline"][0]["answers"], runs_by_way["predict"][0]["answers"], strict=True))
    result = {
        "problems": len(pairs),
        "same answers": sum(one[0] == other[0] for one, other in pairs),
        "same rationales": sum(one[1] == other[1] for one, other in pairs),
        "problems per second": {
            way: round(arguments.count / statistics.median(run["seconds"] for run in runs))
            for way, runs in runs_by_way.items()
        },
        "resident MB": {way: runs[0]["memory"] for way, runs in runs_by_way.items()},
    }
    report("bulk", result, None)


if __name__ == "__main__":
    main()
