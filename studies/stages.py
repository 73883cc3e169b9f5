"""Do more, smaller stages make fewer mistakes? The study in docs/studies/stages.md.

    python -m studies.stages --datasets study:fact@2 --arms two_stages four_stages --seeds 0 1 2 --work DIR
    python -m studies.stages --tables        # writes the tables and the plot from the result files

Trains and predicts each arm of `studies/stage_arms.py` by `train.py`, and writes one file per arm and seed into
`studies/results/stages/`. A file that exists is not computed again, and an interrupted training resumes, so the study
can go on over days; several commands with different arms can run side by side. Seed 0 of an arm is trained with each of
`LEARNING_RATES`; the one with the best validation accuracy is used for all seeds, and only its test predictions are
read.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from benchmarks.setting import machine
from mmcot.problems.sources import load_problems
from mmcot.storage.files import read_json, write_json
from mmcot.storage.run_folder import RunFolder
from studies.stage_arms import ARMS, BUDGETS, ONE_PASS, recipe_of
from studies.stage_measures import accuracy_of, measure
from studies.stage_prediction import Predictions, predict_one_pass, predict_with_passages, predict_with_search
from studies.stage_tables import RESULTS, write_tables

LEARNING_RATES = (1e-3, 2e-3)
SEEDS = (0, 1, 2)


class Study:
    """
    Args:
        dataset: the study problems, such as `study:fact@2`.
        steps: the training steps that the budget gives.
        budget: a key of `BUDGETS`.
        work: the folder of the runs.
    """

    def __init__(self, dataset: str, steps: int, budget: str, work: Path):
        self.dataset, self.steps, self.budget = dataset, steps, budget
        self.work = work / f"{slug(dataset)}-{steps}-{budget}"
        self.problems = {split: load_problems(dataset, split) for split in ("val", "test")}

    def result_file(self, arm: str, seed: int) -> Path:
        return RESULTS / f"{slug(self.dataset)}-{self.steps}-{self.budget}" / f"{arm}-{seed}.json"

    def complete(self, name: str, seed: int) -> None:
        """Write the result file of an arm and a seed, unless it exists."""
        arm, file = ARMS[name], self.result_file(name, seed)
        if file.exists():
            return
        by_rate = self.validation_by_rate(name) if arm.run_of is None else {}
        rate = max(by_rate, key=by_rate.__getitem__) if by_rate else self.rate_of(arm.run_of)
        run = self.train(arm.run_of or name, rate, seed)
        result = {
            "arm": name,
            "dataset": self.dataset,
            "seed": seed,
            "budget": {"kind": self.budget, "steps": self.steps},
            "learning_rate": rate,
            "validation_by_learning_rate": by_rate,
            "stages": trainings(run),
            **{split: measure(self.problems[split], self.predictions(name, run, split)) for split in ("val", "test")},
            "machine": machine(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)

    def validation_by_rate(self, name: str) -> dict[str, float]:
        """Return the validation accuracy of seed 0 by learning rate; trains what is missing."""
        known = self.result_file(name, 0)
        if known.exists():
            return read_json(known)["validation_by_learning_rate"]
        accuracy = {}
        for rate in map(str, LEARNING_RATES):
            run = self.train(name, rate, seed=0)
            accuracy[rate] = accuracy_of(self.problems["val"], self.predictions(name, run, "val"))
        return accuracy

    def rate_of(self, name: str) -> str:
        by_rate = self.validation_by_rate(name)
        return max(by_rate, key=by_rate.__getitem__)

    def train(self, name: str, rate: str, seed: int) -> RunFolder:
        run = self.work / f"{name}-{rate}-{seed}"
        run.parent.mkdir(parents=True, exist_ok=True)
        config = run.with_name(f"{run.name}.yaml")
        config.write_text(yaml.safe_dump(recipe_of(ARMS[name], self.dataset, self.steps, self.budget, float(rate))))
        command = [sys.executable, "train.py", "--config", str(config), "--output_dir", str(run), "--seed", str(seed)]
        if ARMS[name].is_one_pass:
            command += ["--stage", ONE_PASS]
        with run.with_name(f"{run.name}.log").open("a") as log:
            if subprocess.run(command, stdout=log, stderr=log).returncode != 0:
                raise RuntimeError(f"train.py failed: {log.name}")
        return RunFolder(run)

    def predictions(self, name: str, run: RunFolder, split: str) -> Predictions:
        arm = ARMS[name]
        if arm.is_one_pass:
            return predict_one_pass(run, self.problems[split])
        if arm.passages is not None:
            return predict_with_passages(run, split, self.problems[split], arm.passages, self.dataset)
        if arm.searches:
            return predict_with_search(run, self.problems[split])
        return run.predictions_so_far(split)


def trainings(run: RunFolder) -> dict[str, dict[str, float]]:
    """
    Return the steps, the seconds and the peak memory of each training of a run. Those of a training that was
    interrupted count from its last start.
    """
    trained = {}
    for file in sorted(run.path.rglob("train_results.json")):
        results = read_json(file)
        if "train_runtime" in results:
            memory = [entry["memory_gb"] for entry in results["log_history"] if "memory_gb" in entry]
            trained[str(file.parent.relative_to(run.path))] = {
                "steps": round(results["train_runtime"] * results["train_steps_per_second"]),
                "seconds": round(results["train_runtime"], 1),
                "memory_gb": max(memory, default=None),
            }
    return trained


def slug(dataset: str) -> str:
    return dataset.removeprefix("study").lstrip(":").replace(",", "+") or "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["study:fact@2"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=1300, help="training steps of an arm")
    parser.add_argument("--budget", choices=list(BUDGETS), default="total", help="what has `--steps` training steps")
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="folder of the runs")
    parser.add_argument("--tables", action="store_true", help="only write the tables and the plot")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.tables:
        print(json.dumps(write_tables(), indent=2))
        return
    for dataset in arguments.datasets:
        study = Study(dataset, arguments.steps, arguments.budget, arguments.work)
        for seed in tqdm(arguments.seeds, desc=dataset):
            for name in tqdm(arguments.arms, desc=f"seed {seed}", leave=False):
                study.complete(name, seed)


if __name__ == "__main__":
    main()
