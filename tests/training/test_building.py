"""The initial model of the stages: preparation builds it once, or not at all if its configuration is enough."""

import pytest
import torch
import yaml
from conftest import TINY_RECIPE, word_tokenizer

from mmcot.hub.merging import shared_modules
from mmcot.recipes.recipe import parse_recipe
from mmcot.training import building
from mmcot.training.building import InitialModel, check_verdicts, skeleton
from mmcot.training.preparation import prepare
from modeling_mmcot import MMCoTConfig, MMCoTProcessor
from modeling_mmcot.stage_mmcot import Stage

SIZE = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}


@pytest.fixture
def built(monkeypatch):
    """The models that the test builds."""
    models = []
    build_model = building.build_model
    monkeypatch.setattr(building, "build_model", lambda *given: models.append(build_model(*given)) or models[-1])
    return models


def words(dataset, folder, *options, config=TINY_RECIPE):
    return [str(word) for word in ("--config", config, "--dataset", dataset, "--output_dir", folder, *options)]


def test_first_stage_takes_the_model_that_computed_the_features(built, tiny_dataset, tmp_path):
    prepared = prepare(parse_recipe(words(tiny_dataset, tmp_path / "run", "--freeze_vision", "true")))
    first = prepared.initial_model.take()
    assert built == [first]
    again = prepared.initial_model.take()
    assert built == [first, again]
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in first.state_dict().items())


def test_refuses_tokenizer_that_does_not_distinguish_verdicts():
    check = Stage("check", ["answer_text"], "verdict", "{{ answer_text }}", kind="check")
    with pytest.raises(ValueError, match=r"'check' .*'right' or 'wrong', but the tokenizer .* both \(<unk>\)"):
        check_verdicts(MMCoTProcessor(word_tokenizer(), None, [check]))


def test_preparation_builds_no_model_for_features_or_a_trained_tower(built, store, tiny_dataset, tmp_path):
    prepare(parse_recipe(words(tiny_dataset, tmp_path / "pixels")))
    values = yaml.safe_load(TINY_RECIPE.read_text())
    values = {name: value for name, value in values.items() if name not in ("vision_config", "image_processor")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    options = words(tiny_dataset, tmp_path / "features", "--features", store, config=tmp_path / "recipe.yaml")
    prepared = prepare(parse_recipe(options))
    assert built == []
    found, expected = prepared.initial_model.without_weights(), prepared.initial_model.take()
    assert found.config.to_dict() == expected.config.to_dict()


def test_does_not_keep_a_discarded_model(built, tiny_dataset, tmp_path):
    prepared = prepare(parse_recipe(words(tiny_dataset, tmp_path / "run", "--freeze_vision", "true")))
    prepared.initial_model.discard()
    assert isinstance(prepared.initial_model, InitialModel) and prepared.initial_model.built is None


@pytest.mark.parametrize("settings", [{}, {"scale_decoder_outputs": False}, {"tied_head": True}])
def test_skeleton_has_no_weights_and_shares_modules_like_the_model(settings):
    config = MMCoTConfig(**SIZE, **settings)
    model = skeleton(config)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert ("lm_head" in shared_modules(model)) == ("scale_decoder_outputs" not in settings)
