"""The settings of `generate` that the stages support: those that yield the same text as transformers' own decoding.

Every other setting raises an error that names it, before anything is computed, both in a call and in a model's
`generation_config.json`. This file imports no other shipped file.
"""

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

# Supported settings. Each was compared with transformers' own decoding (tests/modeling/test_generation_settings.py). A
# setting that a later version of transformers adds is rejected until it has been compared too.
SETTINGS = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "early_stopping"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("num_beams", "length_penalty", "use_cache", "cache_implementation"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "renormalize_logits"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values"),
    *("watermarking_config", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
}
# Settings that request other outputs of `generate` than tokens. They are rejected in a call. In a model's file they are
# ignored, because they have no effect on texts.
OUTPUTS = {
    *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}
# Fields of `GenerationConfig` that are not settings.
NOT_DECODING = {"transformers_version", "_from_model_config"}
# Values besides None and False that disable a rejected setting, as saved by older versions of transformers.
OFF = {
    **{"num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": 0},
    **{"guidance_scale": 1, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant"},
    **{"assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10, "target_lookbehind": 10},
}
REASONS = {
    "num_return_sequences": "a problem has one rationale here; num_rationales=N samples several.",
    **dict.fromkeys(OUTPUTS, "only texts are returned here; call `generate` of a stage's model."),
    **dict.fromkeys(
        ("low_memory", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints"),
        "transformers runs code of the Hub for it.",
    ),
    "force_words_ids": "transformers runs code of the Hub for it.",
    **dict.fromkeys(("guidance_scale", "token_healing", "prefill_chunk_size"), "it requires a decoder-only model."),
}


def given_settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the settings of a call: its keywords, and the values set in its `generation_config`, if there is one.

    Raises:
        TypeError: If a name is not a setting of `generate`.
        ValueError: If a setting is given twice, or is rejected (`check_settings`).
    """
    generation = dict(generation)
    config = generation.pop("generation_config", None)
    if config is not None:
        configured = {name: value for name, value in config.to_dict().items() if value is not None}
        configured = {name: value for name, value in configured.items() if name not in NOT_DECODING}
        if twice := configured.keys() & generation.keys():
            raise ValueError(f"{', '.join(sorted(twice))} given twice: as a keyword and in generation_config.")
        generation |= configured
    known = GenerationConfig().to_dict().keys() - NOT_DECODING
    for name in generation.keys() - known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "expected a setting of `generate`."
        raise TypeError(f"unexpected keyword {name!r}: {hint} (Arguments of from_pretrained: model_kwargs={{…}}.)")
    check_settings(generation)
    return generation


def check_settings(settings: Mapping[str, Any]) -> None:
    """
    Check that the stages support all settings of `generate` that are enabled.

    Raises:
        ValueError: If a setting is not supported; the message contains its name and the reason.
    """
    known = GenerationConfig().to_dict().keys() - NOT_DECODING
    for name, value in settings.items():
        is_off = value is None or value is False or value == OFF.get(name)
        if name in known - SETTINGS and not is_off:
            reason = REASONS.get(name, "a stage decodes a batch of problems with one model, without this setting.")
            raise ValueError(f"{name} is {value!r:.80}, which a stage does not support: {reason}")


def check_own_settings(config: GenerationConfig, where: str) -> None:
    """
    Check the generation config of a stage's model.

    Args:
        config (`GenerationConfig`):
            The generation config.
        where (`str`):
            The folder or repository it was read from, for the error message.

    Raises:
        ValueError: If it contains a setting that the stages do not support.
    """
    try:
        check_settings({name: value for name, value in config.to_dict().items() if name not in OUTPUTS})
    except ValueError as error:
        raise ValueError(f"{where} (generation_config.json): {error} Remove it from the file.") from None


def decoding_config(own: GenerationConfig, settings: Mapping[str, Any]) -> GenerationConfig:
    """
    Return a copy of a model's generation config that is updated with the settings of a call and returns only tokens.

    Raises:
        ValueError: If a setting is rejected.
    """
    check_own_settings(own, "The model's own settings")
    check_settings(settings)
    config = copy.deepcopy(own)
    config.update(**dict.fromkeys(OUTPUTS, False))  # for None, `generate` would use the model's own value
    # `GenerationConfig` converts values, for example the dict of a watermark.
    converted = GenerationConfig(**settings)
    config.update(**{name: getattr(converted, name) for name in settings})
    if settings.get("max_length") is not None and settings.get("max_new_tokens") is None:
        # Otherwise the stage's own `max_new_tokens` would take precedence. `max_length` includes the start token.
        config.max_new_tokens = config.max_length - 1
    return config
