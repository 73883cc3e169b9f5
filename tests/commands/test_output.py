"""The output of commands: no misleading warnings in an ordinary run, our options first in `--help`."""

import json

import pytest
from conftest import REPOSITORY, TINY_RECIPE, run_script

WARNINGS = ("does not support `output_attentions", "Flattening the indices", "Generating train split", "Failed to load")


@pytest.fixture(scope="module")
def printed(tiny_run, tiny_dataset, tmp_path_factory):
    """The output of each command, in the order in which a newcomer calls them."""
    folder = tmp_path_factory.mktemp("output")
    of_data = ("--dataset", tiny_dataset)
    ids = ("--ids", *[json.loads(line)["id"] for line in tiny_dataset.read_text().splitlines()[53:60:2]])
    commands = {
        "train": ("train.py", "--config", TINY_RECIPE, *of_data, "--output_dir", folder / "run", "--max_steps", "2"),
        "predict": ("-m", "mmcot.predict", tiny_run, *of_data, "--output", folder / "test.json", *ids),
        "evaluate": (
            *("-m", "mmcot.evaluate", folder / "test.json", *of_data, *ids),
            *("--report", folder / "report", "--attention", tiny_run),
        ),
        "probes": ("-m", "mmcot.probes", tiny_run, *of_data, *ids),
        "push": ("push_to_hub.py", tiny_run, "--repo_id", "ada/tiny", "--license", "mit", "--dry_run"),
    }
    # An empty cache, because cached data shows no progress bar.
    cache = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    results = {name: run_script(*command, is_fresh=True, **cache) for name, command in commands.items()}
    return {name: result.stdout + result.stderr for name, result in results.items()}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "probes", "push"])
@pytest.mark.parametrize("text", WARNINGS)
def test_ordinary_run_prints_no_misleading_warning(command, text, printed):
    assert text not in printed[command]
    assert "Traceback" not in printed[command] and "UserWarning" not in printed[command]


@pytest.mark.slow
def test_help_without_a_recipe_shows_our_options_first():
    result = run_script("train.py", "--help", cwd=REPOSITORY)
    shown = " ".join(result.stdout.split())
    places = [shown.index(f"--{name}") for name in ("config", "dataset", "fusion", "max_images", "decode_answer")]
    assert places == sorted(places) and "COLUMN=FILE.json" in shown
    assert "transformers.Seq2SeqTrainingArguments" in shown and "trl.ModelConfig" in shown
    assert "train.py --config configs/demo/two_stages.yaml --help" in shown and "--warmup_steps" not in shown
