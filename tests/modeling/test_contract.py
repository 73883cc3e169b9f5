"""The checks of transformers' own model and generation test mixins for an encoder-decoder, with each fusion.

test_modeling.py tests the properties that only this model has.
"""

import copy
import inspect
import json
import pickle

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModel, AutoModelForSeq2SeqLM, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from modeling_mmcot import MMCoTForConditionalGeneration
from modeling_mmcot.fusion_contract_mmcot import ENCODER_INPUT, ENCODER_OUTPUT
from modeling_mmcot.versions_mmcot import CACHE


@pytest.fixture
def inputs(batch, labels):
    return {**batch, "labels": labels}


def text_only(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_save_and_load_preserve_logits_bit_for_bit(build, inputs, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForSeq2SeqLM, MMCoTForConditionalGeneration):
        again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        own = {"architectures": [type(model).__name__], "_name_or_path": str(tmp_path)}
        assert again.config.to_dict() == {**model.config.to_dict(), **own}
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)
    assert again.generation_config.max_new_tokens == model.generation_config.max_new_tokens


def test_loads_from_shards(build, inputs, tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = MMCoTForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("loading", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_loading_options_preserve_logits(build, inputs, tmp_path, loading):
    model = build()
    model.save_pretrained(tmp_path)
    again = MMCoTForConditionalGeneration.from_pretrained(tmp_path, **loading).eval()
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_never_splits_a_fusion_or_a_block_over_devices(build):
    assert {"T5Block", type(build().encoder.fusion).__name__, "ViTLayer"} <= set(build()._no_split_modules)


def test_returns_attentions_and_hidden_states_with_their_shapes(build, inputs):
    # Eager, because T5 returns no text attentions with SDPA. The fusion returns its attentions with both.
    model = build(attn_implementation="eager")
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    adds_tokens = model.encoder.fusion.place == ENCODER_INPUT
    length = outputs.encoder_last_hidden_state.shape[1]
    if adds_tokens:
        assert length > 9 and outputs.fusion_attentions is None
    else:
        assert length == 9 and outputs.fusion_attentions.shape == (3, 9, 5)
        torch.testing.assert_close(outputs.fusion_attentions[:2].sum(dim=-1), torch.ones(2, 9))
        assert not outputs.fusion_attentions[2].any(), "the third problem has no picture"
    assert [tuple(a.shape) for a in outputs.encoder_attentions] == [(3, 4, length, length)] * 2
    assert [tuple(a.shape) for a in outputs.decoder_attentions] == [(3, 4, 6, 6)] * 2
    assert [tuple(a.shape) for a in outputs.cross_attentions] == [(3, 4, 6, length)] * 2
    assert [tuple(h.shape) for h in outputs.encoder_hidden_states] == [(3, length, 32)] * 3
    assert [tuple(h.shape) for h in outputs.decoder_hidden_states] == [(3, 6, 32)] * 3
    assert outputs.encoder_last_hidden_state.shape == (3, length, 32)


def test_last_of_hidden_states_is_the_state_before_a_fusion_of_the_output(build, batch):
    model = build()
    outputs = model.encoder(**batch, output_hidden_states=True)
    plain = model.encoder(**text_only(batch)).last_hidden_state
    is_before = model.encoder.fusion.place == ENCODER_OUTPUT
    assert torch.equal(outputs.hidden_states[-1], plain if is_before else outputs.last_hidden_state)
    assert not torch.equal(outputs.last_hidden_state[0, :9], plain[0])


def test_config_and_argument_return_equal_attentions(build, inputs):
    asked = build()(**inputs, output_attentions=True).fusion_attentions
    model = build(attn_implementation="eager")
    assert model(**inputs).fusion_attentions is None
    for config in (model.config, model.encoder.config, model.decoder.config):
        config.output_attentions = True
    found = model(**inputs).fusion_attentions
    if asked is None:
        assert found is None
    else:
        torch.testing.assert_close(found, asked, rtol=0, atol=1e-6)


def test_generate_returns_attentions_and_hidden_states(build, batch):
    model = build(attn_implementation="eager")
    kwargs = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    outputs = model.generate(**batch, **kwargs, output_scores=True, max_new_tokens=3)
    assert len(outputs.encoder_attentions) == 2 and len(outputs.cross_attentions) == len(outputs.scores)


@pytest.mark.parametrize("with_labels", [True, False])
def test_tuple_and_dict_outputs_are_equal(build, inputs, with_labels):
    model = build()
    if not with_labels:
        inputs["decoder_input_ids"] = inputs.pop("labels").clamp(min=0)
    kwargs = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    as_dict = model(**inputs, **kwargs)
    as_tuple = model(**inputs, **kwargs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dict.to_tuple())
    for ours, theirs in zip(as_tuple, as_dict.to_tuple(), strict=True):
        torch.testing.assert_close(ours, theirs)
    model.config.return_dict = False
    assert torch.equal(model(**inputs, **kwargs)[0], as_tuple[0])


def test_encoder_returns_tuple_and_dict(build, batch):
    encoder = build().get_encoder()
    as_dict, as_tuple = encoder(**batch), encoder(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], as_dict.last_hidden_state)


@pytest.mark.skipif(not T5ForConditionalGeneration._supports_sdpa, reason="this version's T5 has no SDPA")
def test_eager_and_sdpa_are_equal(build, inputs):
    eager, sdpa = (build(attn_implementation=name) for name in ("eager", "sdpa"))
    assert eager.encoder.config._attn_implementation == "eager" and sdpa.decoder.config._attn_implementation == "sdpa"
    eager, sdpa = eager(**inputs), sdpa(**inputs)
    torch.testing.assert_close(eager.logits, sdpa.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(eager.loss, sdpa.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(build, inputs, use_reentrant):
    plain, checkpointed = build().train(), build().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_gradient_checkpointing
    assert checkpointed.encoder.vision_tower.is_gradient_checkpointing
    if use_reentrant:
        checkpointed.enable_input_require_grads()
    losses = []
    for model in (plain, checkpointed):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_resizes_token_embeddings(build, inputs, tied):
    model = build(tie_word_embeddings=tied)
    before = model(**inputs).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model.lm_head.out_features == 70
    after = model(**inputs).logits
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., :64], before)
    assert (model.lm_head.weight is model.shared.weight) == tied
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    inputs["input_ids"] = inputs["input_ids"] + 9
    assert model(**inputs).loss.isfinite()


@pytest.mark.parametrize("tied", [True, False])
def test_saves_tied_and_untied_heads(build, inputs, tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = MMCoTForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (again.lm_head.weight is again.shared.weight) == tied
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_accepts_inputs_embeds(build, inputs):
    model = build()
    expected = model(**inputs).logits
    input_ids = inputs.pop("input_ids")
    embedded = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(**inputs, inputs_embeds=embedded).logits, expected)
    inputs.pop("labels")
    generated = model.generate(**inputs, inputs_embeds=embedded)
    assert torch.equal(generated, model.generate(**inputs, input_ids=input_ids))
    with pytest.raises(ValueError, match="specify .*input_ids or inputs_embeds"):
        model.encoder(**inputs)


def test_accepts_decoder_inputs_embeds(build, batch, labels):
    model = build()
    tokens = labels.clamp(min=0)
    expected = model(**batch, decoder_input_ids=tokens).logits
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(**batch, decoder_inputs_embeds=embedded).logits, expected)


