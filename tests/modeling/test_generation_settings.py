"""Each setting of `generate`: a stage writes the text of transformers' own decoding, or an error names the setting."""

import copy
import string

import pytest
import torch
from conftest import TINY_TEXT, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CompileConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    WatermarkingConfig,
)

from modeling_mmcot import MMCoTProcessor, MultimodalCoTPipeline
from modeling_mmcot.inference_mmcot import encode, generate_texts, run_stages
from modeling_mmcot.settings_mmcot import NOT_DECODING, OUTPUTS, SETTINGS, given_settings

PIECES = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits[:8]]
LENGTH = 12
COLUMNS = ["question", "choices"]
STAGES = [
    {"name": "rationale", "reads": COLUMNS, "writes": "rationale", "source": "{{ question }}", "target": ""},
    {
        **{"name": "answer", "reads": [*COLUMNS, "rationale"], "writes": "answer_text"},
        **{"source": "{{ question }} {{ rationale }}", "target": "{{ choices[answer] }}"},
    },
]
# For each setting, a value that is not its default, with the other settings that it needs to have an effect.
VALUES = {
    "max_length": {"max_length": 9},
    "max_new_tokens": {"max_new_tokens": 7},
    "min_length": {"min_length": 6, "eos_token_id": 6},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": 6},
    "early_stopping": {"num_beams": 3, "early_stopping": True, "eos_token_id": [1, 6, 24]},
    "max_time": {"max_time": 0.0},
    "stop_strings": {"stop_strings": ["cc", "uY"]},
    "do_sample": {"do_sample": True},
    "num_beams": {"num_beams": 3},
    "use_mtp": {"use_mtp": True},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "cache_config": {"cache_config": {"backend": "quanto"}},
    "max_cache_len": {"max_cache_len": 100},
    "temperature": {"do_sample": True, "temperature": 3.0},
    "top_k": {"do_sample": True, "top_k": 3},
    "top_p": {"do_sample": True, "top_p": 0.5},
    "min_p": {"do_sample": True, "min_p": 0.9},
    "top_h": {"do_sample": True, "top_h": 0.2},
    "typical_p": {"do_sample": True, "typical_p": 0.4},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.2},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "length_penalty": {"num_beams": 3, "length_penalty": -3.0, "eos_token_id": [1, 6, 24]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[6]]},
    "renormalize_logits": {"num_beams": 3, "repetition_penalty": 1.8, "renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0)},
    "suppress_tokens": {"suppress_tokens": [6]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [5, 19]},
    "sequence_bias": {"sequence_bias": [[[6], -20.0]]},
    "token_healing": {"token_healing": True},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=9.0)},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 2},
    "output_attentions": {"return_dict_in_generate": True, "output_attentions": True},
    "output_hidden_states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "output_scores": {"return_dict_in_generate": True, "output_scores": True},
    "output_logits": {"return_dict_in_generate": True, "output_logits": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "pad_token_id": {"pad_token_id": 5, "eos_token_id": 6},
    "bos_token_id": {"bos_token_id": 6},
    "eos_token_id": {"eos_token_id": [6, 24]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "decoder_start_token_id": {"decoder_start_token_id": 9},
    "is_assistant": {"is_assistant": True},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "max_matching_ngram_size": {"max_matching_ngram_size": 3},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "assistant_lookbehind": {"assistant_lookbehind": 3},
    "target_lookbehind": {"target_lookbehind": 3},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.3},
    "speculation_type": {"speculation_type": "dflash"},
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "continuous_batching_config": {"continuous_batching_config": {"block_size": 2}},
    "low_memory": {"low_memory": True},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "diversity_penalty": {"num_beams": 4, "diversity_penalty": 0.5},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2},
    "constraints": {"constraints": ["a constraint"]},
    "force_words_ids": {"num_beams": 3, "force_words_ids": [[5]]},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
}
NAMES = sorted(GenerationConfig().to_dict().keys() - NOT_DECODING)
# These change no text here, because they change the speed or the treatment of NaN.
WITHOUT_EFFECT_HERE = {"use_cache", "cache_implementation", "remove_invalid_values", "pad_token_id", "bos_token_id"}
WITHOUT_EFFECT_HERE |= {"renormalize_logits"}  # the order of the beams stays the same


