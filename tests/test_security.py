"""Attacks by files that strangers write: a model's, a run's, a recipe's. docs/security.md names what guards each."""

import json
import os
import shutil

import pytest
import torch
import yaml
from conftest import TINY_RECIPE, as_a_stranger, run_script
from jinja2.exceptions import SecurityError

from mmcot.predict import load_system
from mmcot.recipes import parse_recipe
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.processing_mmcot import Stage, render


@pytest.fixture
def folder(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "hub", tmp_path / "model")
    return tmp_path / "model"


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_processors_file_calls_nothing_but_image_processors(folder, tmp_path):
    """It ran the code of a second repository from `mmcot.predict FOLDER`, without trust_remote_code."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w')\nclass Config: pass\n")
    attack = {"image_processor_type": "pipeline", "task": "text-generation", "model": str(evil)}
    change(folder / "processor_config.json", image_processor={**attack, "trust_remote_code": True})
    with pytest.raises(ValueError, match="image_processor_type is 'pipeline'; expected an image processor"):
        load_system(str(folder))
    command = ("-m", "mmcot.predict", folder, "--dataset", "demo", "--output", tmp_path / "out.json", "--limit", "1")
    result = run_script(*command, check=False)
    assert result.returncode != 0 and "expected an image processor" in result.stderr
    assert not (tmp_path / "was_here").exists()


def test_a_towers_configuration_runs_no_code_of_its_own(tmp_path):
    vision = {"model_type": "evil", "auto_map": {"AutoConfig": f"{tmp_path}--evil.Config"}, "hidden_size": 4}
    with pytest.raises(ValueError, match="evil"):
        MMCoTConfig(vision_config=vision)
    config = MMCoTConfig(vision_config={"model_type": "vit", "auto_map": vision["auto_map"], "hidden_size": 24})
    assert type(config.vision_config).__module__.startswith("transformers.models.vit")


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "", ".hidden", "a b"])
def test_a_stages_name_stays_in_its_folder(name, folder):
    with pytest.raises(ValueError, match="name of a stage is .*expected letters, digits"):
        Stage(name=name, reads=[], writes="x", source="", target="")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["stages"][0]["name"] = name
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="name of a stage is"):
        MMCoTProcessor.from_pretrained(folder)


def test_a_recipe_sets_no_variable_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MMCOT_ATTACK", raising=False)
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "env": {"MMCOT_ATTACK": "1"}}))
    with pytest.raises(ValueError, match="env is not read"):
        parse_recipe(["--config", str(tmp_path / "recipe.yaml"), "--dataset", "demo"])
    assert "MMCOT_ATTACK" not in os.environ


def test_a_recipe_makes_no_objects(tmp_path):
    (tmp_path / "recipe.yaml").write_text("stages: !!python/object/apply:os.system ['touch was_here']\n")
    with pytest.raises(yaml.YAMLError):
        parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ question.__class__.__mro__[1].__subclasses__() }}",
        "{{ choices.append('x') }}",
        "{{ ''.__class__.__base__ }}",
        "{{ letters.format.__globals__ }}",
    ],
)
def test_a_template_reaches_nothing_but_its_columns(template):
    with pytest.raises(SecurityError):
        render(template, {"question": "a", "choices": ["b"]})


def test_weights_are_never_pickles(folder):
    """A pickle in place of the weights is not opened, whatever transformers would do with it."""
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MMCoTForConditionalGeneration.from_pretrained(folder, use_safetensors=True)


def test_loading_through_the_meta_device_leaves_no_buffer_unset(folder):
    """A fault that gave other repositories' remote code garbage under transformers 5."""
    found = as_a_stranger(
        """
        model = AutoModel.from_pretrained("model", trust_remote_code=True, device_map=None)
        saved = set(model.state_dict())
        buffers = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
        fresh = dict(type(model)(model.config).named_buffers())
        bad = [name for name, buffer in buffers.items() if buffer.is_meta or not torch.equal(buffer, fresh[name])]
        print(json.dumps([len(dict(model.named_buffers())), bad]))
        """,
        folder.parent,
    )
    assert found[1] == []
