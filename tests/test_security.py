"""Attacks by malicious files of a model, a run, a recipe or a dataset. docs/security.md lists each defence."""

import json
import os
import re
import shutil

import datasets
import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import HUB_FEATURES, REPOSITORY, TINY_RECIPE, hub_rows, run_isolated, run_script, tiny_model
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from PIL import Image

from mmcot.analysis.report import write_report
from mmcot.evaluation.metrics import score
from mmcot.pictures.featurizer import load_image_processor
from mmcot.pictures.manifest import record_type
from mmcot.prediction.system import load_system
from mmcot.problems.schema import FEATURES
from mmcot.problems.sources import load_problems
from mmcot.recipes.recipe import parse_recipe
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.stage_mmcot import Stage, render
from modeling_mmcot.vision_mmcot import build_vision_tower


def test_docs_name_existing_tests():
    file = ""
    files = {path.name: path for path in (REPOSITORY / "tests").rglob("test_*.py")}
    text = (REPOSITORY / "docs" / "security.md").read_text()
    named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", text)
    assert len(named) > 20
    for module, function in named:
        file = module or file
        assert f"def {function}(" in files[file].read_text()


@pytest.fixture
def folder(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "hub", tmp_path / "model")
    return tmp_path / "model"


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_processor_file_loads_only_image_processors(folder, tmp_path):
    """Such a file once made `mmcot.predict FOLDER` run code of a second repository without trust_remote_code."""
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


@pytest.mark.parametrize("file", ["processor_config.json", "audio_tokenizer_config.json"])
def test_processor_file_loads_no_audio_tokenizer(folder, tiny_run, file):
    attack = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(tiny_run / "answer")}
    if file == "processor_config.json":
        change(folder / file, audio_tokenizer=attack)
    else:
        (folder / file).write_text(json.dumps(attack))
    with pytest.raises(ValueError, match="names the class 'AutoModel'; expected none: it has no audio tokenizer"):
        MMCoTProcessor.from_pretrained(folder)


def test_tower_configuration_runs_no_own_code(tmp_path):
    vision = {"model_type": "evil", "auto_map": {"AutoConfig": f"{tmp_path}--evil.Config"}, "hidden_size": 4}
    with pytest.raises(ValueError, match="evil"):
        MMCoTConfig(vision_config=vision)
    config = MMCoTConfig(vision_config={"model_type": "vit", "auto_map": vision["auto_map"], "hidden_size": 24})
    assert type(config.vision_config).__module__.startswith("transformers.models.vit")


@pytest.fixture
def says_yes(monkeypatch):
    """A user who answers yes when transformers asks whether it may run a repository's code."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def test_tower_image_processor_runs_no_own_code(vit, tmp_path, says_yes):
    shutil.copytree(vit, tmp_path / "tower")
    change(
        tmp_path / "tower" / "preprocessor_config.json",
        image_processor_type="Evil",
        auto_map={"AutoImageProcessor": "evil.Evil"},
    )
    (tmp_path / "tower" / "evil.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="custom code"):
        load_image_processor(str(tmp_path / "tower"))
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "", ".hidden", "a b", "a\n", "ä", None, 1, ["a"]])
def test_refuses_stage_name_that_leaves_folder(name, folder):
    with pytest.raises(ValueError, match="name of a stage is .*expected letters, digits"):
        Stage(name=name, reads=[], writes="x", source="", target="")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["stages"][0]["name"] = name
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="name of a stage is"):
        MMCoTProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("reads", "question", "a list of columns"),
        ("reads", [1], "a list of columns"),
        ("writes", "", "a column"),
        ("source", None, "a template"),
        ("target", 1, "a template"),
        ("max_source_length", "512", "a number of tokens"),
        ("max_target_length", 0, "a number of tokens"),
        ("max_target_length", True, "a number of tokens"),
    ],
)
def test_refuses_stage_fields_of_wrong_type(field, value, expected):
    fields = {"name": "x", "reads": [], "writes": "x", "source": "", "target": ""}
    with pytest.raises(ValueError, match=f"{field} of a stage is {value!r}; expected {expected}".replace("[", r"\[")):
        Stage(**{**fields, field: value})


def test_recipe_sets_no_environment_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("MMCOT_ATTACK", raising=False)
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "env": {"MMCOT_ATTACK": "1"}}))
    with pytest.raises(ValueError, match="env is not read"):
        parse_recipe(["--config", str(tmp_path / "recipe.yaml"), "--dataset", "demo"])
    assert "MMCOT_ATTACK" not in os.environ


def test_recipe_creates_no_python_objects(tmp_path):
    (tmp_path / "recipe.yaml").write_text("stages: !!python/object/apply:os.system ['touch was_here']\n")
    with pytest.raises(ValueError, match="expected a recipe in YAML; found could not determine a constructor"):
        parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ question.__class__.__mro__[1].__subclasses__() }}",
        "{{ choices.append('x') }}",
        "{{ ''.__class__.__base__ }}",
        "{{ letters.format.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(question) }}",
        "{{ (question | attr('__class__')).mro() }}",
        "{{ choices | map(attribute='__class__') | list | first | attr('mro') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ (cycler | attr('__init__')).__globals__ }}",
    ],
)
def test_template_accesses_only_its_columns(template):
    with pytest.raises(SecurityError):
        render(template, {"question": "a", "choices": ["b"]})


@pytest.mark.parametrize("template", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}"])
def test_template_opens_no_file(template):
    with pytest.raises((TypeError, TemplateError)):
        render(template, {})


def test_source_template_accesses_only_read_columns():
    stage = Stage(name="x", reads=["question"], writes="x", source="{{ solution }}", target="")
    with pytest.raises(UndefinedError, match="solution"):
        stage.render_source({"question": "a", "solution": "gold"})


def test_refuses_hub_dataset_that_names_local_file(tmp_path):
    """Pictures are bytes in the rows, because a path would open a file of this machine and show it in a report."""
    Image.new("RGB", (4, 3)).save(tmp_path / "private.png")
    row = {**hub_rows(1)[0], "image": {"bytes": None, "path": str(tmp_path / "private.png")}}
    (tmp_path / "hub").mkdir()
    features = datasets.Features({**HUB_FEATURES, "image": datasets.Image(decode=False)})
    columns = {name: [row[name]] for name in features}
    table = datasets.Dataset.from_dict(columns, features=features).data.table
    pyarrow.parquet.write_table(table, tmp_path / "hub" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="row 1, problem .* is outside of .*hub; expected a file in it"):
        load_problems(str(tmp_path / "hub"), "test")


def test_tokenizer_file_runs_no_code(folder, tmp_path, says_yes):
    """The user is not asked for permission either, because the commands run only installed code."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w')\nclass Tok: pass\n")
    attack = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": [None, f"{evil}--evil.Tok"]}}
    change(folder / "tokenizer_config.json", **attack)
    with pytest.raises(ValueError, match="custom code"):
        load_system(str(folder))
    assert not (tmp_path / "was_here").exists()


