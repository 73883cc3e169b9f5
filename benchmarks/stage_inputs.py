"""Compare training inputs and initial weights of a stage: the study in docs/stage_inputs.md.

    python -m benchmarks.stage_inputs --seeds 0 1 2 --difficulty 3 --num_folds 3 [--work DIR] [--output FILE]
    python -m benchmarks.stage_inputs --difficulties 2 3 5     # the plain recipe's validation accuracy, to choose one

The study trains `configs/demo/two_stages.yaml` on a harder demonstration (`mmcot/problems/demo.py`). The answer stage
is trained on gold, generated and cross-fitted rationales, each from the base's and from the rationale stage's weights.
All runs of a seed share one trained rationale stage. Running the command again with the same DIR resumes. Prints a JSON
object.
"""

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from benchmarks.setting import report
from mmcot.problems.sources import load_problems
from mmcot.recipes.arguments import STAGE_CHOICES
from mmcot.recipes.recipe import claim_run_folder, parse_recipe
from mmcot.storage.files import read_json, write_json
from mmcot.storage.folders import replaced_folder
from mmcot.storage.run_folder import CROSS_FITTED, RunFolder

RECIPE = "configs/demo/two_stages.yaml"
VARIANTS = list(itertools.product(STAGE_CHOICES["init_from"], STAGE_CHOICES["inputs_from"]))


def train(config: Path, run: Path, *options: str) -> None:
    command = [sys.executable, "train.py", "--config", str(config), "--output_dir", str(run), *options]
    with run.with_suffix(".log").open("a") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode != 0:
            raise RuntimeError(f"train.py failed: {run.with_suffix('.log').read_text()[-3000:]}")


def recipe(file: Path, init_from: str, inputs_from: str) -> Path:
    values = yaml.safe_load(Path(RECIPE).read_text())
    values["stages"][1].update(init_from=init_from, inputs_from=inputs_from)
    file.write_text(yaml.safe_dump(values))
    return file


def share_rationale_stage(trained: RunFolder, run: Path, config: Path, options: list[str]) -> None:
    """Create a run with the trained rationale stage of another run and the rationales that the stage wrote."""
    if run.exists():
        return
    with replaced_folder(run) as unfinished:
        copy_rationale_stage(trained, RunFolder(unfinished), config, options)


def copy_rationale_stage(trained: RunFolder, unfinished: RunFolder, config: Path, options: list[str]) -> None:
    claim_run_folder(parse_recipe(["--config", str(config), "--output_dir", str(unfinished), *options]))
    shutil.copytree(trained.stage("rationale"), unfinished.stage("rationale"))
    if trained.folds.exists():
        shutil.copytree(trained.folds, unfinished.folds)
    for split in ("train", "val", "test", CROSS_FITTED):
        columns = trained.predictions_so_far(split)
        if columns:
            rationales = {problem_id: {"rationale": column["rationale"]} for problem_id, column in columns.items()}
            write_json(unfinished.predictions(split), rationales)


def study(folder: Path, seeds: list[int], difficulty: int, num_folds: int) -> dict:
    results = {f"{inputs_from}, {init_from}": [] for init_from, inputs_from in VARIANTS}
    texts = []
    for seed, (init_from, inputs_from) in tqdm(list(itertools.product(seeds, VARIANTS)), desc="runs"):
        options = ["--dataset", f"demo:{difficulty}", "--seed", str(seed), "--num_folds", str(num_folds)]
        run = folder / f"{seed}-{init_from}-{inputs_from}"
        config = recipe(run.with_suffix(".yaml"), init_from, inputs_from)
        # The first run of a seed trains the rationale stage; the first run of each kind of input writes that input.
        base_run = folder / f"{seed}-base-{inputs_from}"
        trained = base_run if init_from != "base" else folder / f"{seed}-base-gold"
        if run != trained:
            share_rationale_stage(RunFolder(trained), run, config, options)
        train(config, run, *options)
        scores = {split: read_json(RunFolder(run).scores(split))["accuracy"] for split in ("val", "test")}
        accuracy = {"test": scores["test"]["Avg"], "test IMG": scores["test"]["IMG"], "val": scores["val"]["Avg"]}
        results[f"{inputs_from}, {init_from}"].append({"seed": seed, **accuracy})
        if init_from == "base":
            split = {"gold": "test", "generated": "train", "cross_fit": CROSS_FITTED}[inputs_from]
            right = right_rationales(RunFolder(run).predictions_so_far(split), difficulty, split)
            texts.append({"seed": seed, "problems": split, "exactly right": right})
    return {"seeds": results, "summary": {name: summary(runs) for name, runs in results.items()}, "rationales": texts}


def right_rationales(predictions: dict[str, dict], difficulty: int, split: str) -> float:
    """Return the percentage of rationales that equal gold."""
    problems = load_problems(f"demo:{difficulty}", "test" if split == "test" else "train").remove_columns("images")
    right = [predictions[row["id"]]["rationale"] == f"Solution: {row['solution']}" for row in problems]
    return round(100 * sum(right) / len(right), 2)


def summary(runs: list[dict]) -> dict:
    """Return the mean and standard deviation over the seeds."""
    values = {name: [run[name] for run in runs] for name in ("test", "test IMG", "val")}
    return {
        name: {"mean": round(statistics.mean(v), 2), "sd": round(statistics.stdev(v), 2) if len(v) > 1 else None}
        for name, v in values.items()
    }


def choose(folder: Path, difficulties: list[int]) -> dict:
    """Return the plain recipe's validation accuracy by difficulty."""
    result = {}
    for difficulty in tqdm(difficulties, desc="difficulties"):
        run = folder / f"difficulty-{difficulty}"
        train(Path(RECIPE), run, "--dataset", f"demo:{difficulty}")
        accuracy = read_json(run / "scores/val.json")["accuracy"]
        result[difficulty] = {name: round(accuracy[name], 1) for name in ("Avg", "IMG")}
    return {"validation accuracy by difficulty": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--difficulty", type=int, default=3)
    parser.add_argument("--num_folds", type=int, default=3)
    parser.add_argument(
        "--difficulties", type=int, nargs="+", help="run only the plain recipe, at each of these difficulties"
    )
    parser.add_argument("--work", metavar="DIR", help="folder for the runs; by default a temporary folder")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(arguments.work or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.difficulties:
        result = choose(folder, arguments.difficulties)
    else:
        result = study(folder, arguments.seeds, arguments.difficulty, arguments.num_folds)
    report("stage_inputs", result, arguments.output)


if __name__ == "__main__":
    main()