@pytest.fixture(scope="module")
def processor():
    pieces = Tokenizer(models.BPE({piece: number for number, piece in enumerate(PIECES)}, [], unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return MMCoTProcessor(tokenizer, None, STAGES)


@pytest.fixture(scope="module")
def built():
    # Large weights, so that the texts differ, and each has more than one distinct token.
    model = tiny_model(vision_config=None, initializer_factor=3.0, seed=16)
    model.generation_config.max_new_tokens = LENGTH
    return model


@pytest.fixture
def model(built):
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    input_ids = torch.randint(3, 60, (4, 9))
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 5:], attention_mask[1, 5:] = 0, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def transformers_texts(model, processor, inputs, settings):
    """The texts of transformers' `generate` with the settings as its generation config."""
    own, given = copy.deepcopy(model.generation_config), copy.deepcopy(settings)
    if "max_length" in settings:
        # Because transformers prefers max_new_tokens to max_length, while mmcot prefers the setting of the call.
        model.generation_config.max_new_tokens = None
    torch.manual_seed(1)
    try:
        tokens = model.generate(**inputs, generation_config=GenerationConfig(**given), tokenizer=processor.tokenizer)
    finally:
        model.generation_config = own
    tokens = getattr(tokens, "sequences", tokens)
    return processor.batch_decode(tokens, skip_special_tokens=True)


def mmcot_texts(model, processor, inputs, settings):
    torch.manual_seed(1)
    return generate_texts(model, processor, encode(model, inputs), **given_settings(copy.deepcopy(settings)))[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_gives_the_text_of_transformers_or_is_refused(name, model, processor, inputs):
    settings = VALUES[name]
    if name not in SETTINGS:
        with pytest.raises(ValueError, match=rf"\b(?:{'|'.join(settings)}) is .*which a stage does not support: \w+"):
            mmcot_texts(model, processor, inputs, settings)
        with pytest.raises(ValueError, match=rf"^{name} is "):
            given_settings({name: settings[name]})
        return
    expected = transformers_texts(model, processor, inputs, settings)
    assert mmcot_texts(model, processor, inputs, settings) == expected
    if name not in WITHOUT_EFFECT_HERE:
        others = {key: value for key, value in settings.items() if key != name}
        assert expected != transformers_texts(model, processor, inputs, others), "the value has no effect"


@pytest.mark.parametrize("name", NAMES)
def test_setting_in_generation_config_file_acts_like_a_keyword(name, model, processor, inputs, tmp_path):
    """With `generation_config.json`, the text equals transformers' text, or an error comes before the encoder runs."""
    settings = VALUES[name]
    expected = None if name not in SETTINGS else transformers_texts(model, processor, inputs, settings)
    file = copy.deepcopy(model.generation_config)
    file.update(**copy.deepcopy(settings))
    if name == "max_length":
        file.max_new_tokens = None
    try:
        file.save_pretrained(tmp_path)
        model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    except (TypeError, ValueError):  # because transformers refuses to save or load this setting
        model.generation_config = file
    if getattr(model.generation_config, name) is None:
        return  # because transformers does not save this setting
    calls = []
    model.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    models_of_stages = {stage["name"]: model for stage in STAGES}
    if name in SETTINGS:
        assert mmcot_texts(model, processor, inputs, {}) == expected
    elif name in OUTPUTS:
        assert mmcot_texts(model, processor, inputs, {}) == transformers_texts(model, processor, inputs, {})
    else:
        with pytest.raises(ValueError, match=rf"generation_config.json.*(?:{'|'.join(settings)}) is "):
            run_stages(models_of_stages, processor, [{"question": "ab", "choices": ["a", "b"]}], [None])
        with pytest.raises(ValueError, match=rf"generation_config.json.*(?:{'|'.join(settings)}) is "):
            MultimodalCoTPipeline(model=model, processor=MMCoTProcessor(processor.tokenizer, None, STAGES[1:]))
        assert not calls


@pytest.mark.parametrize("name", sorted(VALUES.keys() & set(NAMES)))
def test_generate_without_picture_equals_t5(name, model, processor, inputs):
    """`AutoModel….generate` without a picture: a setting has the same effect, or the same error, as with a plain T5."""
    plain = T5ForConditionalGeneration(T5Config(**TINY_TEXT)).eval()
    plain.load_state_dict(model.state_dict())
    plain.generation_config = copy.deepcopy(model.generation_config)

    def outcome(one):
        torch.manual_seed(1)
        config = GenerationConfig(**copy.deepcopy(VALUES[name]))
        try:
            result = one.generate(**inputs, generation_config=config, tokenizer=processor.tokenizer)
        except Exception as error:
            return type(error), str(error).replace(type(one).__name__, "")
        return (result if torch.is_tensor(result) else result.sequences).tolist()

    assert outcome(model) == outcome(plain)


def test_accepts_a_generation_config(processor):
    settings = given_settings({"generation_config": GenerationConfig(num_beams=3, no_repeat_ngram_size=2)})
    assert settings == {"num_beams": 3, "no_repeat_ngram_size": 2}
    with pytest.raises(ValueError, match="num_beams given twice"):
        given_settings({"generation_config": GenerationConfig(num_beams=3), "num_beams": 2})
    with pytest.raises(ValueError, match="num_beam_groups is 2"):
        given_settings({"generation_config": GenerationConfig(num_beam_groups=2)})


def test_accepts_a_watermark_as_a_dict(model, processor, inputs):
    settings = [{"watermarking_config": form} for form in (WatermarkingConfig(bias=9.0), {"bias": 9.0})]
    texts = [mmcot_texts(model, processor, inputs, setting) for setting in settings]
    assert texts[0] == texts[1] == transformers_texts(model, processor, inputs, settings[0])


def test_ends_texts_without_a_pad_token(model, processor, inputs):
    model.generation_config.update(pad_token_id=None, eos_token_id=[6, 24])
    assert mmcot_texts(model, processor, inputs, {}) == transformers_texts(model, processor, inputs, {})
    model.generation_config.update(pad_token_id=None, eos_token_id=None)
    assert mmcot_texts(model, processor, inputs, {}) == transformers_texts(model, processor, inputs, {})


def test_refuses_stop_strings_with_an_unsupported_tokenizer(model, inputs):
    words = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(PIECES)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ValueError, match="stop_strings is .*cannot match strings to the tokens of this tokenizer"):
        mmcot_texts(model, MMCoTProcessor(tokenizer, None, STAGES), inputs, {"stop_strings": ["ab"]})
