"""Which settings of `generate` the stages take: those with which a text is the one of transformers' own decoding.

Every other setting is refused by its name before anything is computed, whether a call gives it or a model's
`generation_config.json` holds it. This file imports no other shipped file.
"""

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

# Each was compared with transformers' own decoding (tests/modeling/test_generation_settings.py). A setting that a later
# version of transformers adds is refused until it is compared too.
SETTINGS = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "early_stopping"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("num_beams", "length_penalty", "use_cache", "cache_implementation"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "renormalize_logits"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values"),
    *("watermarking_config", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
}
# What `generate` returns beside the tokens: refused in a call, of no effect on a text in a model's file.
OUTPUTS = {
    *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}
# Not settings, but fields of the class.
NOT_DECODING = {"transformers_version", "_from_model_config"}
# Values besides None and False that switch a refused setting off, as older versions of transformers write them.
OFF = {
    **{"num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": 0},
    **{"guidance_scale": 1, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant"},
    **{"assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10, "target_lookbehind": 10},
}
REASONS = {
    "num_return_sequences": "a problem has one rationale here; num_rationales=N draws several.",
    **dict.fromkeys(OUTPUTS, "texts are returned here; call `generate` of a stage's model."),
    **dict.fromkeys(
        ("low_memory", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints"),
        "transformers runs code of the Hub for it.",
    ),
    "force_words_ids": "transformers runs code of the Hub for it.",
    **dict.fromkeys(("guidance_scale", "token_healing", "prefill_chunk_size"), "it is for models without an encoder."),
}


def given_settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """
    The settings of a call: its keywords, and those that are set in its `generation_config` where it has one.

    Raises:
        TypeError: a name that no setting of `generate` has.
        ValueError: a setting is given twice, or is refused (`check_settings`).
    """
    generation = dict(generation)
    config = generation.pop("generation_config", None)
    if config is not None:
        inside = {name: value for name, value in config.to_dict().items() if value is not None}
        inside = {name: value for name, value in inside.items() if name not in NOT_DECODING}
        if twice := inside.keys() & generation.keys():
            raise ValueError(f"{', '.join(sorted(twice))} given twice: by itself and in generation_config.")
        generation |= inside
    known = GenerationConfig().to_dict().keys() - NOT_DECODING
    for name in generation.keys() - known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "expected a setting of `generate`."
        raise TypeError(f"unexpected keyword {name!r}: {hint} (Arguments of from_pretrained go in model_kwargs={{…}}.)")
    check_settings(generation)
    return generation


def check_settings(settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a setting of `generate` is on that the stages do not take; it is named, with the reason.
    """
    known = GenerationConfig().to_dict().keys() - NOT_DECODING
    for name, value in settings.items():
        is_off = value is None or value is False or value == OFF.get(name)
        if name in known - SETTINGS and not is_off:
            reason = REASONS.get(name, "a batch of problems is decoded by one model, without it.")
            raise ValueError(f"{name} is {value!r:.80}, which a stage does not take: {reason}")


def check_own_settings(config: GenerationConfig, where: str) -> None:
    """
    Args:
        config: the generation config of a stage's model.
        where: what it was read from, for the error.

    Raises:
        ValueError: it holds a setting that the stages do not take.
    """
    try:
        check_settings({name: value for name, value in config.to_dict().items() if name not in OUTPUTS})
    except ValueError as error:
        raise ValueError(f"{where} (generation_config.json): {error} Take it out of the file.") from None


def decoding_config(own: GenerationConfig, settings: Mapping[str, Any]) -> GenerationConfig:
    """
    A model's own generation config with the settings of a call in place of its own; it returns tokens only.

    Raises:
        ValueError: a setting is refused.
    """
    check_own_settings(own, "The model's own settings")
    check_settings(settings)
    config = copy.deepcopy(own)
    config.update(**dict.fromkeys(OUTPUTS, False))  # `generate` takes the model's own for None
    # As `GenerationConfig` reads them: a watermark, for one, comes as a dict too.
    read = GenerationConfig(**settings)
    config.update(**{name: getattr(read, name) for name in settings})
    if settings.get("max_length") is not None and settings.get("max_new_tokens") is None:
        # transformers prefers the stage's `max_new_tokens`; the start token counts in `max_length`.
        config.max_new_tokens = config.max_length - 1
    return config
