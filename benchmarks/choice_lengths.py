"""Compare ways to score choices of different lengths: the study in docs/choice_lengths.md.

    python -m benchmarks.choice_lengths --work DIR     # both datasets, seeds 0 to 2; resumes an interrupted study
    python -m benchmarks.choice_lengths --table        # the tables, from the result files

The study trains a stage that answers with the choice's text, on the demonstration's `descriptions` (for eight epochs
and for two) and on ScienceQA's questions and choices (without pictures, with a tiny model from scratch). The stage
answers the validation and test problems with each way to score choices; all ways use the same trained weights. Each
dataset and seed has one file with the results of all ways in `benchmarks/results/choice_lengths/`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from datasets import Dataset

from benchmarks.setting import machine
from mmcot.prediction.predictor import PredictOptions, predict
from mmcot.prediction.system import load_system
from mmcot.problems.sources import load_problems
from mmcot.storage.files import read_json, write_json
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.stage_mmcot import SCORES

RESULTS = Path(__file__).parent / "results" / "choice_lengths"
SCIENCEQA = Path("../shared/scienceqa")
SEEDS = (0, 1, 2)
MIN_DIFFERENCE = 3  # minimum difference in tokens between the longest and the shortest target of a problem
SHARED_SETTINGS = {
    "stages": [
        {
            "name": "answer",
            "reads": ["question", "context", "choices"],
            "writes": "answer_text",
            "template": "QCM-A",
            "target": "The answer is {{ choices[answer] }}.",
            "max_source_length": 192,
            "max_target_length": 64,
        }
    ],
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 100,
    "lr_scheduler_type": "cosine",
    "learning_rate": 1e-3,
    "warmup_steps": 200,
    "weight_decay": 0.01,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
    "dataloader_pin_memory": False,
}


def demonstration(folder: Path, num_train_epochs: int = 8) -> dict:
    values = yaml.safe_load(Path("configs/demo/one_stage.yaml").read_text())
    stage = {**SHARED_SETTINGS["stages"][0], "reads": ["question", "context", "choices", "images"]}
    return {
        **values,
        **SHARED_SETTINGS,
        "stages": [stage],
        "dataset": "demo:descriptions",
        "num_train_epochs": num_train_epochs,
    }


def half_learned(folder: Path) -> dict:
    return demonstration(folder, num_train_epochs=2)


def scienceqa(folder: Path) -> dict:
    file = folder / "scienceqa.jsonl"
    if not file.exists():
        write_scienceqa(file)
    text_config = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    return {
        **SHARED_SETTINGS,
        "dataset": str(file.resolve()),
        "max_images": 0,
        "tokenizer_vocab_size": 4000,
        "text_config": {**text_config, "dropout_rate": 0.1},
        "num_train_epochs": 4,
    }


DATASETS = {"demonstration": demonstration, "half-learned": half_learned, "ScienceQA": scienceqa}


def write_scienceqa(file: Path) -> None:
    """Write questions and choices: train and val from all of ScienceQA, test from the part with complete problems."""
    all_rows = read_json(SCIENCEQA / "problems_trainval_qa.json")
    all_rows |= {name: row for name, row in read_json(SCIENCEQA / "problems.json").items() if row["split"] == "test"}
    rows = [
        {"id": name, **{key: row[key] for key in ("question", "choices", "answer", "split")}, "context": row["hint"]}
        for name, row in all_rows.items()
    ]
    held_out = {text_of(row) for row in rows if row["split"] != "train"}
    rows = [row for row in rows if row["split"] != "train" or text_of(row) not in held_out]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def text_of(row: dict) -> tuple:
    return row["question"], row["context"], *row["choices"]


def train(config: Path, run: Path, seed: int) -> None:
    command = [sys.executable, "train.py", "--config", str(config), "--output_dir", str(run), "--seed", str(seed)]
    with run.with_suffix(".log").open("a") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode != 0:
            raise RuntimeError(f"train.py failed: {run.with_suffix('.log').read_text()[-3000:]}")


def compare(run: Path, dataset: str) -> dict:
    """Count right answers and choices of shortest and longest targets, by split, way to score and class of problems."""
    processor, models = load_system(str(run))
    result = {}
    for split in ("val", "test"):
        problems = load_problems(dataset, split)
        lengths = target_lengths(processor, problems)
        result[split] = {}
        for score in SCORES:
            processor.stages.answering.score = score
            predictions = predict(processor, models, problems, PredictOptions(batch_size=100))
            answers = [predictions[name]["answer"] for name in problems["id"]]
            result[split][score] = by_length(problems["answer"], answers, lengths)
    return result


def target_lengths(processor: MMCoTProcessor, problems: Dataset) -> list[list[int]]:
    labels = [
        processor.choice_labels([row], processor.stages.answering.name)[0] for row in problems.remove_columns("images")
    ]
    return [(targets != -100).sum(dim=1).tolist() for targets in labels]


def by_length(gold: list[int], answers: list[int], lengths: list[list[int]]) -> dict[str, dict]:
    classes = {"all": range(len(gold))}
    unlike = [row for row in classes["all"] if max(lengths[row]) - min(lengths[row]) >= MIN_DIFFERENCE]
    classes["unlike"] = unlike
    for name, extreme in (("gold is shortest", min), ("gold is longest", max)):
        classes[name] = [row for row in unlike if lengths[row][gold[row]] == extreme(lengths[row])]
    classes["gold is between"] = [
        row for row in unlike if min(lengths[row]) < lengths[row][gold[row]] < max(lengths[row])
    ]
    return {
        name: {
            "n": len(rows),
            "right": sum(answers[row] == gold[row] for row in rows),
            "shortest": sum(lengths[row][answers[row]] == min(lengths[row]) for row in rows),
            "longest": sum(lengths[row][answers[row]] == max(lengths[row]) for row in rows),
        }
        for name, rows in classes.items()
    }


def result_file(name: str, seed: int) -> Path:
    return RESULTS / f"{name.lower()}-{seed}.json"


def tables() -> str:
    """Return the tables of all datasets: mean and extremes over the seeds, in percent."""
    lines = []
    for name in DATASETS:
        results = [read_json(result_file(name, seed)) for seed in SEEDS if result_file(name, seed).exists()]
        for split in ("val", "test"):
            classes = results[0][split]["total"]
            lines += [f"**{name}, {split}** ({len(results)} seeds)", ""]
            header = [f"{kind} ({classes[kind]['n']})" for kind in classes] + ["shortest taken", "longest taken"]
            lines += ["| score | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
            for score in SCORES:
                by_seed = [result[split][score] for result in results]
                cells = [share([counts[kind] for counts in by_seed], "right") for kind in classes]
                cells += [share([counts["unlike"] for counts in by_seed], which) for which in ("shortest", "longest")]
                lines.append(f"| {score} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def share(counts: list[dict], which: str) -> str:
    values = [100 * count[which] / max(count["n"], 1) for count in counts]
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--work", metavar="DIR", help="folder for the runs; by default a temporary folder")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(arguments.work or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    for seed in [] if arguments.table else arguments.seeds:
        for name in arguments.datasets:
            if result_file(name, seed).exists():
                continue
            values = DATASETS[name](folder)
            config, run = folder / f"{name}.yaml", folder / f"{name}-{seed}"
            config.write_text(yaml.safe_dump(values))
            train(config, run, seed)
            result = compare(run, values["dataset"])
            write_json(result_file(name, seed), {"dataset": name, "seed": seed, **result, "machine": machine()})
            print(f"{result_file(name, seed)} is written.", flush=True)
    print(tables())


if __name__ == "__main__":
    main()