@pytest.mark.parametrize("form", ["output", "base", "tuple"])
def test_accepts_encoder_outputs_in_every_form(build, batch, labels, form):
    """Forms without the encoder's own mask, which covers the tokens that the fusion added, need it as an argument."""
    model = build()
    encoder_outputs = model.encoder(**batch)
    mask = batch["attention_mask"] if encoder_outputs.attention_mask is None else encoder_outputs.attention_mask
    forms = {
        "output": encoder_outputs,
        "base": BaseModelOutput(last_hidden_state=encoder_outputs.last_hidden_state),
        "tuple": (encoder_outputs.last_hidden_state,),
    }
    model.encoder.forward = None  # a second call would fail
    given = model(encoder_outputs=forms[form], attention_mask=mask, labels=labels)
    del model.encoder.forward
    assert torch.equal(given.logits, model(**batch, labels=labels).logits)
    generated = model.generate(encoder_outputs=forms["base"], attention_mask=mask)
    assert torch.equal(generated, model.generate(**batch))


def test_continues_from_a_given_cache(build, batch):
    model = build()
    tokens = torch.randint(3, 60, (3, 6))
    whole = model(**batch, decoder_input_ids=tokens, use_cache=False).logits
    encoder_outputs = model.encoder(**batch)
    shared = {"encoder_outputs": encoder_outputs, "attention_mask": batch["attention_mask"], "use_cache": True}
    first = model(**shared, decoder_input_ids=tokens[:, :4])
    second = model(**shared, decoder_input_ids=tokens[:, 4:], cache=first[CACHE])
    assert second[CACHE].get_seq_length() == 6
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, rtol=0, atol=1e-5)


