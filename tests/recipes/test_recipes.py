"""Recipes: their settings, and the errors that are found before data is read."""

from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, TINY_RECIPE

from mmcot.problems import schema as problems
from mmcot.recipes.recipe import claim_run_folder, config_path, parse_recipe, run_name
from modeling_mmcot import processing_mmcot

SHIPPED = sorted(file for file in (REPOSITORY / "configs").glob("*/*.yaml") if file.parent.name != "accelerate")
# The earlier names of the recipes in `configs/`, which are still the names of their default run folders.
EARLIER_NAMES = {
    "demo/two_stages": "demo",
    "demo/one_stage": "demo_one_stage",
    "demo/no_vision": "demo_no_vision",
    "scienceqa/small": "scienceqa_small",
    "scienceqa/base": "scienceqa_base",
    "scienceqa/base_detr": "scienceqa_base_detr",
    "scienceqa/large": "scienceqa_large",
    "scienceqa/smoke": "scienceqa_smoke",
    "scienceqa/xl_lora": "scienceqa_xl_lora",
    "aokvqa/base": "aokvqa_base",
    "aokvqa/xl_lora": "aokvqa_xl_lora",
}


def parse(tmp_path, change=None, *options):
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    if change is not None:
        change(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return parse_recipe(["--config", str(file), *options])


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_parses(recipe):
    parsed = parse_recipe(["--config", str(recipe), "--use_cpu", "true"])  # because bf16 is refused without a GPU
    assert "answer_text" in [stage.writes for stage in parsed.stages]
    name = f"{recipe.parent.name}/{recipe.stem}"
    assert parsed.training_arguments.output_dir == f"runs/{EARLIER_NAMES.get(name, name.replace('/', '_'))}"


@pytest.mark.parametrize(("name", "earlier_name"), EARLIER_NAMES.items())
def test_finds_recipe_by_its_earlier_name(name, earlier_name, caplog, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert config_path(["--config", f"configs/{name}.yaml"]) == f"configs/{name}.yaml" and not caplog.messages
    assert config_path(["--config", f"configs/{earlier_name}.yaml"]) == f"configs/{name}.yaml"
    assert caplog.messages == [f"configs/{earlier_name}.yaml is now configs/{name}.yaml."]
    monkeypatch.chdir("configs")
    assert config_path(["--config", f"{earlier_name}.yaml"]) == f"{name}.yaml"
    assert run_name(Path(f"{name}.yaml")) == earlier_name


def test_names_run_folder_after_a_users_recipe_file(tmp_path):
    assert parse(tmp_path).training_arguments.output_dir == "runs/recipe"


def test_command_line_overrides_recipe(tmp_path):
    recipe = parse(tmp_path, None, "--learning_rate", "2e-5", "--fusion", "other")
    assert recipe.training_arguments.learning_rate == 2e-5
    assert recipe.arguments.fusion == "other"
    assert recipe.values["learning_rate"] == 2e-5


def test_converts_nested_numbers_that_yaml_reads_as_strings(tmp_path):
    recipe = parse(tmp_path, lambda r: r["stages"][0].update(learning_rate="1e-4", num_train_epochs="3"))
    assert recipe.stages[0].learning_rate == 1e-4 and recipe.stages[0].num_train_epochs == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(learning_rat=1), "'learning_rat' .*did you mean 'learning_rate'"),
        (lambda r: r["stages"][0].update(templat="QCM-E"), "'rationale' .*'templat' .*did you mean 'template'"),
        (lambda r: r["stages"][0].pop("writes"), "'rationale' lacks the key 'writes'"),
        (lambda r: r["stages"][0].pop("template"), "'rationale' needs a `template`, or both"),
        (lambda r: r["stages"][1]["reads"].append("rational"), "'answer' reads 'rational'.*did you mean 'rationale'"),
        (lambda r: r["stages"][0]["reads"].append("solution"), "'rationale' reads 'solution', a gold column"),
        (
            lambda r: r["stages"][0].update(writes="caption"),
            "'rationale' writes 'caption', a column",
        ),
        (lambda r: r["stages"][0].update(name="answer"), "two stages are named 'answer'"),
        (lambda r: r["stages"].pop(), "exactly one stage writes `answer_text`; found rationale writes rationale"),
        (lambda r: r.update(stages=[]), "`stages` is empty"),
        (lambda r: r.update(lora_r=8), "use_peft"),
        (lambda r: r.pop("image_processor"), "a stage reads `images`, but no setting"),
        (lambda r: r.update(fusion="none"), "fusion is 'none', but a stage reads `images`: omit it from `reads`"),
        (lambda r: r.update(fusion_options=[2]), r"fusion_options is \[2\]; expected a mapping"),
        (lambda r: r.update(replace_fusion=True), "replace_fusion has no effect without model_name_or_path and fusion"),
        (lambda r: r["stages"][0].update(name="../../x"), "name of a stage is '../../x'; expected letters, digits"),
        (lambda r: r["stages"][0].update(name=["x"]), "name of a stage is .*'x'.*; expected letters, digits"),
        (lambda r: r["stages"][0].update(name="hub"), "name of a stage is 'hub', a folder that a run uses"),
        (lambda r: r.update(env={"PYTHONPATH": "/evil"}), "env is not read: set environment variables"),
        (lambda r: r.update(trust_remote_code=True), "unknown key 'trust_remote_code'"),
        (
            lambda r: r.update(attn_implementation="evil/kernel"),
            "attn_implementation is 'evil/kernel', code of the Hub",
        ),
        (
            lambda r: r["vision_config"].update(attn_implementation="evil/kernel"),
            "vision_config.attn_implementation is 'evil/kernel', code of the Hub",
        ),
    ],
)
def test_refuses_invalid_recipe_with_its_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(tmp_path, change)
    assert str(tmp_path / "recipe.yaml") in str(error.value)


