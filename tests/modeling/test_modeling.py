"""The model: equality with T5 without a picture, masks, generation, losses, loading, tied and untied heads."""

import pytest
import torch
from conftest import TINY_TEXT, TINY_VISION, log_probability
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    DetrImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.trainer_pt_utils import LabelSmoother

from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.fusion_contract_mmcot import ENCODER_INPUT


def row(batch, index):
    return {name: tensor[index : index + 1] for name, tensor in batch.items()}


def as_t5(model):
    """transformers' own T5 with the same weights."""
    t5 = T5ForConditionalGeneration(T5Config(**TINY_TEXT)).eval()
    missing, surplus = t5.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(".fusion." in name or name.startswith("encoder.vision_tower") for name in surplus)
    return t5


def assert_as_t5(model, states, plain):
    """States without picture equal T5's: bit for bit, or up to rounding if patches are tokens of the batch."""
    if model.encoder.fusion.place == ENCODER_INPUT:
        torch.testing.assert_close(states[: len(plain)], plain, rtol=0, atol=1e-5)
    else:
        assert torch.equal(states, plain)


def test_row_without_picture_equals_t5_bit_for_bit(build, batch, labels):
    model = build()
    t5 = as_t5(model)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    fused = model.encoder(**batch).last_hidden_state
    plain = t5.encoder(**texts).last_hidden_state
    assert_as_t5(model, fused[2], plain[2])
    assert not torch.allclose(fused[:2, :9], plain[:2], atol=1e-2)
    ours, theirs = model(**texts, labels=labels), t5(**texts, labels=labels)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(model.generate(**texts, num_beams=3), t5.generate(**texts, num_beams=3, max_new_tokens=12))


def test_zero_vision_mask_means_no_picture(build, batch):
    model = build(vision_config=None, vision_hidden_size=10)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    features = torch.randn(3, 4, 10)
    vision_mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    fused = model.encoder(**texts, vision_features=features, vision_mask=vision_mask).last_hidden_state
    plain = model.encoder(**texts).last_hidden_state
    assert_as_t5(model, fused[1], plain[1])
    assert not torch.equal(fused[0, :9], plain[0]) and not torch.equal(fused[2, :9], plain[2])


def test_accepts_one_picture_per_row_without_the_images_dimension(build, batch):
    model = build()
    squeezed = {**batch, "pixel_values": batch["pixel_values"][:, 0], "pixel_mask": batch["pixel_mask"][:, 0]}
    assert torch.equal(model.encoder(**batch).last_hidden_state, model.encoder(**squeezed).last_hidden_state)


def test_padding_changes_no_output(build, batch, labels):
    """Text padded left or right, patches padded, rows batched: the logits are those of the row alone."""
    model = build()
    together = model(**batch, labels=labels).logits
    for index, length in enumerate((9, 6, 9)):
        alone = row(batch, index)
        alone["input_ids"] = alone["input_ids"][:, :length]
        alone["attention_mask"] = alone["attention_mask"][:, :length]
        expected = model(**alone, labels=labels[index : index + 1]).logits[0]
        torch.testing.assert_close(together[index], expected, rtol=0, atol=1e-5)
        alone["input_ids"] = torch.cat([torch.zeros(1, 4, dtype=torch.long), alone["input_ids"]], dim=1)
        alone["attention_mask"] = torch.cat([torch.zeros(1, 4, dtype=torch.long), alone["attention_mask"]], dim=1)
        padded_left = model(**alone, labels=labels[index : index + 1]).logits[0]
        torch.testing.assert_close(padded_left, expected, rtol=0, atol=1e-5)


