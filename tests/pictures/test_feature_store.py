"""The feature store: reading, recovery after a kill, refusal of damaged or mismatched stores."""

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


def test_masks_absent_pictures_in_a_batch(tmp_path, vit):
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
def test_drops_incomplete_batch_after_a_kill(cut, detr, all_problems, store, tmp_path):
    """A kill may leave an incomplete row, rows without keys, or an incomplete line of keys."""
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


def copy_with_edit(folder, tmp_path, name, change):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return copy


def test_refuses_truncated_file_with_both_sizes(store, tmp_path):
    copy = copy_with_edit(store, tmp_path, "rows.bin", lambda rows: rows[:-1])
    size = (store / "rows.bin").stat().st_size
    with pytest.raises(ValueError, match=f"rows.bin has {size - 1} bytes; .* are {size}"):
        FeatureStore(copy)


def test_refuses_to_extend_truncated_store(store, detr, all_problems, tmp_path):
    copy = copy_with_edit(store, tmp_path, "rows.bin", lambda rows: rows[:-1])
    with pytest.raises(ValueError, match="The file is truncated: remove"):
        compute_features(all_problems, copy, TowerOptions(str(detr)), FeatureOptions(dtype="float32"))


def test_refuses_edited_manifest(store, tmp_path):
    copy = copy_with_edit(store, tmp_path, "manifest.json", lambda text: text.replace(b'"checkpoint"', b'"paper"'))
    with pytest.raises(ValueError, match="manifest.json was edited"):
        FeatureStore(copy)


def test_refuses_folder_without_manifest(store, tmp_path):
    copy = copy_with_edit(store, tmp_path, "manifest.json", lambda text: text)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not a feature store: it has no manifest.json"):
        FeatureStore(copy)


@pytest.mark.parametrize("finished", [True, False])
def test_refuses_to_add_features_of_other_settings(store, detr, vit, all_problems, tmp_path, finished):
    copy = copy_with_edit(
        store, tmp_path, "rows.jsonl", lambda lines: lines if finished else lines.splitlines(keepends=True)[0]
    )
    with pytest.raises(ValueError, match="features with other settings: dtype is 'float32' there, 'float16' here"):
        compute_features(all_problems, copy, TowerOptions(str(detr)), FeatureOptions(dtype="float16"))
    with pytest.raises(ValueError, match="features with other settings"):
        compute_features(all_problems, copy, TowerOptions(str(vit)), FeatureOptions(dtype="float32"))


def test_refuses_second_writer(store, detr, all_problems):
    with FeatureWriter(store, {}), pytest.raises(ValueError, match="is being written by another process"):
        compute_features(all_problems, store, TowerOptions(str(detr)), FeatureOptions(dtype="float32"))
    assert compute_features(all_problems, store, TowerOptions(str(detr)), FeatureOptions(dtype="float32")) == []


def build_model(detr, **fields):
    """A tiny model with the store's tower."""
    model = tiny_model(**{"vision_config": None, "vision_hidden_size": 24, "freeze_vision": True, **fields})
    model.attach_tower(load_vision_tower(str(detr)))
    return model


def test_check_model_names_the_difference(store, detr):
    features, processor = FeatureStore(store), DetrImageProcessorPil.from_pretrained(detr)
    features.check_model(build_model(detr), processor)
    features.check_model(build_model(detr).to(torch.bfloat16), processor)
    other_config, other_weights = build_model(detr), build_model(detr)
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
        (
            build_model(detr, freeze_vision=False),
            processor,
            "features of a fixed tower, but this model trains its tower",
        ),
        (
            build_model(detr),
            DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 128}),
            "image_processor.size is .*64.* in the store, .*32.* in the model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            features.check_model(model, image_processor)
