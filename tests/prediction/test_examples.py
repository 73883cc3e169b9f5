"""Tokens, pixels and features: computed once, and again only when the data or the settings change."""

import io
import json

import pytest
import torch
from conftest import tiny_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from mmcot.pictures import pixel_store
from mmcot.pictures.featurizer import vision_source
from mmcot.pictures.pixel_store import PixelStore
from mmcot.prediction.examples import StageCollator, tokenized
from mmcot.problems.sources import load_problems
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.stage_mmcot import PAPER_TEMPLATES, Stage


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache for each test, so that a test can list its files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def tokenizer(*words):
    pieces = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    model = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def processor(words=("red", "blue", "color"), source=PAPER_TEMPLATES["QCM-E"]["source"], **lengths):
    stage = Stage(
        "rationale", ["question", "context", "choices", "images"], "rationale", source, "{{ solution }}", **lengths
    )
    size = {"height": 32, "width": 32}
    return MMCoTProcessor(tokenizer(*words), ViTImageProcessor(size=size), [stage])


def problems(folder, question="Which color is it?", color="red"):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "PNG")
    (folder / f"{color}.png").write_bytes(file.getvalue())
    row = {"question": question, "choices": ["red", "blue"], "answer": 0, "solution": "red , so red", "split": "train"}
    rows = [{**row, "id": "with", "images": [f"{color}.png"]}, {**row, "id": "without", "images": []}]
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems(str(path), "train")


def record_calls(monkeypatch, owner, name):
    """Return a list that grows by one item with each later call of a function of a module or class."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs))
    return calls


def tokens(rows, tools):
    return tokenized(rows, tools.stages[0], tools, with_targets=True)


def test_collated_examples_equal_processor_output(tmp_path):
    rows, tools = problems(tmp_path), processor()
    collate = StageCollator(tools, tools.stages[0], PixelStore(rows, tools.image_processor))
    batch = collate(list(tokens(rows, tools)))
    images = [Image.open(tmp_path / "red.png"), None]
    expected = tools(list(rows.remove_columns("images")), stage="rationale", images=images, with_targets=True)
    assert set(batch) == set(expected)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_second_run_reads_tokens_from_cache(tmp_path, own_cache, monkeypatch):
    first = list(tokens(problems(tmp_path), processor()))
    calls = record_calls(monkeypatch, Stage, "render_source")
    files = sorted(own_cache.rglob("*.arrow"))
    tools = processor()
    # A call changes the tokenizer's state, which must not change the cache key.
    tools.tokenizer(["red", "red blue"], padding=True, truncation=True, max_length=3)
    assert list(tokens(problems(tmp_path), tools)) == first
    assert not calls and sorted(own_cache.rglob("*.arrow")) == files


@pytest.mark.parametrize(
    ("data", "tools"),
    [
        ({"question": "Is it blue ?"}, {}),
        ({}, {"source": "{{ question }}"}),
        ({}, {"max_source_length": 5}),
        ({}, {"words": ("blue", "red", "color")}),
    ],
    ids=["data", "template", "length", "tokenizer"],
)
def test_tokenizes_again_when_data_or_settings_change(tmp_path, data, tools):
    first = tokens(problems(tmp_path), processor())
    changed = tokens(problems(tmp_path, **data), processor(**tools))
    assert list(changed.remove_columns("images")) != list(first.remove_columns("images"))


def test_prepares_pixels_again_only_for_another_picture_or_processor(tmp_path, monkeypatch):
    rows, tools = problems(tmp_path), processor()
    first = PixelStore(rows, tools.image_processor).batch(list(rows))
    expected = tools.prepare_pictures([Image.open(tmp_path / "red.png"), None], 2)
    assert all(torch.equal(first[name], expected[name]) for name in expected)
    calls = record_calls(monkeypatch, pixel_store, "read_picture")
    again = PixelStore(rows, tools.image_processor).batch(list(rows))
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert len(calls) == 1  # because one picture is prepared to estimate the size of the cache
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "red.png")  # the same name, another picture
    other = PixelStore(rows, tools.image_processor).batch(list(rows))
    assert not torch.equal(other["pixel_values"], first["pixel_values"])
    smaller = PixelStore(rows, ViTImageProcessor(size={"height": 16, "width": 16}))
    assert smaller.batch(list(rows))["pixel_values"].shape[-1] == 16


def test_prepares_pixels_per_batch_above_the_cache_limit(tmp_path, own_cache, monkeypatch):
    rows, tools = problems(tmp_path), processor()
    kept = PixelStore(rows, tools.image_processor).batch(list(rows))
    monkeypatch.setattr("mmcot.pictures.pixel_store.MAX_CACHED_BYTES", 100)
    files = sorted(own_cache.rglob("*.arrow"))
    fresh = PixelStore(rows, tools.image_processor).batch(list(rows))
    assert all(torch.equal(fresh[name], kept[name]) for name in kept)
    assert sorted(own_cache.rglob("*.arrow")) == files


def test_computes_features_again_only_for_another_tower(tmp_path):
    rows, tools = problems(tmp_path), processor()
    images = tools.prepare_pictures([Image.open(tmp_path / "red.png"), None], 2)

    def read_features(model):
        calls = []
        hook = model.encoder.vision_tower.register_forward_hook(lambda *_: calls.append(1))
        batch = vision_source(model, tools.image_processor, rows).batch(list(rows))
        hook.remove()
        with torch.no_grad():
            patches, mask = model.encoder.picture_patches(**images)
        assert torch.equal(batch["vision_mask"], mask)
        torch.testing.assert_close(batch["vision_features"], patches, rtol=0, atol=1e-6)
        return batch["vision_features"], len(calls)

    model = tiny_model(freeze_vision=True)
    features, computed = read_features(model)
    again, computed_again = read_features(tiny_model(freeze_vision=True))
    assert torch.equal(again, features) and (computed, computed_again) == (1, 0)
    other, computed = read_features(tiny_model(seed=1, freeze_vision=True))
    assert not torch.allclose(other, features) and computed == 1


def test_trained_tower_gets_pixels(tmp_path):
    rows, tools = problems(tmp_path), processor()
    assert isinstance(vision_source(tiny_model(), tools.image_processor, rows), PixelStore)
    assert vision_source(tiny_model(vision_config=None), tools.image_processor, rows) is None
    assert vision_source(tiny_model(), tools.image_processor, rows.select([1])) is None