def test_refuses_configuration_with_hub_kernel(folder):
    change(folder / "config.json", attn_implementation="evil/kernel")
    with pytest.raises(ValueError, match="attn_implementation is 'evil/kernel', code of the Hub"):
        load_system(str(folder))


@pytest.mark.parametrize(
    "vision",
    [
        {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/repo"},
        {"model_type": "timm_wrapper", "architecture": "local-dir:/tmp/evil"},
        {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"checkpoint_path": "evil.pth"}},
        {"model_type": "detr", "backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:evil/repo"}},
    ],
)
def test_tower_configuration_opens_no_other_file_or_repository(vision):
    with pytest.raises(ValueError, match="another file or repository; expected a timm name"):
        build_vision_tower(MMCoTConfig(vision_config=vision, vision_hidden_size=256).vision_config)


def test_feature_record_accepts_only_numeric_dtypes(tmp_path):
    """numpy interpreted bytes of the file as addresses of Python objects, and the process crashed."""
    for dtype in ("|O", "O", "<i8", "|V8", None):
        with pytest.raises(ValueError, match="record has features of type"):
            record_type([["features", dtype, [1, 4]]])


PLANTED = "<img id=planted src=x onerror=alert(1)></script><script id=planted>alert(1)</script>"


def test_report_escapes_texts_of_dataset_and_model(tmp_path):
    problem = load_problems("demo", "test")[0]
    texts = dict.fromkeys(("question", "context", "lecture", "solution", "subject", "grade", "skill"), PLANTED)
    row = {**problem, **texts, "id": PLANTED, "choices": [PLANTED, "b"], "answer": 0, "images": []}
    problems = datasets.Dataset.from_list([row], features=FEATURES)
    predictions = {PLANTED: {"answer": 1, "answer_text": PLANTED, "rationale": PLANTED, "scores": [0.4, 0.6]}}
    write_report(
        tmp_path / "report", problems, predictions, score(problems, predictions), tmp_path / f"{PLANTED[:20]}.json"
    )
    html = (tmp_path / "report" / "index.html").read_text()
    assert "<img id=planted" not in html and "<script id=planted" not in html
    if shutil.which("chromium"):
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page, alerts = browser.new_page(), []
            page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
            page.goto((tmp_path / "report" / "index.html").as_uri())
            page.locator("#count").wait_for()
            shown, elements = page.locator("body").inner_text(), page.locator("[id=planted]").count()
            browser.close()
        assert "<img id=planted" in shown and elements == 0 and alerts == []


@pytest.mark.parametrize(
    "settings", [{"penalty_alpha": 0.6, "top_k": 4}, {"num_beam_groups": 2, "num_beams": 2}, {"dola_layers": "low"}]
)
def test_generation_settings_run_no_hub_code(settings):
    model = tiny_model()
    model.generation_config.update(**settings)
    with pytest.raises(ValueError, match="requires `trust_remote_code=True` in your `generate` call"):
        model.generate(torch.tensor([[3, 4, 1]]))


def test_never_loads_weights_from_pickle(folder):
    """A pickle in place of the weights is never opened, even if transformers would open it."""
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MMCoTForConditionalGeneration.from_pretrained(folder, use_safetensors=True)


def test_loading_through_meta_device_sets_every_buffer(folder):
    """Under transformers 5 this fault leaves uninitialized buffers in other repositories' remote code."""
    found = run_isolated(
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
