"""The command `python -m mmcot.features`: resuming after a kill, stores as good as pixels, the authors' files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import timm
import torch
from conftest import REPOSITORY, TINY_RECIPE, content, run_script, tiny_model
from PIL import Image
from transformers import (
    DetrForObjectDetection,
    DetrImageProcessor,
    DetrImageProcessorPil,
    ResNetConfig,
    ResNetModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTImageProcessor,
    ViTModel,
)

from mmcot import predict, train
from mmcot.evaluation.predictions import evaluate
from mmcot.features import main
from mmcot.pictures.authors import import_authors_features, open_authors_features
from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.feature_writer import FeatureWriter
from mmcot.pictures.featurizer import FeatureOptions, TowerOptions, commit_of, compute_features
from mmcot.problems.digests import content_key
from mmcot.problems.sources import load_all_splits, load_problems
from mmcot.storage.files import read_json
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.pictures_mmcot import as_pictures
from modeling_mmcot.vision_mmcot import TOWERS, load_vision_tower


def test_row_contains_the_detector_outputs(store, detr, all_problems):
    detector = DetrForObjectDetection.from_pretrained(detr).eval()
    processor = DetrImageProcessorPil.from_pretrained(detr)
    features = FeatureStore(store)
    for problem in [row for row in all_problems if row["images"]][:5]:
        (picture,) = as_pictures(problem["images"][0]["path"])
        with torch.no_grad():
            expected = detector(**processor(picture, return_tensors="pt"))
        row = features.read(features.keys_of(problem)[0])
        torch.testing.assert_close(torch.from_numpy(row["features"]), expected.last_hidden_state[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(row["boxes"]), expected.pred_boxes[0], rtol=0, atol=1e-5)
        scores = processor.post_process_object_detection(expected, threshold=0.0)[0]["scores"]
        torch.testing.assert_close(torch.from_numpy(row["class_scores"]), scores, rtol=0, atol=1e-5)


def test_store_has_one_row_per_picture_and_a_manifest_of_its_tower(store, detr, all_problems):
    features = FeatureStore(store)
    pictures = {content_key(picture) for row in all_problems for picture in row["images"]}
    assert set(features.rows) == pictures and features.num_patches == 5 and features.hidden_size == 24
    manifest = read_json(store / "manifest.json")
    assert (
        manifest["tower"] == str(detr) and manifest["dtype"] == "float32" and manifest["preprocessing"] == "checkpoint"
    )
    assert manifest["vision_config"]["model_type"] == "detr"
    assert manifest["image_processor"]["size"] == {"shortest_edge": 64, "longest_edge": 128}


def test_computes_a_shared_picture_once(tmp_path, vit):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    rows = [{"question": "?", "images": [name]} for name in ("a.png", "b.png", "a.png")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main([f"test={tmp_path / 'p.jsonl'}", "--vision", str(vit), "--output", str(tmp_path / "store")])
    features = FeatureStore(tmp_path / "store")
    assert len(features.rows) == 1
    batch = features.batch(list(load_problems(f"test={tmp_path / 'p.jsonl'}", "test")))
    assert batch["vision_features"].shape == (3, 5, 24)
    assert (
        batch["vision_features"].dtype == torch.float32
        and read_json(features.folder / "manifest.json")["dtype"] == "float16"
    )


def test_timm_clip_resnet_uses_its_own_preprocessing(tiny_dataset, tmp_path):
    config = timm.get_pretrained_cfg("resnet50_clip.openai").to_dict()
    torch.manual_seed(0)
    tower = TimmWrapperModel(TimmWrapperConfig(architecture="resnet50_clip", pretrained_cfg=config)).eval()
    tower.save_pretrained(tmp_path / "clip")
    rows = [row for row in map(json.loads, tiny_dataset.read_text().splitlines()) if row["images"]][:2]
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"question": "?", "images": [str(tiny_dataset.parent / rows[0]["images"][0])]})
    )
    main(
        [
            str(tmp_path / "p.jsonl"),
            "--vision",
            str(tmp_path / "clip"),
            "--output",
            str(tmp_path / "store"),
            "--dtype",
            "float32",
        ]
    )
    features = FeatureStore(tmp_path / "store")
    picture = Image.open(tiny_dataset.parent / rows[0]["images"][0]).convert("RGB")
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=config))
    with torch.no_grad():
        grid = tower(pixel_values=transform(picture)[None]).last_hidden_state[0]
    assert (features.num_patches, features.hidden_size) == (49, 2048)
    (key,) = features.rows
    torch.testing.assert_close(
        torch.from_numpy(features.read(key)["features"]), grid.flatten(1).T, rtol=1e-4, atol=1e-5
    )


# Resuming.


def run_until(command, folder, batches):
    """Run the command, kill it once its store contains `batches` batches, if not None, and return its exit code."""
    process = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    keys = folder / "rows.jsonl"
    while process.poll() is None:
        if batches is not None and keys.exists() and keys.read_bytes().count(b"\n") >= batches:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    return process.returncode


@pytest.mark.slow
def test_resumes_after_kills_to_the_same_content(detr, all_problems, tiny_dataset, tmp_path):
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    compute_features(all_problems, uninterrupted, TowerOptions(str(detr)), FeatureOptions(batch_size=2))
    total = content(uninterrupted)["rows.jsonl"].count(b"\n")
    command = [
        "-m",
        "mmcot.features",
        str(tiny_dataset),
        "--vision",
        str(detr),
        "--batch_size",
        "2",
        "--output",
        str(killed),
    ]
    codes = [run_until(command, killed, batches) for batches in (2, total // 2, None)]
    assert codes[0] == codes[1] == -signal.SIGKILL and codes[2] == 0
    assert content(killed) == content(uninterrupted)


def test_skips_and_names_undecodable_picture(vit, tmp_path):
    for number in range(5):
        Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / f"{number}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[:3000])
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"question": "?", "images": [f"{n}.png"]}) for n in range(5))
    )
    command = ("-m", "mmcot.features", f"test={tmp_path / 'p.jsonl'}", "--vision", vit, "--output", tmp_path / "store")
    result = run_script(*command, "--batch_size", "2", check=False, is_fresh=True)
    assert result.returncode == 1 and "2.png" in result.stderr and "1 pictures were left out" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(FeatureStore(tmp_path / "store").rows) == 4
    problems = load_problems(f"test={tmp_path / 'p.jsonl'}", "test")
    with pytest.raises(ValueError, match="no features for the pictures of 1 of 5 problems: test-2"):
        FeatureStore(tmp_path / "store").check_problems(problems)
    (tmp_path / "2.png").write_bytes(whole)
    main([str(argument) for argument in command[2:]])
    FeatureStore(tmp_path / "store").check_problems(load_problems(f"test={tmp_path / 'p.jsonl'}", "test"))


# From a store or from pixels.


@pytest.fixture(scope="module")
def runs(detr, tiny_dataset, tmp_path_factory):
    """One recipe trained from pixels, and from a store of either precision."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = [
        line
        for line in TINY_RECIPE.read_text().splitlines()
        if not line.startswith(("image_processor", "vision_config", "   "))
    ]
    recipe += ["vision_model_name_or_path: " + str(detr), "freeze_vision: true"]
    text = TINY_RECIPE.read_text()
    stages = text[text.index("stages:") : text.index("max_steps")]
    recipe = [line for line in recipe if line != "stages:" and not line.startswith("  - ")]
    (folder / "recipe.yaml").write_text("\n".join(recipe) + "\n" + stages)
    finished = {}
    for name in ("pixels", "float32", "float16"):
        options = []
        if name != "pixels":
            main([str(tiny_dataset), "--vision", str(detr), "--dtype", name, "--output", str(folder / f"{name}.store")])
            options = ["--features", str(folder / f"{name}.store")]
        finished[name] = folder / name
        command = ["--config", str(folder / "recipe.yaml"), "--dataset", str(tiny_dataset), "--output_dir"]
        train.main([*command, str(finished[name]), *options])
    return finished


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 3e-3)])
def test_training_from_store_matches_training_from_pixels(runs, precision, tolerance):
    for stage in ("rationale", "answer"):
        pixels, stored = (
            [
                entry.get("loss", entry.get("eval_loss"))
                for entry in read_json(runs[name] / stage / "train_results.json")["log_history"]
            ]
            for name in ("pixels", precision)
        )
        assert len(pixels) > 20
        # Rounded features change every step of training; the difference is small at a loss of 6 and does not grow.
        np.testing.assert_allclose(stored, pixels, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_prediction_from_store_matches_prediction_from_pixels(runs, tiny_dataset, tmp_path, precision, tolerance):
    """Both predictions use the model that was trained from pixels."""
    command = [str(runs["pixels"]), "--dataset", str(tiny_dataset)]
    predict.main([*command, "--output", str(tmp_path / "pixels.json")])
    store = runs["pixels"].parent / f"{precision}.store"
    predict.main([*command, "--output", str(tmp_path / "stored.json"), "--features", str(store)])
    pixels, stored = read_json(tmp_path / "pixels.json"), read_json(tmp_path / "stored.json")
    assert pixels.keys() == stored.keys()
    for id_ in pixels:
        np.testing.assert_allclose(stored[id_]["scores"], pixels[id_]["scores"], rtol=0, atol=tolerance)
        assert stored[id_]["rationale"] == pixels[id_]["rationale"] or precision == "float16"


def test_run_trained_from_store_exports_tower_and_answers_from_pixels(runs, detr):
    from transformers import pipeline

    tower = load_vision_tower(str(detr)).state_dict()
    for name in ("pixels", "float32"):
        answer = pipeline("multimodal-cot", model=str(runs[name] / "hub"), trust_remote_code=True)
        exported = answer.model.encoder.vision_tower.state_dict()
        assert all(torch.equal(exported[name], tensor) for name, tensor in tower.items()), (
            "a frozen tower is not trained"
        )
    result = answer({"question": "Which?", "choices": ["a", "b"], "image": Image.new("RGB", (80, 50), "red")})
    assert sum(result["scores"]) == pytest.approx(1)


def test_takes_feature_width_from_store_without_a_tower(runs, tiny_dataset, tmp_path):
    recipe = (runs["pixels"].parent / "recipe.yaml").read_text()
    lines = [line for line in recipe.splitlines() if not line.startswith(("vision_model", "freeze_vision"))]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    store = runs["pixels"].parent / "float16.store"
    command = ["--config", str(tmp_path / "recipe.yaml"), "--dataset", str(tiny_dataset), "--max_steps", "1"]
    train.main([*command, "--output_dir", str(tmp_path / "run"), "--features", str(store)])
    config = read_json(tmp_path / "run/hub/config.json")
    assert config["vision_hidden_size"] == 24 and config["vision_config"] is None
    assert (config["num_vision_tokens"], config["vision_tower"]) == (5, "detr")
    with pytest.raises(SystemExit, match="has no picture tower.*--features"):
        predict.main([str(tmp_path / "run"), "--dataset", str(tiny_dataset), "--output", str(tmp_path / "p.json")])


# Stores, settings and data that are refused.


def test_resolves_commit_of_hub_checkpoint(vit, tmp_path, monkeypatch):
    cache = tmp_path / "hub/models--user--vit"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(vit, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert commit_of("user/vit", None) == "b" * 40 and commit_of("user/vit", "a" * 40) == "a" * 40
    assert commit_of(str(vit), None) is None


def test_prediction_refuses_store_of_another_tower(runs, detr, tiny_dataset, tmp_path):
    other = DetrForObjectDetection.from_pretrained(detr)
    with torch.no_grad():
        other.model.query_position_embeddings.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    DetrImageProcessor.from_pretrained(detr).save_pretrained(tmp_path / "other")
    main([str(tiny_dataset), "--vision", str(tmp_path / "other"), "--output", str(tmp_path / "store")])
    command = [str(runs["pixels"]), "--dataset", str(tiny_dataset), "--output", str(tmp_path / "p.json")]
    with pytest.raises(SystemExit, match="error: .*store does not fit: weights of the tower"):
        predict.main([*command, "--features", str(tmp_path / "store")])
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vision_tower", "clip"], "'clip', a tower with model_type 'timm_wrapper', but vision_config has .*'detr'"),
        (["--vision_preprocessing", "chekpoint"], "preprocessing is 'chekpoint'; expected checkpoint or paper"),
    ],
)
def test_refuses_wrong_tower_settings_before_creating_run_folder(runs, tiny_dataset, tmp_path, options, message):
    command = ["--config", str(runs["pixels"].parent / "recipe.yaml"), "--dataset", str(tiny_dataset)]
    with pytest.raises(SystemExit, match=message):
        train.main([*command, "--output_dir", str(tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()


def test_refuses_features_that_overflow_float16(vit, tmp_path):
    model = ViTModel.from_pretrained(vit)
    with torch.no_grad():
        model.layernorm.weight.fill_(1e6)
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    Image.effect_noise((9, 9), 90).save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "?", "images": ["a.png"]}))
    with pytest.raises(SystemExit, match="overflow float16; use --dtype float32"):
        main([str(tmp_path / "p.jsonl"), "--vision", str(tmp_path / "vit"), "--output", str(tmp_path / "store")])


