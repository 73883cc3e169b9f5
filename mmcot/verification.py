"""Whether a published model answers as the folder that it was made from, seen from a process that knows neither.

    python mmcot/verification.py FOLDER REPO_ID COMMIT

is that process, and imports nothing of ours.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def answers_alike(folder: Path, repo_id: str, commit: str) -> None:
    """
    Raises:
        ValueError: it does not load by its id, with an empty cache, or answers otherwise than the folder.
    """
    from huggingface_hub import constants

    with tempfile.TemporaryDirectory() as home:
        result = subprocess.run(
            [sys.executable, "-I", __file__, folder.resolve(), repo_id, commit],
            env={
                **os.environ,
                **{"HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_MODULES_CACHE": f"{home}/modules"},
                "HF_TOKEN_PATH": constants.HF_TOKEN_PATH,
            },
            cwd=home,
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        raise ValueError(f"{repo_id} at {commit} does not load: {result.stderr.strip().splitlines()[-1:]}")
    local, published = json.loads(result.stdout.splitlines()[-1])
    if local != published:
        raise ValueError(f"{repo_id} at {commit} answers {published}, and {folder} answers {local}")


def main(folder: str, repo_id: str, commit: str) -> None:
    from PIL import Image
    from transformers import pipeline

    answers = []
    for model, revision in ((folder, None), (repo_id, commit)):
        answer = pipeline("multimodal-cot", model=model, revision=revision, trust_remote_code=True)
        problem = {"question": "Which color is it?", "choices": ["red", "blue"], "context": "It is a color."}
        if answer.processor.image_processor is not None:
            problem["image"] = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
        answers.append(answer(problem))
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
