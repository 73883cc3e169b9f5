"""Cached data is computed again when code, a library or the cached file changes, and only then."""

import importlib.metadata
import inspect
import json
import logging

import datasets
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from prediction.test_examples import own_cache, problems, processor, tokens  # noqa: F401

from mmcot.pictures import feature_store
from mmcot.pictures import featurizer as features
from mmcot.pictures.featurizer import TowerOptions, compute_features, vision_source
from mmcot.pictures.pixel_store import PixelStore
from mmcot.problems import demo
from mmcot.problems.sources import load_problems
from modeling_mmcot import pictures_mmcot, processing_mmcot, vision_mmcot

KINDS = {  # cached data of a dataset of two problems, one of them with a picture
    "examples": lambda rows, tools: list(tokens(rows, tools)),
    "pixels": lambda rows, tools: PixelStore(rows, tools.image_processor).batch(list(rows))["pixel_values"].tolist(),
    "features": lambda rows, tools: (
        vision_source(tiny_model(freeze_vision=True), tools.image_processor, rows)
        .batch(list(rows))["vision_features"]
        .tolist()
    ),
}
MADE_BY = {"examples": processing_mmcot, "pixels": pictures_mmcot, "features": vision_mmcot}


def count_cached(folder, kind):
    """Count the cache entries of a kind."""
    return len([place for place in (folder / "mmcot" / kind).iterdir() if place.suffix != ".lock"])


def edit_code(monkeypatch, edited):
    """Simulate an edit of a module's source file."""
    getsource = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda part: getsource(part) + ("# edited" if part is edited else ""))


def test_recomputes_features_when_preprocessing_code_changes(tmp_path, monkeypatch):
    rows, tools = problems(tmp_path), processor()
    before = KINDS["features"](rows, tools)
    prepare = features.picture_pixels
    monkeypatch.setattr(features, "picture_pixels", lambda *arguments: 2 * prepare(*arguments))
    edit_code(monkeypatch, pictures_mmcot)
    after = KINDS["features"](rows, tools)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "empty")
    assert after == KINDS["features"](rows, tools) != before


@pytest.mark.parametrize("kind", KINDS)
def test_recomputes_only_when_code_changes(tmp_path, own_cache, monkeypatch, kind):  # noqa: F811
    rows, tools = problems(tmp_path), processor()
    KINDS[kind](rows, tools)
    KINDS[kind](rows, tools)
    assert count_cached(own_cache, kind) == 1
    edit_code(monkeypatch, MADE_BY[kind])
    KINDS[kind](rows, tools)
    assert count_cached(own_cache, kind) == 2


@pytest.mark.parametrize(
    ("kind", "library"),
    [("examples", "tokenizers"), ("pixels", "pillow"), ("features", "torch"), ("features", "transformers")],
)
def test_recomputes_for_another_library_version(tmp_path, own_cache, monkeypatch, kind, library):  # noqa: F811
    rows, tools = problems(tmp_path), processor()
    KINDS[kind](rows, tools)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == library else version(name))
    KINDS[kind](rows, tools)
    assert count_cached(own_cache, kind) == 2


def truncate(file, where):
    whole = file.read_bytes()
    file.write_bytes(whole[: {"in the middle": len(whole) // 2, "at its end": len(whole) - 2, "to nothing": 0}[where]])


@pytest.mark.parametrize("where", ["in the middle", "at its end", "to nothing"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("examples", "*.arrow"),
        ("pixels", "*.arrow"),
        ("pixels", "dataset_info.json"),
        ("features", "rows.bin"),
        ("features", "rows.jsonl"),
        ("features", "manifest.json"),
    ],
)
def test_recomputes_truncated_cache_file(tmp_path, own_cache, caplog, kind, name, where):  # noqa: F811
    rows, tools = problems(tmp_path), processor()
    expected = KINDS[kind](rows, tools)
    (file,) = (own_cache / "mmcot" / kind).rglob(name)
    whole = file.read_bytes()
    truncate(file, where)
    with caplog.at_level(logging.WARNING):
        assert KINDS[kind](rows, tools) == expected
        # A kill may leave an incomplete last line of keys, so that its batch is computed again without a warning.
        assert name == "rows.jsonl" or str(own_cache) in caplog.text
        caplog.clear()
        assert KINDS[kind](rows, tools) == expected and not caplog.records
    (again,) = (own_cache / "mmcot" / kind).rglob(name)
    assert len(again.read_bytes()) == len(whole)


def test_recomputes_cache_truncated_between_two_batches(tmp_path, own_cache, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr("datasets.config.DEFAULT_MAX_BATCH_SIZE", 1)
    row = {
        "question": "Which color is it?",
        "choices": ["red", "blue"],
        "answer": 0,
        "solution": "so",
        "split": "train",
    }
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({**row, "id": str(number)}) + "\n" for number in range(2500)))
    rows, tools = load_problems(str(file), "train"), processor()
    expected = KINDS["examples"](rows, tools)
    (kept,) = (own_cache / "mmcot" / "examples").glob("*.arrow")
    whole = kept.read_bytes()
    for length in range(0, len(whole) - 8, 8):  # the first length at which fewer rows load without an error
        if whole[length : length + 4] != b"\xff\xff\xff\xff":
            continue
        kept.write_bytes(whole[:length])
        try:
            if 0 < len(datasets.Dataset.from_file(str(kept))) < 2500:
                break
        except (ValueError, OSError):
            continue
    assert KINDS["examples"](rows, tools) == expected and "of 2500 rows" in caplog.text


def test_regenerates_truncated_demonstration(own_cache, monkeypatch, caplog):  # noqa: F811
    drawn = [{**row, "split": "test"} for row in load_problems("demo", "val").select(range(3))]
    calls = []

    def generate(split, difficulty):
        calls.append(split)
        yield from drawn

    generate.__module__ = demo.__name__
    monkeypatch.setattr(demo, "generate", generate)
    expected = list(load_problems("demo", "test"))
    (file,) = (file for file in own_cache.rglob("*.arrow") if file.stat().st_size < 100_000)
    truncate(file, "in the middle")
    assert list(load_problems("demo", "test")) == expected and len(calls) == 2 and "computed again" in caplog.text


def test_damaged_picture_is_not_reported_as_damaged_cache(tmp_path, own_cache, caplog):  # noqa: F811
    rows, tools = problems(tmp_path), processor()
    (tmp_path / "red.png").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(ValueError, match="problem with: picture .* is not an image"):
            PixelStore(rows, tools.image_processor)
    assert "computed again" not in caplog.text


def test_warns_about_store_of_other_code_and_keeps_its_rows(tmp_path, vit, monkeypatch, caplog):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "blue.png")
    row = {"question": "?", "choices": ["a", "b"], "answer": 0, "split": "train"}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({**row, "id": name, "images": [f"{name}.png"]}) + "\n" for name in ("red", "blue"))
    )
    rows = load_problems(str(tmp_path / "rows.jsonl"), "train")
    compute_features(rows.select([0]), tmp_path / "store", TowerOptions(str(vit)))
    compute_features(rows.select([0]), tmp_path / "store", TowerOptions(str(vit)))
    assert not caplog.records
    edit_code(monkeypatch, pictures_mmcot)
    compute_features(rows, tmp_path / "store", TowerOptions(str(vit)))
    assert "store contains features that other code or libraries computed (mmcot's code" in caplog.text
    store = feature_store.FeatureStore(tmp_path / "store")
    assert len(store.rows) == 2 and store.manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