@pytest.mark.parametrize("content", ["", "- stages\n", "stages"])
def test_refuses_recipe_that_is_no_mapping(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ValueError, match="recipe.yaml: a recipe is a mapping; found"):
        parse_recipe(["--config", str(tmp_path / "recipe.yaml")])


def test_warns_about_fp16_and_recommends_bf16(tmp_path, caplog):
    parse(tmp_path, None, "--fp16", "true")
    assert "overflow float16" in caplog.text and "bf16" in caplog.text


def test_gold_columns_are_equal_in_both_packages():
    """They are defined twice, because `modeling_mmcot` may not import `mmcot`, and `mmcot.problems` no model."""
    assert problems.GOLD_COLUMNS == processing_mmcot.GOLD_COLUMNS


def test_refuses_unknown_option(tmp_path):
    with pytest.raises(ValueError, match="the command line: unknown key 'learning_rat'"):
        parse(tmp_path, None, "--learning_rat", "1")


def test_refuses_missing_recipe():
    with pytest.raises(ValueError, match="configs/nothing.yaml: no such file"):
        parse_recipe(["--config", "configs/nothing.yaml"])


def test_refuses_folder_with_other_files(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and has no recipe.yaml"):
        claim_run_folder(parse(tmp_path, None, "--output_dir", str(tmp_path / "run")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_run_folder_accepts_other_runtime_settings_only(tmp_path):
    output = ("--output_dir", str(tmp_path / "run"))
    claim_run_folder(parse(tmp_path, None, *output))
    claim_run_folder(parse(tmp_path, None, *output, "--logging_steps", "7", "--dataloader_num_workers", "2"))
    with pytest.raises(ValueError, match=r"another recipe: seed: .* there, 9 here\. Choose"):
        claim_run_folder(parse(tmp_path, None, *output, "--seed", "9"))


def test_max_images_0_equals_the_recipe_without_pictures():
    """`--max_images 0` gives the settings of `demo/no_vision`."""
    withheld = parse_recipe(["--config", str(REPOSITORY / "configs/demo/two_stages.yaml"), "--max_images", "0"])
    expected = parse_recipe(["--config", str(REPOSITORY / "configs/demo/no_vision.yaml")])
    assert withheld.stages == expected.stages
    assert {**vars(withheld.arguments), "stages": None, "fusion": None} == {**vars(expected.arguments), "stages": None}
    assert withheld.values["max_images"] == 0 and withheld.values["vision_config"] is not None


def test_names_the_changed_keys_of_an_edited_recipe(tmp_path):
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    file = tmp_path / "recipe.yaml"
    command = ["--config", str(file), "--dataset", "demo", "--output_dir", str(tmp_path / "run")]
    file.write_text(yaml.safe_dump(recipe))
    claim_run_folder(parse_recipe(command))
    recipe["stages"][0]["max_source_length"] = 256
    recipe["vision_config"]["patch_size"] = 16
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError) as refused:
        claim_run_folder(parse_recipe(command))
    assert str(refused.value) == (
        f"{tmp_path / 'run'} contains a run of another recipe: stages[0].max_source_length: 128 there, 256 here; "
        f"vision_config.patch_size: 32 there, 16 here. Choose another --output_dir."
    )


@pytest.mark.parametrize("content", [b"stages: [a, b", b"\tdataset: demo", b"dataset: caf\xe9"])
def test_refuses_invalid_yaml(content, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: expected a recipe in YAML; found "):
        parse_recipe(["--config", str(file)])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="run/recipe.yaml: expected a recipe in YAML; found "):
        command = ["--config", str(TINY_RECIPE), "--dataset", "demo", "--output_dir", str(tmp_path / "run")]
        claim_run_folder(parse_recipe(command))


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "per_device_eval_batch_size"])
def test_refuses_batch_size_0(name):
    with pytest.raises(ValueError, match=f"{name} is 0; expected 1 or more"):
        parse_recipe(["--config", str(TINY_RECIPE), "--dataset", "demo", f"--{name}", "0"])
