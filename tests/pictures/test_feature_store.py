"""The feature store: what is read of it, what a kill leaves, what does not fit and is refused."""

import json

import pytest
import torch
from conftest import content, tiny_model
from PIL import Image
from transformers import DetrImageProcessorPil

from mmcot.features import main
from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.feature_writer import FeatureWriter
from mmcot.pictures.featurizer import FeatureOptions, TowerOptions, compute_features
from mmcot.problems.sources import load_problems
from modeling_mmcot.vision_mmcot import load_vision_tower


def test_a_problem_without_picture_and_one_with_several_are_masked(tmp_path, vit):
    for color in ("red", "blue"):
        Image.new("RGB", (9, 9), color).save(tmp_path / f"{color}.png")
    rows = [{"question": "?", "images": names} for names in ([], ["red.png", "blue.png"], ["blue.png"])]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"test={tmp_path / 'p.jsonl'}"
    main([source, "--vision", str(vit), "--output", str(tmp_path / "store"), "--max_images", "2"])
    features, (none, both, one) = FeatureStore(tmp_path / "store"), load_problems(source, "test")
    batch = features.batch([none, both, one])
    assert batch["vision_mask"].sum(dim=1).tolist() == [0, 10, 5] and not batch["vision_features"][0].any()
    assert torch.equal(batch["vision_features"][1, 5:], batch["vision_features"][2, :5])
    assert features.batch([none]) == {}


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_what_a_kill_leaves_behind_a_whole_batch_is_dropped(cut, detr, all_problems, store, tmp_path):
    """At any moment: rows that are written in part, rows without their keys, keys that are written in part."""
    whole = content(store)
    keys = whole["rows.jsonl"].splitlines(keepends=True)
    for rows, last_key in (
        (whole["rows.bin"][:-cut], b""),
        (whole["rows.bin"], b""),
        (whole["rows.bin"], keys[-1][:cut]),
    ):
        folder = tmp_path / f"{len(rows)}-{len(last_key)}"
        folder.mkdir()
        (folder / "manifest.json").write_bytes(whole["manifest.json"])
        (folder / "rows.bin").write_bytes(rows)
        (folder / "rows.jsonl").write_bytes(b"".join(keys[:-1]) + (last_key if last_key != keys[-1] else b""))
        if cut < 2000:
            with pytest.raises(ValueError, match="truncated or still being written"):
                FeatureStore(folder)
        compute_features(all_problems, folder, TowerOptions(str(detr)), FeatureOptions(dtype="float32", batch_size=4))
        assert content(folder) == whole


def edit(folder, tmp_path, name, change):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return copy


def test_a_truncated_file_is_refused_with_both_sizes(store, tmp_path):
    copy = edit(store, tmp_path, "rows.bin", lambda rows: rows[:-1])
    size = (store / "rows.bin").stat().st_size
    with pytest.raises(ValueError, match=f"rows.bin has {size - 1} bytes; .* are {size}"):
        FeatureStore(copy)


def test_a_store_with_a_truncated_file_is_not_gone_on_with(store, detr, all_problems, tmp_path):
    copy = edit(store, tmp_path, "rows.bin", lambda rows: rows[:-1])
    with pytest.raises(ValueError, match="The file is truncated: remove"):
        compute_features(all_problems, copy, TowerOptions(str(detr)), FeatureOptions(dtype="float32"))


def test_an_edited_manifest_is_refused(store, tmp_path):
    copy = edit(store, tmp_path, "manifest.json", lambda text: text.replace(b'"checkpoint"', b'"paper"'))
    with pytest.raises(ValueError, match="manifest.json was edited"):
        FeatureStore(copy)


def test_a_folder_without_manifest_is_no_store(store, tmp_path):
    copy = edit(store, tmp_path, "manifest.json", lambda text: text)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not a feature store: it has no manifest.json"):
        FeatureStore(copy)


@pytest.mark.parametrize("finished", [True, False])
def test_other_features_are_not_added_to_a_store(store, detr, vit, all_problems, tmp_path, finished):
    copy = edit(store, tmp_path, "rows.jsonl", lambda lines: lines if finished else lines.splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="features with other settings: dtype is 'float32' there, 'float16' here"):
        compute_features(all_problems, copy, TowerOptions(str(detr)), FeatureOptions(dtype="float16"))
    with pytest.raises(ValueError, match="features with other settings"):
        compute_features(all_problems, copy, TowerOptions(str(vit)), FeatureOptions(dtype="float32"))


def test_one_process_at_a_time_writes_a_store(store, detr, all_problems):
    with FeatureWriter(store, {}), pytest.raises(ValueError, match="is being written by another process"):
        compute_features(all_problems, store, TowerOptions(str(detr)), FeatureOptions(dtype="float32"))
    assert compute_features(all_problems, store, TowerOptions(str(detr)), FeatureOptions(dtype="float32")) == []


def model_of(detr, **fields):
    """A tiny model with the store's tower."""
    model = tiny_model(**{"vision_config": None, "vision_hidden_size": 24, "freeze_vision": True, **fields})
    model.attach_tower(load_vision_tower(str(detr)))
    return model


def test_a_store_is_refused_by_a_model_that_differs_and_says_in_what(store, detr):
    features, processor = FeatureStore(store), DetrImageProcessorPil.from_pretrained(detr)
    features.check_model(model_of(detr), processor)
    features.check_model(model_of(detr).to(torch.bfloat16), processor)
    other_config, other_weights = model_of(detr), model_of(detr)
    other_config.config.vision_config.num_queries = 6
    with torch.no_grad():
        other_weights.encoder.vision_tower.query_position_embeddings.weight[0, 0] += 1
    without_tower = {"vision_config": None, "vision_hidden_size": 24}
    for model, image_processor, message in (
        (tiny_model(**{**without_tower, "vision_hidden_size": 99}), None, "width of the patches is 24 .*, 99 in the"),
        (
            tiny_model(**without_tower, num_vision_tokens=9),
            None,
            "patches of a picture is 5 in the store, 9 in the model",
        ),
        (
            tiny_model(**without_tower, vision_tower="vit"),
            None,
            "vision_tower is 'detr' in the store, 'vit' in the model",
        ),
        (other_config, processor, "vision_config.num_queries is 5 in the store, 6 in the model"),
        (other_weights, processor, "weights of the tower is"),
        (model_of(detr, freeze_vision=False), processor, "features of a fixed tower, but this model trains its tower"),
        (
            model_of(detr),
            DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 128}),
            "image_processor.size is .*64.* in the store, .*32.* in the model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            features.check_model(model, image_processor)
