"""Prompt learning: virtual tokens before the source (prompt tuning) or in the decoder's attention (prefix tuning).

PEFT trains, saves and loads them, and puts them into a whole forward pass. Here is what decoding needs that reads the
source once and shares the encoder's states: the same tokens for the encoder alone and for the decoder alone.
"""

import torch
from torch import nn
from transformers import BatchFeature, EncoderDecoderCache

from .versions_mmcot import CACHE


class VirtualTokens:
    """
    Those of the active adapter, for its base. The decoder gets a prefix by itself, whenever its cache is empty.

    Args:
        model (`PeftModelForSeq2SeqLM`): adapted by prompt or prefix tuning.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.has_prefix = model.active_peft_config.peft_type == "PREFIX_TUNING"
        if self.has_prefix:
            model.get_base_model().decoder.register_forward_pre_hook(self.put_prefix, with_kwargs=True)

    def before_source(self, inputs: BatchFeature) -> BatchFeature:
        """
        Args:
            inputs (`BatchFeature`): with `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`.

        Returns:
            Of prompt tuning, with `inputs_embeds` of shape
            `(batch_size, num_virtual_tokens + sequence_length, hidden_size)` in place of `input_ids`, and a mask of
            that length; of prefix tuning `inputs` as they are.
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
        """Of prefix tuning, the keys and values that stand before the decoder's own; nothing of its cross-attention."""
        return self.model.get_prompt(batch_size) if self.has_prefix else None

    def put_prefix(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        cache = kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            return None  # it is there
        tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        prefix = self.prefix(len(tokens))
        if cache is None:
            return args, {**kwargs, CACHE: prefix}
        for number, layer in enumerate(prefix.self_attention_cache.layers):
            cache.self_attention_cache.update(layer.keys, layer.values, number)
        return None