def test_second_picture_adds_patches_unless_masked(build, batch):
    """A second picture adds patches; a masked second picture adds none."""
    model = build(max_images=2)
    one = row(batch, 0)
    two = {**one, "pixel_values": torch.cat([one["pixel_values"], torch.randn(1, 1, 3, 32, 32)], dim=1)}
    labels = torch.tensor([[5, 6, 7, 1]])
    logits = model(**one, labels=labels).logits
    masked = torch.cat([one["pixel_mask"], torch.zeros_like(one["pixel_mask"])], dim=1)
    torch.testing.assert_close(model(**{**two, "pixel_mask": masked}, labels=labels).logits, logits)
    both = torch.cat([one["pixel_mask"]] * 2, dim=1)
    assert not torch.allclose(model(**{**two, "pixel_mask": both}, labels=labels).logits, logits, atol=1e-3)


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_generation_with_and_without_cache_is_equal(build, batch, generation):
    model = build(initializer_factor=2.0)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        outputs.append(model.generate(**batch, use_cache=use_cache, **generation))
    assert torch.equal(*outputs)
    assert len({tuple(tokens) for tokens in outputs[0].tolist()}) > 1


def test_detr_tower_accepts_pictures_of_different_sizes(build):
    """A tower needs a `last_hidden_state`: DETR returns its object queries, and it receives the pixel mask."""
    torch.manual_seed(0)
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    detr = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}
    model = build(vision_config={"model_type": "detr", "backbone_config": backbone, **detr, **heads})
    processor = MMCoTProcessor(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())),
        DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}),
    )
    pictures = [Image.new("RGB", (40, 40), "red"), Image.new("RGB", (80, 40), "blue"), None]
    pixels = processor.prepare_pictures(pictures, 3)
    together, mask = model.encoder.picture_patches(**pixels, vision_features=None, vision_mask=None)
    assert together.shape == (3, 5, 16) and mask.any(dim=1).tolist() == [True, True, False]
    alone = processor.prepare_pictures(pictures[:1], 1)
    alone, _ = model.encoder.picture_patches(**alone, vision_features=None, vision_mask=None)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_encodes_pictures_once_per_generate(build, batch):
    model = build()
    calls = []
    model.encoder.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    model.encoder.fusion.register_forward_hook(lambda *_: calls.append("fusion"))
    model.generate(**batch, num_beams=2)
    assert sorted(calls) == ["fusion", "tower"]


def test_does_not_fuse_given_encoder_outputs_again(build, batch, labels):
    model = build()
    encoder_outputs = model.encoder(**batch)
    given = model(encoder_outputs=encoder_outputs, attention_mask=batch["attention_mask"], labels=labels)
    assert torch.equal(given.logits, model(**batch, labels=labels).logits)


def test_loss_uses_num_items_in_batch(build, batch, labels):
    """The parts of a step, each divided by the number of tokens of the step, add up to the mean over its tokens."""
    model = build()
    logits = model(**batch, labels=labels).logits
    mean = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(**batch, labels=labels).loss, mean)
    items = int((labels != -100).sum())
    parts = [model(**row(batch, i), labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(3)]
    torch.testing.assert_close(sum(parts), mean)


def test_skip_logits_preserves_loss_and_gradients(build, batch, labels):
    """With the head applied only to real targets, a batch has the loss and the gradients of its rows one by one."""

    def gradients(model):
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    model, items = build(), int((labels != -100).sum())
    outputs = model(**batch, labels=labels, num_items_in_batch=items, skip_logits=True)
    outputs.loss.backward()
    assert outputs.logits is None
    together = gradients(model)
    model.zero_grad()
    losses = []
    for index in range(3):
        target = labels[index : index + 1]
        logits = model(**row(batch, index), labels=target[target != -100][None]).logits
        losses.append(cross_entropy(logits[0], target[target != -100], reduction="sum") / items)
        losses[-1].backward()
    torch.testing.assert_close(outputs.loss, sum(losses))
    assert together.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-5)


def test_returns_dict_or_tuple(build, batch, labels):
    model = build()
    as_dict = model(**batch, labels=labels)
    as_tuple = model(**batch, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], as_dict.loss) and torch.equal(as_tuple[1], as_dict.logits)


