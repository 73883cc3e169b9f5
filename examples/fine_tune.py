"""Train both stages on your own problems: a folder with pictures and one `metadata.jsonl`.

python -m examples.fine_tune [--output_dir runs/own_data] [any option of train.py]

This script writes the folder from 240 drawn problems, so that it runs without a network. Replace the folder with your
own, with one line of JSON for each problem. The model of the recipe, `own_data.yaml`, is tiny and starts from random
weights: after 60 steps it writes sentences of the right form, and its answers are near chance.
"""

import itertools
import json
import sys
from pathlib import Path

from mmcot.problems.demo import generate
from mmcot.train import main

RECIPE = Path(__file__).with_name("own_data.yaml")


def write_problems(folder: Path, count: int = 240) -> None:
    """Write the example folder: for each problem a picture, question, choices, index of the answer and solution."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as file:
        for number, drawn in enumerate(itertools.islice(generate("train", skill="bar_chart"), count)):
            (folder / f"{number}.png").write_bytes(drawn["images"][0]["bytes"])
            problem = {name: drawn[name] for name in ("question", "choices", "answer", "solution")}
            file.write(json.dumps({"file_name": f"{number}.png", **problem}) + "\n")


if __name__ == "__main__":
    options = sys.argv[1:] if "--output_dir" in sys.argv else ["--output_dir", "runs/own_data", *sys.argv[1:]]
    problems = Path(options[options.index("--output_dir") + 1] + "_problems")
    if not problems.exists():
        write_problems(problems)
    # Rows without a split are divided 8:1:1 by a hash of their content.
    main(["--config", str(RECIPE), "--dataset", str(problems), *options])
