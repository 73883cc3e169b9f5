"""Kill the demonstration's training repeatedly, and compare the result with an uninterrupted training.

    python -m benchmarks.interruption --kills 20 --seed 0 [--work DIR] [--output FILE]

One run of `train.py --config configs/demo/two_stages.yaml` is uninterrupted. A second run is killed (SIGKILL) at random
moments in both stages and the export, restarted with the same command each time, and then finished. Weights,
predictions, scores and the exported folders of both runs are compared byte for byte. Prints a JSON object.
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

# Epochs of each stage, and the files that are compared.
EPOCHS = {"rationale": 11, "answer": 3}
COMPARED = ("*/model.safetensors", "predictions/*.json", "scores/*.json", "hub/**/*")


@dataclass
class Phase:
    """
    A part of a run.

    Args:
        begins_with: a path in the run folder that exists from the start of the phase; `*` matches a step number.
        number: the number of finished epochs at the start of the phase.
        seconds: how long after the start of the phase a kill can occur.
    """

    name: str
    begins_with: str
    number: int
    seconds: float


def phases() -> list[Phase]:
    result = [Phase("start", "", 0, 20)]
    for stage, epochs in EPOCHS.items():
        result += [Phase(f"{stage}, epoch {n + 1}", f"{stage}/checkpoint-*", n, 40) for n in range(1, epochs)]
        result.append(Phase(f"{stage}, predicting", f"{stage}/train_results.json", 0, 15))
    result.append(Phase("scoring and export", "scores/val.json", 0, 0.3))
    return result


def has_begun(phase: Phase, run: Path, steps_per_epoch: dict[str, int], called_at: float) -> bool:
    if phase.begins_with.startswith("scores"):  # every call writes it again
        return (run / phase.begins_with).exists() and (run / phase.begins_with).stat().st_mtime > called_at
    if "*" not in phase.begins_with:
        return (run / phase.begins_with).exists()
    stage = phase.begins_with.split("/")[0]
    first_step = phase.number * steps_per_epoch[stage]
    reached = [int(path.name.split("-")[1]) for path in run.glob(phase.begins_with)]
    return RunFolder(run).is_trained(stage) or any(step >= first_step for step in reached)


def start(run: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", "configs/demo/two_stages.yaml", "--output_dir", str(run)]
    with log.open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def finish(run: Path, log: Path) -> float:
    begin = time.perf_counter()
    if start(run, log).wait() != 0:
        raise RuntimeError(f"train.py failed: {log.read_text()[-3000:]}")
    return time.perf_counter() - begin


def kill_in_phase(run: Path, log: Path, phase: Phase, after: float, steps_per_epoch: dict[str, int]) -> bool:
    """Start the run and kill it `after` seconds into the phase; return False if it ended earlier."""
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
    uninterrupted, run = folder / "whole", folder / "killed"
    seconds = finish(uninterrupted, folder / "whole.log")
    last_steps = {
        stage: max(int(path.name.split("-")[1]) for path in (uninterrupted / stage).glob("checkpoint-*"))
        for stage in EPOCHS
    }
    steps_per_epoch = {stage: steps // EPOCHS[stage] for stage, steps in last_steps.items()}
    generator = random.Random(seed)
    all_phases = phases()
    # In the order of the run; the last phase at least twice, because it is short.
    last = len(all_phases) - 1
    chosen = sorted([*(generator.randrange(len(all_phases)) for _ in range(kills - 2)), last, last])
    moments = []
    for number in tqdm(chosen, desc="kills"):
        phase = all_phases[number]
        after = generator.uniform(0, phase.seconds)
        while not kill_in_phase(run, folder / "killed.log", phase, after, steps_per_epoch):
            after /= 2  # the run ended before the kill
        moments.append(f"{phase.name}, {after:.2f} s after its start, or after the command if it had started before")
    finish(run, folder / "killed.log")
    expected, found = content(uninterrupted), content(run)
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
    parser.add_argument("--work", metavar="DIR", help="folder for both runs")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        report("interruption", measure(folder, arguments.kills, arguments.seed), arguments.output)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
