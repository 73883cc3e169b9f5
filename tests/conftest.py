"""What several test files need: the shared data, tiny models with random weights, a run of a tiny recipe."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmcot.demo import generate
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
TINY_RECIPE = REPOSITORY / "tests" / "tiny.yaml"

TINY_TEXT = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
TINY_VISION = {
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def shared(path: str) -> Path:
    """A file of `../shared`; a test that needs one is skipped where it is absent."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"needs the data beside the repository, and {file} is absent")
    return file


def tiny_model(seed: int = 0, **config) -> MMCoTForConditionalGeneration:
    """Random weights of some size (`initializer_factor`), so that differences show in what is generated."""
    torch.manual_seed(seed)
    model = MMCoTForConditionalGeneration(MMCoTConfig(**{**TINY_TEXT, "vision_config": TINY_VISION, **config}))
    model.generation_config.update(max_new_tokens=12)
    return model.eval()


def run_script(*command: str, check: bool = True, cwd: Path = REPOSITORY, **environment: str):
    """A command as a user runs it, in a process of its own."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if check and result.returncode != 0:
        raise AssertionError(
            f"{command} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
        )
    return result


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """A JSONL of 72 demonstration problems in three splits, with their pictures on disk beside it."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = list(itertools.islice(generate("val"), 72))
    with (folder / "problems.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            names = []
            for picture in row["images"]:
                names.append(f"{row['id']}.png")
                (folder / names[-1]).write_bytes(picture["bytes"])
            split = "train" if number < 40 else "val" if number < 52 else "test"
            file.write(json.dumps({**row, "images": names, "split": split}) + "\n")
    return folder / "problems.jsonl"


@pytest.fixture(scope="session")
def tiny_run(tiny_dataset, tmp_path_factory) -> Path:
    """The finished run of `tests/tiny.yaml`, made as a user makes one."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_script("train.py", "--config", TINY_RECIPE, "--dataset", tiny_dataset, "--output_dir", folder)
    return folder
