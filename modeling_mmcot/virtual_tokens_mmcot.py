"""Prompt learning: virtual tokens before the source (prompt tuning) or in the decoder's attention (prefix tuning).

PEFT trains, saves and loads the virtual tokens, and inserts them into a full forward pass. Decoding here runs the
encoder once and shares its states, so this file inserts the same tokens into the encoder and the decoder separately.
"""

import torch
from torch import nn
from transformers import BatchFeature, EncoderDecoderCache

from .versions_mmcot import CACHE


class VirtualTokens:
    """
    The virtual tokens of the active adapter. A hook adds the prefix to the decoder whenever its cache is empty.

    Args:
        model (`PeftModelForSeq2SeqLM`):
            A model adapted by prompt or prefix tuning.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.has_prefix = model.active_peft_config.peft_type == "PREFIX_TUNING"
        if self.has_prefix:
            model.get_base_model().decoder.register_forward_pre_hook(self.add_prefix, with_kwargs=True)

    def before_source(self, inputs: BatchFeature) -> BatchFeature:
        """
        Insert the virtual tokens of prompt tuning before the source.

        Args:
            inputs (`BatchFeature`):
                Inputs with `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`.

        Returns:
            `BatchFeature`: For prompt tuning, inputs with `inputs_embeds` of shape
            `(batch_size, num_virtual_tokens + sequence_length, hidden_size)` in place of `input_ids`, and a mask of
            that length. For prefix tuning, the unchanged `inputs`.
        """
        if self.has_prefix:
            return inputs
        inputs = BatchFeature(inputs)
        embeds = self.model.get_base_model().get_input_embeddings()(inputs.pop("input_ids"))
        prompt = self.model.get_prompt(len(embeds)).to(embeds)
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask.new_ones(prompt.shape[:2]), mask], dim=1)
        inputs["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        return inputs

    def prefix(self, batch_size: int) -> EncoderDecoderCache | None:
        """Return the keys and values of prefix tuning before the decoder's own; the cross-attention has none."""
        return self.model.get_prompt(batch_size) if self.has_prefix else None

    def add_prefix(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Add the prefix to the decoder's empty cache, or pass it as the cache (a hook before `forward`)."""
        cache = kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            return None  # the cache already contains the prefix
        tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        prefix = self.prefix(len(tokens))
        if cache is None:
            return args, {**kwargs, CACHE: prefix}
        for number, layer in enumerate(prefix.self_attention_cache.layers):
            cache.self_attention_cache.update(layer.keys, layer.values, number)
        return None
