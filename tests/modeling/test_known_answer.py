"""The known answer of an exported system: an unchanged system passes the check, and an error names a changed part."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from test_pipeline import processor  # noqa: F401 (a fixture)
from transformers import pipeline

from modeling_mmcot import MMCoTForConditionalGeneration
from modeling_mmcot.known_answer_mmcot import FILE, compute_stage_answer, find_difference, known_answer_file, sha256


@pytest.fixture
def folder(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "hub", tmp_path / "model")
    return tmp_path / "model"


def load(folder, **kwargs):
    return pipeline("multimodal-cot", model=str(folder), trust_remote_code=True, **kwargs)


def known(folder):
    return json.loads((folder / FILE).read_text())


def test_contains_each_stage_and_each_file_of_weights(folder):
    found = known(folder)
    assert found["stages"].keys() == {"rationale", "answer"}
    assert found["weights"] == {
        name: sha256(str(folder / name)) for name in ("model.safetensors", "rationale/model.safetensors")
    }
    assert sum(found["stages"]["answer"]["scores"]) == pytest.approx(1, abs=1e-5)
    assert "Which color is it?" in found["stages"]["rationale"]["source"]
    load(folder)
    for dtype in ("bfloat16", "float16"):
        load(folder, dtype=dtype)


def test_names_the_file_with_a_flipped_bit(folder):
    file = folder / "rationale" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="rationale/model.safetensors is not the file that was exported"):
        load(folder)
    load(folder, check=False)


@pytest.mark.parametrize("name", ["model.safetensors", "rationale/model.safetensors"])
def test_names_a_truncated_file(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{name} .*is damaged"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"stages": {}, "weights": {}, "versions": {}}'])
def test_refuses_a_damaged_known_answer(folder, content):
    (folder / FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{FILE} is damaged.* of the stages rationale, answer"):
        load(folder)
    load(folder, check=False)


def test_detects_changed_generation_settings(folder):
    """With fewer tokens the rationale ends early, and the answer changes with it."""
    file = folder / "rationale" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 3}))
    with pytest.raises(ValueError, match="rationale stage does not compute what .*'max_new_tokens': 3"):
        load(folder)


def test_detects_changed_weights_by_their_outputs(folder):
    file = folder / "rationale" / "model.safetensors"
    tensors = load_file(file)
    tensors["decoder.final_layer_norm.weight"] *= 1.05
    save_file(tensors, file, metadata={"format": "pt"})
    found = known(folder)
    found["weights"]["rationale/model.safetensors"] = sha256(str(file))
    (folder / FILE).write_text(json.dumps(found))
    with pytest.raises(ValueError, match="rationale stage does not compute what .* logits differ by .*transformers 5"):
        load(folder)


def test_detects_a_changed_template(folder):
    file = folder / "processor_config.json"
    file.write_text(file.read_text().replace("Question:", "Q:"))
    with pytest.raises(ValueError, match="its source is 'Q: Which color is it"):
        load(folder)


def test_detects_a_renamed_keyword(processor, monkeypatch):  # noqa: F811
    """As when transformers 5.23 ignored a decoder cache named `cache`, without an error, and generated other tokens."""
    models, stage = {"rationale": tiny_model(5, initializer_factor=6.0)}, processor.stages[0]
    expected = compute_stage_answer(models, processor, stage)
    assert find_difference(expected, compute_stage_answer(models, processor, stage)) is None
    monkeypatch.setattr("modeling_mmcot.generation_mmcot.CACHE", "another_name")
    assert "it generates" in find_difference(expected, compute_stage_answer(models, processor, stage))


def test_save_pretrained_of_the_pipeline_saves_the_whole_system(folder, tmp_path):
    problem = {"question": "Which color is it?", "choices": ["red", "blue"]}
    pipe = load(folder)
    pipe.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again(problem) == pipe(problem)
    weights = [load_file(place / "rationale" / "model.safetensors") for place in (folder, tmp_path / "saved")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert again.models["rationale"].generation_config.max_new_tokens == (
        pipe.models["rationale"].generation_config.max_new_tokens
    )


def test_known_answer_opens_no_file_outside_its_folder(folder, tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"secret")
    found = known(folder)
    for name in ("../secret.safetensors", str(secret)):
        (folder / FILE).write_text(json.dumps({**found, "weights": {name: sha256(str(secret))}}))
        with pytest.raises(ValueError, match="which is not in the same folder"):
            load(folder)


def test_loads_a_repository_without_known_answer_offline(folder, tmp_path, monkeypatch):
    """From the cache, which does not show whether the Hub has the file."""
    (folder / FILE).unlink()
    load(folder)
    repository = tmp_path / "cache" / "models--user--model"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    options = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model = MMCoTForConditionalGeneration.from_pretrained("user/model", **options)
    assert known_answer_file(model) is None
