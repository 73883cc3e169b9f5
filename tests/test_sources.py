"""Sources of problems beside ScienceQA's folder: A-OKVQA as it is released, and datasets of the Hub."""

import datasets
import pytest
import yaml
from conftest import HUB_FEATURES, TINY_RECIPE, hub_rows

from mmcot.files import read_json
from mmcot.problems import FEATURES
from mmcot.sources import load_problems
from mmcot.training import main as train

# A dataset of the Hub.


def test_a_dataset_of_the_hub_is_brought_into_the_schema(hub_dataset):
    problems = load_problems(str(hub_dataset), "val")
    assert problems.features == FEATURES and problems["id"] == [f"val-{row}" for row in range(5)]
    row, expected = problems[3], hub_rows(4)[3]
    assert row["context"] == "hint 3" and row["images"][0]["bytes"] == expected["image"]["bytes"]
    for name in ("question", "choices", "answer", "grade", "subject", "solution"):
        assert row[name] == expected[name]
    assert problems[2]["images"] == []


@pytest.mark.slow
def test_a_run_on_a_dataset_of_the_hub_ends(hub_dataset, tmp_path):
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "dataset": str(hub_dataset), "max_steps": 2}))
    train(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")])
    assert read_json(tmp_path / "run/scores/test.json")["n"] == 5


def test_a_dataset_that_is_not_there_or_has_other_columns_is_named(hub_dataset, tmp_path):
    with pytest.raises(
        ValueError, match="dataset is 'nobody/nothing'; expected .* As a dataset of the Hub it cannot be loaded"
    ):
        load_problems("nobody/nothing", "val")
    dataset = datasets.Dataset.from_list(hub_rows(2), features=HUB_FEATURES).rename_column("hint", "hints")
    dataset.to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="unknown column 'hints' .did you mean 'hint'"):
        load_problems(str(tmp_path), "test")