def test_choice_scores_equal_log_probabilities_of_separate_passes(build, batch):
    model = build()
    choices = [[[5, 6, 1], [7, 1], [8, 9, 10, 1]], [[11, 1], [12, 13, 1]], [[14, 1]]]
    choice_labels = torch.full((3, 3, 4), -100)
    for i, texts in enumerate(choices):
        for j, tokens in enumerate(texts):
            choice_labels[i, j, : len(tokens)] = torch.tensor(tokens)
    scores = model.score_choices(choice_labels, **batch)
    for i, texts in enumerate(choices):
        for j in range(3):
            if j >= len(texts):
                assert scores[i, j] == -torch.inf
                continue
            expected = log_probability(model, row(batch, i), torch.tensor(texts[j]))
            torch.testing.assert_close(scores[i, j], expected, rtol=0, atol=1e-4)


def test_refuses_pixels_together_with_features(build, batch):
    with pytest.raises(ValueError, match="pixel_values and vision_features were both given"):
        build()(**batch, vision_features=torch.randn(3, 4, 24), labels=torch.ones(3, 1, dtype=torch.long))


def test_refuses_features_of_another_width(build, batch):
    with pytest.raises(ValueError, match="vision_features are 7 wide, but config.vision_hidden_size is 24"):
        build().encoder(input_ids=batch["input_ids"], vision_features=torch.randn(3, 4, 7))


def test_refuses_pixels_without_a_tower(build, batch):
    with pytest.raises(ValueError, match="no picture tower"):
        build(vision_config=None, vision_hidden_size=24).encoder(**batch)


def test_refuses_more_pictures_than_max_images(build, batch):
    batch["pixel_values"] = batch["pixel_values"].expand(-1, 3, -1, -1, -1)
    with pytest.raises(ValueError, match="contain 3 pictures per problem, but config.max_images is 2"):
        build(max_images=2).encoder(**batch)


def test_refuses_masks_of_another_shape(build, batch):
    with pytest.raises(ValueError, match=r"pixel_mask has the shape \(3, 1, 16, 32\).*\(3, 1, 32, 32\)"):
        build().encoder(**{**batch, "pixel_mask": batch["pixel_mask"][:, :, :16]})
    with pytest.raises(ValueError, match=r"vision_mask has the shape \(3, 5\).*\(3, 4\)"):
        features = {"vision_features": torch.randn(3, 4, 24), "vision_mask": torch.ones(3, 5)}
        build().encoder(input_ids=batch["input_ids"], **features)


def test_refuses_a_tower_of_another_width():
    with pytest.raises(ValueError, match="vision_hidden_size is 99.*width 24"):
        MMCoTConfig(**TINY_TEXT, vision_config=TINY_VISION, vision_hidden_size=99)


def t5_checkpoint(folder, **config):
    torch.manual_seed(5)
    t5 = T5ForConditionalGeneration(T5Config(**TINY_TEXT, **config))
    t5.save_pretrained(folder)
    return t5