def test_refuses_dataset_without_pictures(vit, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "?"}))
    with pytest.raises(SystemExit, match="None of the 1 problems has a picture"):
        main([str(tmp_path / "p.jsonl"), "--vision", str(vit), "--output", str(tmp_path / "store")])


def test_training_refuses_store_unless_tower_is_the_same_and_frozen(runs, store, vit, tiny_dataset, tmp_path):
    command = ["--config", str(runs["pixels"].parent / "recipe.yaml"), "--dataset", str(tiny_dataset)]
    command += ["--output_dir", str(tmp_path / "run"), "--features", str(store)]
    with pytest.raises(SystemExit, match="vision_tower is 'detr' in the store, 'vit' in the model"):
        train.main([*command, "--vision_model_name_or_path", str(vit)])
    with pytest.raises(SystemExit, match="features are computed by a fixed tower and require freeze_vision"):
        train.main([*command, "--freeze_vision", "false"])
    assert not (tmp_path / "run").exists()


def test_continues_training_of_model_with_store_of_its_tower(runs, tiny_dataset, tmp_path):
    """The store's path may be absolute or relative, the tower's folder another one: weights identify a tower."""
    recipe = (runs["pixels"].parent / "recipe.yaml").read_text()
    recipe = "\n".join(
        line for line in recipe.splitlines() if not line.startswith(("vision_model", "text_config", "tokenizer_vocab"))
    )
    (tmp_path / "recipe.yaml").write_text(f"{recipe}\nmodel_name_or_path: {runs['pixels'] / 'hub'}\n")
    command = ["--config", str(tmp_path / "recipe.yaml"), "--dataset", str(tiny_dataset), "--max_steps", "1"]
    store = runs["pixels"].parent / "float16.store"
    train.main([*command, "--output_dir", str(tmp_path / "run"), "--features", str(store)])
    relative = os.path.relpath(store)
    assert relative != str(store)
    train.main([*command, "--output_dir", str(tmp_path / "run"), "--features", relative])
    before, after = (
        MMCoTForConditionalGeneration.from_pretrained(folder / "hub") for folder in (runs["pixels"], tmp_path / "run")
    )
    assert torch.equal(
        before.encoder.vision_tower.query_position_embeddings.weight,
        after.encoder.vision_tower.query_position_embeddings.weight,
    )
    assert MMCoTProcessor.from_pretrained(tmp_path / "run/hub").image_processor is not None


