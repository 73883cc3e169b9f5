"""The demonstration's training killed again and again: does it end in what an uninterrupted one ends in?

    python -m benchmarks.interruption --kills 20 --seed 0 [--work DIR] [--output FILE]

`train.py --config configs/demo/two_stages.yaml` is run once to its end. Then it is killed (SIGKILL) at random moments
over both stages and the export, each time called again with the same command, and run to its end. Weights, predictions,
scores and the exported folder of both runs are compared, byte for byte. Prints a JSON object.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.setting import report
from mmcot.storage.run_folder import RunFolder

# What a run passes through, by the file that it begins with, and for how many seconds of it a kill may come.
EPOCHS = {"rationale": 11, "answer": 3}
COMPARED = ("*/model.safetensors", "predictions/*.json", "scores/*.json", "hub/**/*")


@dataclass
class Phase:
    name: str
    begins_with: str  # a path in the run's folder; with * the one of the highest number
    number: int
    seconds: float


def phases() -> list[Phase]:
    found = [Phase("start", "", 0, 20)]
    for stage, epochs in EPOCHS.items():
        found += [Phase(f"{stage}, epoch {n + 1}", f"{stage}/checkpoint-*", n, 40) for n in range(1, epochs)]
        found.append(Phase(f"{stage}, predicting", f"{stage}/train_results.json", 0, 15))
    found.append(Phase("scoring and export", "scores/val.json", 0, 0.3))
    return found


def has_begun(phase: Phase, run: Path, steps_per_epoch: dict[str, int], called_at: float) -> bool:
    if phase.begins_with.startswith("scores"):  # written again by every call
        return (run / phase.begins_with).exists() and (run / phase.begins_with).stat().st_mtime > called_at
    if "*" not in phase.begins_with:
        return (run / phase.begins_with).exists()
    stage = phase.begins_with.split("/")[0]
    wanted = phase.number * steps_per_epoch[stage]
    reached = [int(path.name.split("-")[1]) for path in run.glob(phase.begins_with)]
    return RunFolder(run).is_trained(stage) or any(step >= wanted for step in reached)


def start(run: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", "configs/demo/two_stages.yaml", "--output_dir", str(run)]
    with log.open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def finish(run: Path, log: Path) -> float:
    begin = time.perf_counter()
    if start(run, log).wait() != 0:
        raise RuntimeError(f"train.py failed: {log.read_text()[-3000:]}")
    return time.perf_counter() - begin


def killed(run: Path, log: Path, phase: Phase, after: float, steps_per_epoch: dict[str, int]) -> bool:
    """Whether the run was killed so many seconds into that phase; it can end before."""
    process, called_at = start(run, log), time.time()
    moment = None
    while process.poll() is None:
        if moment is None and has_begun(phase, run, steps_per_epoch, called_at):
            moment = time.perf_counter() + after
        if moment is not None and time.perf_counter() >= moment:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.005)
    return False


def content(run: Path) -> dict[str, bytes]:
    files = {file for pattern in COMPARED for file in run.glob(pattern) if file.is_file()}
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


def measure(folder: Path, kills: int, seed: int) -> dict:
    whole, run = folder / "whole", folder / "killed"
    seconds = finish(whole, folder / "whole.log")
    last_steps = {
        stage: max(int(path.name.split("-")[1]) for path in (whole / stage).glob("checkpoint-*")) for stage in EPOCHS
    }
    steps_per_epoch = {stage: steps // EPOCHS[stage] for stage, steps in last_steps.items()}
    drawn = random.Random(seed)
    every = phases()
    # In the order of the run; the last phase twice at least, because it is short.
    chosen = sorted([*(drawn.randrange(len(every)) for _ in range(kills - 2)), len(every) - 1, len(every) - 1])
    moments = []
    for number in tqdm(chosen, desc="kills"):
        phase = every[number]
        after = drawn.uniform(0, phase.seconds)
        while not killed(run, folder / "killed.log", phase, after, steps_per_epoch):
            after /= 2  # it had ended
        moments.append(f"{phase.name}, {after:.2f} s after it began or the command was given")
    finish(run, folder / "killed.log")
    expected, found = content(whole), content(run)
    return {
        "seconds_uninterrupted": round(seconds, 1),
        "kills": moments,
        "files_compared": len(expected),
        "files_that_differ": sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", metavar="DIR", help="where both runs are made")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        report("interruption", measure(folder, arguments.kills, arguments.seed), arguments.output)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