def test_decoder_attention_mask_hides_tokens(build, batch):
    model = build()
    tokens, mask = torch.randint(3, 60, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[:, 1] = 0
    other = tokens.clone()
    other[:, 1] = (other[:, 1] + 7) % 60
    hidden = [model(**batch, decoder_input_ids=t, decoder_attention_mask=mask).logits[:, 2:] for t in (tokens, other)]
    torch.testing.assert_close(*hidden)
    assert not torch.allclose(*(model(**batch, decoder_input_ids=t).logits[:, 2:] for t in (tokens, other)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_and_runs(build, inputs, dtype, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    half = MMCoTForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    fusion = {parameter.dtype for name, parameter in half.named_parameters() if ".fusion." in name}
    assert {half.dtype, half.encoder.vision_tower.dtype, *fusion} == {dtype}
    outputs = half(**inputs)
    assert outputs.logits.dtype == dtype and outputs.loss.isfinite()
    torch.testing.assert_close(outputs.logits.float(), model(**inputs).logits, rtol=0.1, atol=0.1)
    inputs.pop("labels")
    assert half.generate(**inputs, max_new_tokens=3).shape[0] == 3
    features = {**text_only(inputs), "vision_features": torch.randn(3, 4, 24)}
    assert half.encoder(**features).last_hidden_state.dtype == dtype, "float32 features are accepted too"


def test_pickle_and_copy_preserve_logits_and_tied_weights(build, inputs):
    model = build()
    expected = model(**inputs).logits
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(**inputs).logits, expected)
        assert again.lm_head.weight is again.shared.weight is not model.shared.weight


def example(batch, pictures):
    decoder_input_ids = torch.full((3, 5), 4)
    features = {"vision_features": torch.randn(3, 4, 24), "vision_mask": torch.tensor([[1] * 4, [1] * 4, [0] * 4])}
    pixels = {"pixel_values": batch["pixel_values"]}
    chosen = features if pictures == "features" else pixels
    return {**text_only(batch), **chosen, "decoder_input_ids": decoder_input_ids, "use_cache": False}


@pytest.mark.parametrize("pictures", ["features", "pixels"])
def test_exports_a_program(build, batch, pictures):
    """As with T5, without a cache; pixels need a picture in every row, because the data decides which rows have one."""
    model, inputs = build(), example(batch, pictures)
    program = torch.export.export(model, (), kwargs=inputs, strict=False)
    torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pictures", ["features", "pixels"])
def test_compiles_without_graph_breaks(build, batch, pictures):
    model, inputs = build(), example(batch, pictures)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiles_with_problems_without_picture(build, inputs):
    model = build()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_assisted_generation_equals_greedy_generation(build, batch):
    """The assistant is another model of this class, or prompt lookup."""
    model = build(initializer_factor=2.0)
    one = {name: tensor[:1] for name, tensor in batch.items()}
    expected = model.generate(**one, do_sample=False)
    assert torch.equal(model.generate(**one, do_sample=False, assistant_model=build(1)), expected)
    assert torch.equal(model.generate(**one, do_sample=False, prompt_lookup_num_tokens=2), expected)


def test_constrained_generation_writes_only_allowed_tokens(build, batch):
    allowed = [7, 11, 13]
    tokens = build().generate(**batch, prefix_allowed_tokens_fn=lambda *_: allowed, num_beams=2, max_new_tokens=5)
    assert set(tokens[:, 1:].flatten().tolist()) <= set(allowed)


def test_returns_several_beams_and_samples_per_problem(build, batch):
    model = build()
    beams = model.generate(**batch, num_beams=4, num_return_sequences=4)
    assert beams.shape[0] == 12 and len({tuple(tokens) for tokens in beams[:4].tolist()}) == 4
    torch.manual_seed(0)
    first = model.generate(**batch, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    assert first.shape[0] == 9 and torch.equal(model.generate(**batch, do_sample=True, num_return_sequences=3), first)


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}])
def test_generates_the_same_text_in_a_batch_and_alone(build, batch, generation):
    model = build(initializer_factor=2.0)
    together = model.generate(**batch, **generation)
    for index in range(3):
        alone = model.generate(**{name: tensor[index : index + 1] for name, tensor in batch.items()}, **generation)
        assert torch.equal(together[index, : alone.shape[1]], alone[0])


def test_fully_masked_pictures_and_texts_give_no_nan(build, inputs):
    model = build().train()
    inputs["attention_mask"][0] = 0
    inputs["pixel_mask"][:] = False
    outputs = model(**inputs)
    assert outputs.logits.isfinite().all()
    without = {name: tensor for name, tensor in inputs.items() if not name.startswith("pixel")}
    assert torch.equal(outputs.logits, model(**without).logits)
    inputs["pixel_mask"][0] = True
    loss = model(**inputs).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_forward_accepts_every_argument_of_t5(build):
    theirs = {
        "cache" if name == CACHE else name  # ours is "cache" in every version; the older name is accepted too
        for name in inspect.signature(T5ForConditionalGeneration.forward).parameters
    }
    through_kwargs = {"return_dict", "output_attentions", "output_hidden_states"}  # also T5's in newer versions
    assert theirs - through_kwargs <= set(inspect.signature(type(build()).forward).parameters)


@pytest.mark.parametrize(("version", "age"), [(0, "an older"), (2, "a newer")])
def test_refuses_a_model_of_another_format_version(version, age, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 1, "config.json contains the format version"
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": version}))
    with pytest.raises(ValueError, match=f"format_version is {version}: this model was saved by {age} mmcot"):
        MMCoTForConditionalGeneration.from_pretrained(tmp_path)