def test_training_refuses_store_that_contradicts_the_models_config(runs, tiny_dataset, tmp_path):
    recipe = (runs["pixels"].parent / "recipe.yaml").read_text()
    dropped = ("vision_model", "text_config", "tokenizer_vocab", "freeze_vision")
    recipe = "\n".join(line for line in recipe.splitlines() if not line.startswith(dropped))
    for fields, message in (
        ({"vision_tower": "vit"}, "vision_tower is 'detr' in the store, 'vit' in the model"),
        ({"num_vision_tokens": 145}, "patches of a picture is 5 in the store, 145 in the model"),
        ({"vision_hidden_size": 99}, "width of the patches is 24 in the store, 99 in the model"),
    ):
        folder = tmp_path / next(iter(fields))
        tiny_model(**{"vision_config": None, "vision_hidden_size": 24, "vocab_size": 300, **fields}).save_pretrained(
            folder
        )
        MMCoTProcessor.from_pretrained(runs["pixels"] / "hub").save_pretrained(folder)
        (tmp_path / "recipe.yaml").write_text(f"{recipe}\nmodel_name_or_path: {folder}\n")
        command = ["--config", str(tmp_path / "recipe.yaml"), "--dataset", str(tiny_dataset)]
        command += ["--output_dir", str(tmp_path / "run"), "--features", str(runs["pixels"].parent / "float16.store")]
        with pytest.raises(SystemExit, match=message):
            train.main(command)
        assert not (tmp_path / "run").exists()


