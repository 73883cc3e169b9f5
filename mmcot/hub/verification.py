"""Loads a model in a fresh process, which imports nothing from this repository, and returns its answer.

python mmcot/hub/verification.py FOLDER_OR_ID [COMMIT]
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any


def answer_in_fresh_process(model: str, commit: str | None = None) -> dict[str, Any]:
    """
    Return the model's answer to a fixed, meaningless problem; the process starts with an empty cache.

    Raises:
        ValueError: the model does not load or does not answer.
    """
    from huggingface_hub import constants

    with tempfile.TemporaryDirectory() as home:
        caches = {"HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_MODULES_CACHE": f"{home}/modules"}
        result = subprocess.run(
            [sys.executable, "-I", __file__, model, *([commit] if commit else [])],
            env={**os.environ, **caches, "HF_TOKEN_PATH": constants.HF_TOKEN_PATH},
            cwd=home,
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines()[-1:]
        raise ValueError(f"{model} does not load in a fresh process{f' at {commit}' if commit else ''}: {reason}")
    return json.loads(result.stdout.splitlines()[-1])


def main(model: str, commit: str | None = None) -> None:
    from PIL import Image
    from transformers import pipeline

    answer = pipeline("multimodal-cot", model=model, revision=commit, trust_remote_code=True)
    problem = {"question": "Which color is it?", "choices": ["red", "blue"], "context": "It is a color."}
    if answer.processor.image_processor is not None:
        problem["image"] = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    print(json.dumps(answer(problem)))


if __name__ == "__main__":
    main(*sys.argv[1:])