def untied_t5_checkpoint(folder):
    """A checkpoint like those of T5 v1.1 and FLAN-T5: its file contains a separate head."""
    t5_checkpoint(folder, tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["lm_head.weight"] = torch.randn(64, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def test_loading_a_t5_checkpoint_initializes_only_the_fusion(tmp_path, batch):
    t5 = t5_checkpoint(tmp_path)
    model, info = MMCoTForConditionalGeneration.from_pretrained(
        tmp_path, fusion="gated", vision_hidden_size=10, output_loading_info=True
    )
    assert {name.rsplit(".", 2)[0] for name in info["missing_keys"]} == {"encoder.fusion"}
    assert not info["unexpected_keys"]
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.eval().generate(**texts), t5.eval().generate(**texts))


def test_joins_text_and_vision_checkpoints(tmp_path, batch):
    t5_checkpoint(tmp_path / "text")
    tower = ViTModel(ViTConfig(**{name: value for name, value in TINY_VISION.items() if name != "model_type"})).eval()
    tower.save_pretrained(tmp_path / "vision")
    model = MMCoTForConditionalGeneration.from_text_vision_pretrained(tmp_path / "text", tmp_path / "vision").eval()
    pixels = batch["pixel_values"][:, 0]
    expected = tower(pixel_values=pixels).last_hidden_state
    assert torch.equal(model.encoder.vision_tower(pixel_values=pixels).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "joined")
    again = AutoModel.from_pretrained(tmp_path / "joined").eval()
    assert torch.equal(again.encoder(**batch).last_hidden_state, model.encoder(**batch).last_hidden_state)


def test_untied_head_stays_untied(tmp_path):
    weights = untied_t5_checkpoint(tmp_path)
    model = MMCoTForConditionalGeneration.from_pretrained(tmp_path, vision_hidden_size=10)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(model.shared.weight, weights["shared.weight"])
    assert model.encoder.embed_tokens.weight is model.shared.weight is model.decoder.embed_tokens.weight
    assert not model.config.scale_decoder_outputs
    model.resize_token_embeddings(70)
    assert torch.equal(model.lm_head.weight[:64], weights["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    model.save_pretrained(tmp_path / "again")
    again = MMCoTForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not again.config.scale_decoder_outputs


def test_new_model_ties_its_head_as_configured(build):
    untied = build(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.shared.weight
    tied = build()
    assert tied.lm_head.weight is tied.shared.weight
    tied.resize_token_embeddings(70)
    assert tied.lm_head.weight is tied.shared.weight


def test_initial_weights_have_the_scale_of_t5(build):
    """transformers initializes custom code by another path, which once gave T5's layers a standard deviation of 1."""
    theirs = dict(T5ForConditionalGeneration(T5Config(**TINY_TEXT)).named_parameters())
    config = build().config
    for name, parameter in MMCoTForConditionalGeneration(config).named_parameters():
        if name in theirs and parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(theirs[name].std().item(), rel=0.25), name
        elif "fusion" in name and parameter.dim() == 1:
            assert bool(parameter.all()) == name.endswith("norm.weight") and parameter.unique().numel() == 1, name
        elif "fusion" in name:
            assert parameter.std().item() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.25), name


def test_initial_weights_depend_on_the_seed(build):
    first, second, other = (build(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    matrices = [name for name, tensor in first.items() if ".fusion." in name and tensor.dim() == 2]
    assert matrices and not any(torch.equal(first[name], other[name]) for name in matrices)


def test_frozen_tower_gets_no_gradient_and_stays_in_evaluation_mode(build, batch, labels):
    model = build(freeze_vision=True).train()
    model(**batch, labels=labels).loss.backward()
    tower = model.encoder.vision_tower
    assert not tower.training and all(parameter.grad is None for parameter in tower.parameters())
    fusion = [parameter.grad for name, parameter in model.named_parameters() if ".fusion." in name]
    assert any(gradient.abs().sum() > 0 for gradient in fusion)


def test_step_without_pictures_gives_the_fusion_zero_gradients(build, batch, labels):
    """DDP waits for a gradient of every parameter in every step."""
    model = build(vision_config=None, vision_hidden_size=24).train()
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    in_training = model(**text, labels=labels)
    in_training.loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if ".fusion." in name]
    assert gradients and all(gradient is not None and not gradient.any() for gradient in gradients)
    assert_as_t5(model, in_training.logits, as_t5(model)(**text, labels=labels).logits)


def test_trains_every_parameter(build, batch, labels):
    model = build().train()
    model(**batch, labels=labels).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("num_items_in_batch", [None, 20])
def test_smoothed_loss_equals_transformers(build, batch, labels, skip_logits, num_items_in_batch):
    model = build()
    with torch.no_grad():
        logits = model(**batch, labels=labels).logits
        expected = LabelSmoother(epsilon=0.2)({"logits": logits}, labels.clone())
        if num_items_in_batch is not None:
            expected = expected * (labels != -100).sum() / num_items_in_batch
        options = {"skip_logits": skip_logits, "num_items_in_batch": num_items_in_batch, "smoothing": 0.2}
        found = model(**batch, labels=labels, **options).loss
    torch.testing.assert_close(found, expected)
