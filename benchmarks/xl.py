"""Train FLAN-T5-XL's shape with LoRA on this machine: steps of each stage, generation, saving, a kill and a resume.

    python -m benchmarks.xl [--work DIR] [--output FILE]

Weights are random, created layer by layer in bfloat16. The recipe is configs/scienceqa/xl_lora.yaml, shortened to a few
real problems, two steps per stage (the first is saved) and texts of 16 tokens. `train.py` is killed (SIGKILL) after the
answer stage saved its first step, and then restarted. DIR (by default a temporary folder) stores the base three times,
6 GB each. Prints a JSON object: seconds, and the peak resident memory of each run, sampled by another process.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.recipes import parameters, short_recipe, stage_results, train
from benchmarks.setting import report
from mmcot.storage.files import read_json

TEXT_LENGTH = 16


def measure(folder: Path) -> dict:
    recipe, run = short_recipe("scienceqa/xl_lora", folder, max_steps=2, text_length=TEXT_LENGTH), folder / "run"
    saving = ("--save_strategy", "steps", "--save_steps", "1")
    saved = run / "answer" / "checkpoint-1" / "trainer_state.json"
    result = {"until killed": train(recipe, run, *saving, kill_after=saved)}
    result["called again"] = train(recipe, run, *saving)
    result.update(stage_results(run))
    predictions = read_json(run / "predictions" / "test.json")
    result["predicted"] = {"problems": len(predictions), "rationales": [p["rationale"] for p in predictions.values()]}
    result["parameters"] = parameters(run / "hub")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", metavar="DIR", help="folder for the checkpoint and the run")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        report("xl", measure(folder), arguments.output)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
