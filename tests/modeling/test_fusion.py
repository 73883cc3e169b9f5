"""The fusions: their formulas in float64, masks, unchanged rows, options. test_convert.py tests the authors' form.

test_contract.py and test_modeling.py test the model with each of them.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration
from modeling_mmcot.fusion_contract_mmcot import LayerFusion, StateFusion, TokenFusion
from modeling_mmcot.fusion_mmcot import FUSIONS, FlamingoLayer, build_fusion

WIDTH, PATCH_WIDTH, HEADS, HEAD_WIDTH = 16, 12, 3, 4  # as in FLAN-T5 small, the heads are not as wide as the states
MASK = torch.ones(3, 7, dtype=torch.bool)


def config(**fields):
    return MMCoTConfig(
        d_model=WIDTH, num_heads=HEADS, d_kv=HEAD_WIDTH, num_layers=4, vision_hidden_size=PATCH_WIDTH, **fields
    )


def module(name, **options):
    """The module of a fusion that reads patches, with random weights in float64."""
    torch.manual_seed(0)
    settings = config(fusion=name, fusion_options=options or None)
    fusion = build_fusion(settings)
    if isinstance(fusion, LayerFusion):
        fusion = fusion.layer(settings)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return fusion.double()


STATE_FUSIONS = [name for name in FUSIONS if isinstance(module(name), StateFusion)]
TOKEN_FUSIONS = [name for name in FUSIONS if isinstance(module(name), TokenFusion)]


def run(fusion, hidden_states, features, mask):
    """What the fusion computes for the patches: new states, or tokens."""
    if isinstance(fusion, StateFusion):
        return fusion(hidden_states, features, mask).hidden_states
    return fusion(features, mask)[0]


@pytest.fixture(params=FUSIONS)
def fusion(request):
    return module(request.param)


@pytest.fixture
def states():
    torch.manual_seed(1)
    return torch.randn(3, 5, WIDTH, dtype=torch.float64), torch.randn(3, 7, PATCH_WIDTH, dtype=torch.float64)


def weights_of(fusion):
    return {name: parameter.detach().numpy() for name, parameter in fusion.named_parameters()}


def softmax(scores):
    exponentials = np.exp(scores)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def layer_norm(x, scale, shift):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + shift


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def multi_head(weights, prefix, queries, keys):
    """The output of multi-head attention for one row, and its weights, averaged over heads."""
    heads, attentions = [], []
    for head in range(HEADS):
        part = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        query, key, value = (
            x @ weights[f"{prefix}.{name}.weight"][part].T
            for name, x in (("query", queries), ("key", keys), ("value", keys))
        )
        attentions.append(softmax(query @ key.T / np.sqrt(HEAD_WIDTH)))
        heads.append(attentions[-1] @ value)
    return np.concatenate(heads, axis=-1) @ weights[f"{prefix}.output.weight"].T, np.mean(attentions, axis=0)


def feed_forward(weights, prefix, x):
    normalized = layer_norm(x, weights[f"{prefix}.layer_norm.weight"], weights[f"{prefix}.layer_norm.bias"])
    expanded = normalized @ weights[f"{prefix}.expansion.weight"].T
    return np.maximum(expanded, 0) ** 2 @ weights[f"{prefix}.contraction.weight"].T


def gated(w, h_lang, x_vis):
    h_vis = x_vis @ w["vision_projection.weight"].T
    attention = softmax(h_lang @ h_vis.T / np.sqrt(WIDTH))
    h_attn = attention @ h_vis
    gate = 1 / (1 + np.exp(-(h_lang @ w["language_gate.weight"].T + h_attn @ w["vision_gate.weight"].T)))
    return (1 - gate) * h_lang + gate * h_attn, attention, gate


def cross_attention(w, h_lang, x_vis):
    attended, attention = multi_head(w, "attention", h_lang, x_vis)
    return h_lang + attended, attention, None


def flamingo(w, h_lang, x_vis):
    normalized = layer_norm(h_lang, w["layer_norm.weight"], w["layer_norm.bias"])
    attended, attention = multi_head(w, "attention", normalized, x_vis)
    h = h_lang + np.tanh(w["attention_gate"]) * attended
    return h + np.tanh(w["feed_forward_gate"]) * feed_forward(w, "feed_forward", h), attention, None


@pytest.mark.parametrize("formula", [gated, cross_attention, flamingo])
def test_new_states_equal_the_published_formula_in_float64(formula, states):
    fusion = module(formula.__name__)
    found = fusion(*states, MASK)
    for row in range(3):
        expected = formula(weights_of(fusion), *(tensor[row].numpy() for tensor in states))
        for ours, theirs in zip(found, expected, strict=True):
            if theirs is None:
                assert ours is None
            else:
                np.testing.assert_allclose(ours[row].detach().numpy(), theirs, rtol=0, atol=1e-12)


def prefix(w, x_vis):
    return rms_norm(x_vis @ w["vision_projection.weight"].T, w["layer_norm.weight"])


def resampler(w, x_vis):
    patches, latents = x_vis @ w["vision_projection.weight"].T, w["latents"]
    for layer in ("layers.0", "layers.1"):
        normalized = {
            name: layer_norm(x, w[f"{layer}.{name}_norm.weight"], w[f"{layer}.{name}_norm.bias"])
            for name, x in (("patch", patches), ("latent", latents))
        }
        keys = np.concatenate([normalized["patch"], normalized["latent"]])
        latents = latents + multi_head(w, f"{layer}.attention", normalized["latent"], keys)[0]
        latents = latents + feed_forward(w, f"{layer}.feed_forward", latents)
    return rms_norm(latents, w["layer_norm.weight"])


@pytest.mark.parametrize("formula", [prefix, resampler])
def test_tokens_equal_the_published_formula_in_float64(formula, states):
    fusion = module(formula.__name__)
    tokens, mask = fusion(states[1], MASK)
    for row in range(3):
        expected = formula(weights_of(fusion), states[1][row].numpy())
        # T5LayerNorm computes the variance in float32.
        np.testing.assert_allclose(tokens[row].detach().numpy(), expected, rtol=1e-6, atol=0)
    assert mask.all() and mask.shape == tokens.shape[:2]


def test_every_fusion_has_a_formula_in_these_tests():
    assert {gated, cross_attention, flamingo, prefix, resampler} == {
        globals()[name]
        for name in FUSIONS
        if name != "gated_mha"  # test_convert.py has the authors' numbers
    }


def test_ignores_masked_patches(fusion, states):
    hidden_states, features = states
    mask = MASK.clone()
    mask[:, 5:] = False
    found = run(fusion, hidden_states, features, mask)
    assert torch.equal(found, run(fusion, hidden_states, features * mask[..., None], mask))
    shorter = run(fusion, hidden_states, features[:, :5], mask[:, :5])
    torch.testing.assert_close(found[:, : shorter.shape[1]], shorter, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STATE_FUSIONS)
def test_attention_sums_to_one_over_real_patches(name, states):
    mask = MASK.clone()
    mask[:, 5:] = False
    attentions = module(name)(*states, mask).attentions
    assert attentions[..., 5:].eq(0).all()
    torch.testing.assert_close(attentions.sum(dim=-1), torch.ones(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", STATE_FUSIONS)
def test_row_without_patches_keeps_its_states_and_finite_gradients(name, states):
    fusion, (hidden_states, features) = module(name), states
    hidden_states.requires_grad_()
    mask = MASK.clone()
    mask[1] = False
    fused, attentions, _ = fusion(hidden_states, features, mask)
    assert torch.equal(fused[1], hidden_states[1]) and attentions[1].eq(0).all()
    assert not torch.equal(fused[0], hidden_states[0])
    fused.sum().backward()
    assert torch.equal(hidden_states.grad[1], torch.ones(5, WIDTH, dtype=torch.float64))
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


@pytest.mark.parametrize("name", TOKEN_FUSIONS)
def test_row_without_patches_has_no_tokens(name, states):
    mask = MASK.clone()
    mask[1] = False
    tokens, token_mask = module(name)(states[1], mask)
    assert not token_mask[1].any() and token_mask[[0, 2]].all() and tokens.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignores_nan_and_infinity_in_masked_patches(fusion, states, value):
    hidden_states, features = states
    mask = MASK.clone()
    mask[0, 4:] = mask[1] = False
    expected = run(fusion, hidden_states, features, mask)
    features[~mask] = value
    found = run(fusion, hidden_states, features.requires_grad_(), mask)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert features.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters() if parameter.grad is not None)


def test_flamingo_equals_t5_bit_for_bit_before_training(batch, labels):
    torch.manual_seed(0)
    model = MMCoTForConditionalGeneration(tiny_model(fusion="flamingo").config).eval()
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with_pictures, without = model(**batch, labels=labels), model(**text, labels=labels)
    assert torch.equal(with_pictures.logits, without.logits) and torch.equal(with_pictures.loss, without.loss)


def test_row_without_picture_equals_t5_bit_for_bit_after_training_of_flamingo(batch, labels):
    """The published block would change it by its feed-forward."""
    model = MMCoTForConditionalGeneration(tiny_model(fusion="flamingo").config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = [layer for layer in model.modules() if isinstance(layer, FlamingoLayer)]
    assert all(layer.feed_forward_gate.abs() > 1e-3 for layer in layers), "the gates have opened"
    with_pictures = model.eval().encoder(**batch).last_hidden_state
    plain = model.encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert torch.equal(with_pictures[2], plain[2]) and not torch.equal(with_pictures[0], plain[0])


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (4, [0])])
def test_flamingo_acts_before_every_nth_layer(every, expected):
    model = tiny_model(fusion="flamingo", fusion_options={"every": every}, num_layers=4)
    assert [index for index, block in enumerate(model.encoder.block) if hasattr(block, "fusion")] == expected


@pytest.mark.parametrize("name", TOKEN_FUSIONS)
def test_position_bias_applies_to_pairs_of_text_tokens_only(name, batch):
    """Without any position bias, T5 reads text and tokens alike. With it, the order of the tokens has no influence."""
    model = tiny_model(fusion=name)
    encoder = model.encoder
    bias = encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    patches, mask = encoder.picture_patches(batch["pixel_values"], batch["pixel_mask"])
    tokens, token_mask = encoder.fusion(patches, mask)
    read = {
        "inputs_embeds": torch.cat([encoder.embed_tokens(batch["input_ids"]), tokens], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], token_mask.long()], dim=1),
    }
    without_bias = deepcopy(model)
    without_bias.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.zero_()
    t5 = T5ForConditionalGeneration(T5Config(**{n: getattr(model.config, n) for n in TINY})).eval()
    t5.load_state_dict(without_bias.state_dict(), strict=False)
    torch.testing.assert_close(
        without_bias.encoder(**batch).last_hidden_state, t5.encoder(**read).last_hidden_state, rtol=0, atol=1e-5
    )
    assert not torch.allclose(encoder(**batch)[0][:2], without_bias.encoder(**batch)[0][:2])
    if name == "prefix":
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states, shuffled = (
            encoder(**text, vision_features=x, vision_mask=m).last_hidden_state
            for x, m in ((patches, mask), (patches.flip(1), mask.flip(1)))
        )
        torch.testing.assert_close(states[:, :9], shuffled[:, :9], rtol=0, atol=1e-5)
    assert bias.abs().sum() > 0


TINY = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "decoder_start_token_id", "dropout_rate")


def test_resampler_adds_the_configured_number_of_tokens(batch):
    encoder = tiny_model(fusion="resampler", fusion_options={"num_latents": 3}).encoder
    outputs = encoder(**batch)
    assert outputs.last_hidden_state.shape[1] == 9 + 3
    assert outputs.attention_mask[:, 9:].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion": "gatd"}, "'gatd'; known fusions: cross_attention, flamingo, gated, .* Did you mean 'gated'"),
        ({"fusion_options": {"every": 2}}, "fusion 'gated' has no option 'every'; its options: none"),
        ({"fusion": "none", "fusion_options": {"every": 2}}, "fusion 'none' has no option 'every'"),
        ({"fusion": "resampler", "fusion_options": {"latents": 2}}, "its options: num_latents, num_layers"),
        ({"fusion": "resampler", "fusion_options": {"num_latents": 0}}, "num_latents is 0; expected 1 or more"),
        (
            {"fusion": "resampler", "num_vision_tokens": 7, "max_images": 2, "fusion_options": {"num_latents": 15}},
            "num_latents is 15, but a problem has at most 14 patches",
        ),
        ({"fusion": "flamingo", "fusion_options": {"every": 5}}, "every is 5; expected 1 to 4, the number of encoder"),
        ({"fusion": "flamingo", "fusion_options": {"every": 0}}, "every is 0; expected 1 to 4"),
        ({"fusion": "flamingo", "fusion_options": {"every": "2"}}, "every is '2'; expected an integer"),
        ({"fusion": "flamingo", "fusion_options": {"every": 2.0}}, "every is 2.0; expected an integer"),
    ],
)
def test_refuses_a_fusion_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=message):
        build_fusion(config(**fields))


@pytest.mark.parametrize("name", TOKEN_FUSIONS)
def test_refuses_zeros_as_tokens(name):
    with pytest.raises(ValueError, match=f"zeros_for_missing_pictures is set, but the fusion '{name}'"):
        tiny_model(fusion=name, zeros_for_missing_pictures=True)


@pytest.mark.parametrize("name", [name for name in FUSIONS if name not in TOKEN_FUSIONS])
def test_number_of_zeros_for_a_missing_picture_has_no_influence(name, batch):
    encoder = tiny_model(fusion=name, zeros_for_missing_pictures=True).encoder
    alone = {field: tensor[2:] for field, tensor in batch.items() if field in ("input_ids", "attention_mask")}
    torch.testing.assert_close(encoder(**batch)[0][2:], encoder(**alone)[0], rtol=0, atol=1e-5)


def test_a_model_without_fusion_refuses_pictures(batch):
    model = tiny_model(fusion="none", vision_config=None, vision_hidden_size=24)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="reads text only: .*config.fusion is 'none'"):
        model.encoder(**text, vision_features=torch.randn(3, 4, 24))
    assert model.encoder(**text).last_hidden_state.shape == (3, 9, 32)


def test_a_checkpoint_keeps_its_fusion_unless_it_is_replaced(tmp_path, batch):
    model = tiny_model(fusion="gated")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has the fusion 'gated' .*but 'flamingo' .*replace_fusion=True"):
        MMCoTForConditionalGeneration.from_pretrained(tmp_path, fusion="flamingo")
    replaced = MMCoTForConditionalGeneration.from_pretrained(tmp_path, fusion="flamingo", replace_fusion=True).eval()
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(replaced.encoder(**text).last_hidden_state, model.encoder(**text).last_hidden_state)
    pixels = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    (ours, _), (theirs, _) = (one.encoder.picture_patches(**pixels) for one in (replaced, model))
    assert torch.equal(ours, theirs), "the tower is kept"
    replaced.save_pretrained(tmp_path / "replaced")
    again = MMCoTForConditionalGeneration.from_pretrained(tmp_path / "replaced")
    assert torch.equal(again.encoder(**batch).last_hidden_state, replaced.encoder(**batch).last_hidden_state)
    with pytest.raises(ValueError, match=r"'flamingo' .*\({'every': 2}\) was requested: encoder.block.1"):
        MMCoTForConditionalGeneration.from_pretrained(tmp_path / "replaced", fusion_options={"every": 2})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"fusion": "gated"}, {"fusion": "gated_mha"}),
        ({"fusion": "resampler"}, {"fusion": "resampler", "fusion_options": {"num_latents": 3, "num_layers": 1}}),
        ({"fusion": "flamingo", "fusion_options": {"every": 2}}, {"fusion": "prefix"}),
        (
            {"fusion": "flamingo", "fusion_options": {"every": 2}},
            {"fusion": "flamingo", "fusion_options": {"every": 1}},
        ),
    ],
)
def test_a_replaced_fusion_has_no_weight_of_the_one_before(before, after, tmp_path):
    tiny_model(**before).save_pretrained(tmp_path)
    replaced = MMCoTForConditionalGeneration.from_pretrained(tmp_path, replace_fusion=True, **after)
    trained = dict(tiny_model(**before).named_parameters())
    for name, parameter in replaced.named_parameters():
        if ".fusion." not in name:
            assert torch.equal(parameter, trained[name])
        elif name in trained and parameter.dim() == 2:
            assert parameter.shape != trained[name].shape or not torch.equal(parameter, trained[name]), name
        elif name.endswith("_gate"):
            assert not parameter.any(), name


def test_says_that_a_weight_of_the_same_fusion_is_missing(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.fusion.language_gate.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'gated' .* does not have the expected weights: encoder.fusion.language_gate"):
        MMCoTForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gated", "prefix", "flamingo"])
def test_weights_can_be_offloaded(name, batch):
    model = tiny_model(fusion=name)
    expected = model.encoder(**batch).last_hidden_state
    cpu_offload(model.encoder, execution_device=torch.device("cpu"))
    assert model.encoder.embed_tokens.weight.is_meta
    torch.testing.assert_close(model.encoder(**batch).last_hidden_state, expected)


def test_shows_selected_hidden_states_with_attentions(batch):
    encoder = tiny_model(fusion="flamingo", attn_implementation="eager").encoder
    every = encoder(**batch, output_attentions=True, output_hidden_states=True)
    last = encoder(**batch, output_attentions=True, output_hidden_states=[-1])
    assert len(every.hidden_states) == 3 and len(last.hidden_states) == 1
    assert torch.equal(last.hidden_states[0], every.hidden_states[-1])


def test_a_model_without_fusion_refuses_a_tower():
    model = tiny_model(fusion="none", vision_config=None, vision_hidden_size=24)
    with pytest.raises(ValueError, match="reads text only .*'none'"):
        model.attach_tower(tiny_model().encoder.vision_tower)


def test_a_text_model_gets_a_fusion_without_an_option(tmp_path):
    tiny_model(fusion="none", vision_config=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no effect: .* has the fusion 'prefix' .* already, or none"):
        MMCoTForConditionalGeneration.from_pretrained(
            tmp_path, fusion="prefix", vision_hidden_size=10, replace_fusion=True
        )
    model = MMCoTForConditionalGeneration.from_pretrained(tmp_path, fusion="prefix", vision_hidden_size=10)
    assert model.encoder.fusion.vision_projection.weight.std() > 0