def test_resnet_pooled_computes_features_of_local_resnet(tiny_dataset, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "resnet")
    options = [
        "--vision",
        str(tmp_path / "resnet"),
        "--vision_tower",
        "resnet_pooled",
        "--output",
        str(tmp_path / "store"),
    ]
    main([str(tiny_dataset), *options])
    features = FeatureStore(tmp_path / "store")
    assert (features.num_patches, features.record["features"].shape) == (512, (1, 16))


# The authors' files.


@pytest.fixture
def scienceqa(tmp_path):
    """A folder in ScienceQA's layout, without picture files, because imported features replace them."""
    folder = tmp_path / "scienceqa"
    folder.mkdir()
    problem = {"question": "?", "choices": ["a", "b"], "answer": 0, "hint": "", "split": "test"}
    problems = {
        "1": {**problem, "image": "image.png"},
        "2": {**problem, "image": None},
        "3": {**problem, "image": "image.png"},
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": [], "val": [], "test": list(problems)}))
    (tmp_path / "name_map.json").write_text(json.dumps({"3": "0", "1": "2"}))
    return folder


AUTHORS = {
    "detr": ("detr.npy", (4, 100, 256), 100),
    "clip": ("clip.npy", (4, 49, 2048), 49),
    "resnet": ("resnet.npy", (4, 2048), 512),
    "vit": ("vit.pth", (4, 145, 1024), 145),
}


def write_authors_file(folder, kind):
    name, shape, _ = AUTHORS[kind]
    array = np.random.default_rng(0).normal(size=shape).astype("float32")
    if name.endswith(".npy"):
        np.save(folder / name, array)
    else:
        torch.save(torch.from_numpy(array), folder / name)
    return folder / name, array


@pytest.mark.parametrize("kind", AUTHORS)
def test_imports_authors_features_by_problem(kind, scienceqa, tmp_path):
    file, array = write_authors_file(tmp_path, kind)
    command = [
        str(scienceqa),
        "--vision",
        kind,
        "--import_features",
        str(file),
        "--name_map",
        str(tmp_path / "name_map.json"),
    ]
    main([*command, "--dtype", "float32", "--output", str(tmp_path / "store")])
    features = FeatureStore(tmp_path / "store")
    problems = load_problems(str(scienceqa), "test", pictures=features.needs_files)
    features.check_problems(problems)
    tower = TOWERS[features.manifest["vision_tower"]]
    assert (features.num_patches, features.hidden_size) == (tower.num_patches, tower.hidden_size)
    batch = features.batch(list(problems))
    expected = array[:, None].repeat(512, axis=1) if kind == "resnet" else array  # as in the original's utils_data.py
    assert batch["vision_features"].shape == (3, AUTHORS[kind][2], array.shape[-1])
    assert batch["vision_mask"].all(dim=1).tolist() == [True, False, True]
    np.testing.assert_array_equal(batch["vision_features"][0], expected[2])
    np.testing.assert_array_equal(batch["vision_features"][2], expected[0])
    fields = {"vision_hidden_size": tower.hidden_size, "num_vision_tokens": tower.num_patches}
    features.check_model(tiny_model(vision_config=None, vision_tower=features.manifest["vision_tower"], **fields), None)


@pytest.mark.parametrize("kind", ["detr", "vit"])
def test_import_never_loads_a_whole_file(kind, scienceqa, tmp_path, monkeypatch):
    """Imports all rows of a file of about 500 MB."""
    name, shape, _ = AUTHORS[kind]
    rows = 5000 if kind == "detr" else 850
    if kind == "detr":
        np.lib.format.open_memmap(tmp_path / name, mode="w+", dtype="float32", shape=(rows, *shape[1:]))
    else:
        torch.save(torch.zeros(rows, *shape[1:]), tmp_path / name)
    ids = [str(number) for number in range(rows)]
    problems = load_all_splits(str(scienceqa), ("test",), 1, False).select([1] * rows)
    problems = problems.remove_columns("id").add_column("id", ids)
    (tmp_path / "name_map.json").write_text(json.dumps(dict(zip(ids, ids, strict=True))))
    process, grown = psutil.Process(), []
    before = process.memory_info().rss
    original = FeatureWriter.add

    def add(*arguments):
        grown.append(process.memory_info().rss - before)
        original(*arguments)

    monkeypatch.setattr(FeatureWriter, "add", add)
    import_authors_features(problems, tmp_path / "store", kind, str(tmp_path / name), str(tmp_path / "name_map.json"))
    assert len(grown) == -(-rows // 64) and max(grown) < 200e6
    assert (tmp_path / name).stat().st_size > (490e6 if kind == "vit" else 500e6)
    (tmp_path / name).unlink()


def test_import_refuses_mismatched_or_truncated_file(scienceqa, tmp_path):
    file, _ = write_authors_file(tmp_path, "detr")
    problems = load_all_splits(str(scienceqa), ("test",), 1, False)

    def error_of(vision="detr", file=file, name_map=None):
        if name_map is not None:
            (tmp_path / "name_map.json").write_text(json.dumps(name_map))
        with pytest.raises(ValueError) as error:
            import_authors_features(problems, tmp_path / "store", vision, str(file), str(tmp_path / "name_map.json"))
        assert not (tmp_path / "store").exists()
        return str(error.value)

    np.save(tmp_path / "large.npy", np.full((3, 100, 256), 1e5, dtype="float32"))
    with pytest.raises(ValueError, match="overflow float16; use --dtype float32"):
        import_authors_features(
            problems, tmp_path / "large", "detr", str(tmp_path / "large.npy"), str(tmp_path / "name_map.json")
        )
    assert "rows of shape (100, 256); expected (145, 1024) for vit features" in error_of("vit")
    assert "name_map.json: '3' is '9'; expected a row of the file, 0 to 3" in error_of(name_map={"1": "0", "3": "9"})
    assert "lacks 1 problems that have a picture: 3." in error_of(name_map={"1": "0"})
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "detr.npy is not a complete feature file" in error_of(name_map={"1": "0", "3": "1"})
    vit, _ = write_authors_file(tmp_path, "vit")
    vit.write_bytes(vit.read_bytes()[:9999])
    assert "vit.pth is not a complete feature file" in error_of("vit", vit)


def test_refuses_npy_with_objects(tmp_path):
    np.save(tmp_path / "detr.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a complete feature file"):
        open_authors_features(str(tmp_path / "detr.npy"))


def test_trains_predicts_and_scores_with_imported_features_only(scienceqa, tmp_path):
    file, _ = write_authors_file(tmp_path, "detr")
    problems = read_json(scienceqa / "problems.json")
    (scienceqa / "problems.json").write_text(
        json.dumps({id_: {**row, "solution": "It is a.", "split": None} for id_, row in problems.items()})
        .replace('"split": null, ', "")
        .replace(', "split": null', "")
    )
    (scienceqa / "pid_splits.json").write_text(
        json.dumps({split: list(problems) for split in ("train", "val", "test")})
    )
    name_map, store = str(tmp_path / "name_map.json"), str(tmp_path / "store")
    options = ["--import_features", str(file), "--name_map", name_map, "--splits", "test", "--output", store]
    main([str(scienceqa), "--vision", "detr", *options])
    without = ("image_processor", "vision_config")
    lines = [line for line in TINY_RECIPE.read_text().splitlines() if not line.startswith(without)]
    (tmp_path / "recipe.yaml").write_text("\n".join(line for line in lines if not line.startswith("          ")))
    command = ["--config", str(tmp_path / "recipe.yaml"), "--dataset", str(scienceqa), "--max_steps", "1"]
    train.main([*command, "--output_dir", str(tmp_path / "run"), "--features", store])
    predict.main(
        [str(tmp_path / "run"), "--dataset", str(scienceqa), "--features", store, "--output", str(tmp_path / "p.json")]
    )
    scores = evaluate(tmp_path / "p.json", str(scienceqa), "test")
    assert scores["n"] == 3 and scores["accuracy"]["Avg"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vision", "detr", "--import_features", "x.npy"], "--import_features and --name_map go together"),
        (
            ["--vision", "google/vit", "--import_features", "x.npy", "--name_map", "m.json"],
            "--vision is one of detr, vit",
        ),
        (["--vision", "detr", "--captions", "blip"], "not allowed with argument"),
        (["--vision", "detr", "--prompt", "Describe."], "--prompt goes with --captions"),
        ([], "one of the arguments --vision --captions is required"),
    ],
)
def test_refuses_incompatible_options(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--output", "x", *options])
    assert message in capsys.readouterr().err
