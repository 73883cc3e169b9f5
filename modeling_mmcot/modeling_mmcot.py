"""The model: a T5 whose encoder ends with a look at the picture. Everything else is T5, inherited.

Notable:
- the picture is seen once per problem: the encoder returns states that are fused already, so `generate`, its cache,
  beams and the scoring of choices need nothing of their own;
- T5's parameters keep T5's names; ours are `encoder.fusion` and `encoder.vision_tower`;
- a row without picture is T5, to the bit;
- an output head that its checkpoint left untied (T5 v1.1, FLAN-T5) stays untied.
"""

import math

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel, T5ForConditionalGeneration
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.utils import can_return_tuple

from .configuration_mmcot import MMCoTConfig
from .fusion_mmcot import FUSIONS, build_fusion
from .vision_mmcot import build_vision_tower, encode_pictures, without_pooler


class InitializedAsT5:
    """Fresh weights for both classes below: T5's for its parts, and for ours such that states keep their size."""

    @classmethod
    def is_custom_code(cls) -> bool:
        # True would make transformers 5.23 skip `_init_weights` of every module without parameters of its own (T5's
        # attention, its feed-forward, the fusion): they would start with a deviation of 1.0. It guards against remote
        # code that fills tensors without transformers' init functions, and this code uses no others.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, tuple(FUSIONS.values())):
            new_layers = list(module.children())
        elif isinstance(module, MMCoTForConditionalGeneration) and not self.config.scale_decoder_outputs:
            new_layers = [module.lm_head]
        else:
            new_layers = []
        for layer in new_layers:
            init.normal_(layer.weight, std=self.config.initializer_factor * layer.in_features**-0.5)


class MMCoTEncoder(InitializedAsT5, T5Stack):
    """T5's encoder, then the fusion with the picture."""

    config_class = MMCoTConfig

    def __init__(self, config: MMCoTConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config.vision_config) if config.vision_config is not None else None
        self.fusion = None
        if config.vision_hidden_size is not None:
            self.fusion = build_fusion(config.fusion, config.d_model, config.vision_hidden_size)
        self.freeze_vision()
        self.post_init()

    def freeze_vision(self) -> None:
        """Stop the tower's gradient, where the configuration says so."""
        if self.vision_tower is not None and self.config.freeze_vision:
            self.vision_tower.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "MMCoTEncoder":
        super().train(mode)
        self.freeze_vision()
        return self

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """The arguments of `MMCoTForConditionalGeneration.forward`; `last_hidden_state` is fused."""
        outputs = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        patches, mask = self.picture_patches(pixel_values, pixel_mask, vision_features, vision_mask)
        if patches is not None:
            outputs["last_hidden_state"] = self.fusion(outputs.last_hidden_state, patches, mask)
        return outputs

    def picture_patches(
        self,
        pixel_values: torch.FloatTensor | None,
        pixel_mask: torch.Tensor | None,
        vision_features: torch.FloatTensor | None,
        vision_mask: torch.Tensor | None,
    ) -> tuple[torch.FloatTensor | None, torch.BoolTensor | None]:
        """Patches `(batch_size, num_patches, vision_hidden_size)` and their mask; None, None without any picture."""
        if pixel_values is not None and vision_features is not None:
            raise ValueError("pixel_values and vision_features were both given: a picture comes as one or the other.")
        if pixel_values is not None:
            if self.vision_tower is None:
                raise ValueError(
                    "pixel_values were given, but this model has no picture tower (config.vision_config is None): "
                    "pass vision_features, or build the model with from_text_vision_pretrained."
                )
            vision_features, picture_mask = encode_pictures(self.vision_tower, pixel_values, pixel_mask)
            if vision_features is not None and vision_mask is not None:
                picture_mask = picture_mask & vision_mask.bool()
            vision_mask = picture_mask
        if vision_features is None:
            return None, None
        if self.fusion is None:
            raise ValueError("vision_features were given, but config.vision_hidden_size is None: there is no fusion.")
        if vision_features.shape[-1] != self.config.vision_hidden_size:
            raise ValueError(
                f"vision_features are {vision_features.shape[-1]} wide, "
                f"but config.vision_hidden_size is {self.config.vision_hidden_size}."
            )
        if vision_mask is None:
            vision_mask = torch.ones(vision_features.shape[:2], dtype=torch.bool, device=vision_features.device)
        return vision_features, vision_mask.bool()


class MMCoTForConditionalGeneration(InitializedAsT5, T5ForConditionalGeneration):
    """Multimodal chain-of-thought (Zhang et al. 2023): T5 with a picture, one stage at a time."""

    config_class = MMCoTConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["T5Block"]

    def __init__(self, config: MMCoTConfig):
        super().__init__(config)
        self.encoder = MMCoTEncoder(self.encoder.config)
        if config.vision_config is not None:
            # transformers notes a part's dtype when it loads it; noted from the start, a saved model saves alike again.
            config.vision_config.dtype = self.encoder.vision_tower.dtype
        self.post_init()

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        # T5Config forces `tie_word_embeddings`; what still tells an untied head is that its outputs are not scaled.
        tied = dict(T5ForConditionalGeneration._tied_weights_keys)
        if not self.config.scale_decoder_outputs:
            del tied["lm_head.weight"]
        return tied

    @classmethod
    def from_text_vision_pretrained(
        cls, text_model: str, vision_model: str, fusion: str = "gated", freeze_vision: bool = False, **kwargs
    ) -> "MMCoTForConditionalGeneration":
        """
        Join a pre-trained T5 and a pre-trained picture tower; only the fusion is new.

        Args:
            text_model (`str`): a T5 checkpoint (folder or Hub id).
            vision_model (`str`): a checkpoint that `AutoModel` loads as the tower.
            fusion (`str`), freeze_vision (`bool`): fields of [`MMCoTConfig`].
            kwargs: passed to `from_pretrained` of the text model.
        """
        tower = without_pooler(AutoModel.from_pretrained(vision_model))
        model = cls.from_pretrained(
            text_model,
            fusion=fusion,
            freeze_vision=freeze_vision,
            vision_hidden_size=tower.config.hidden_size,
            **kwargs,
        )
        model.attach_tower(tower)
        return model

    def attach_tower(self, tower: PreTrainedModel) -> None:
        """Give the model a picture tower whose patches are `config.vision_hidden_size` wide."""
        self.encoder.vision_tower = tower.to(self.device, self.dtype)
        for config in (self.config, self.encoder.config):
            config.vision_config = tower.config
        self.encoder.train(self.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        r"""
        T5's own arguments, and the picture's. Pictures come as `pixel_values` or as `vision_features`, not both.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_images, 3, height, width)`, *optional*):
                Pictures for the tower; one picture each may come as `(batch_size, 3, height, width)`.
            pixel_mask (`torch.Tensor` of shape `(batch_size, num_images, height, width)`, *optional*):
                1 for a real pixel; all zero where there is no picture.
            vision_features (`torch.FloatTensor` of shape `(batch_size, num_patches, vision_hidden_size)`, *optional*):
                Patches that were computed before.
            vision_mask (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*):
                1 for a real patch; a row of zeros is a problem without picture, which plain T5 answers.
            encoder_outputs (`BaseModelOutput`, *optional*):
                States of this model's encoder, fused already.
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Target tokens; -100 is ignored.
            num_items_in_batch (`int`, *optional*):
                Target tokens of the whole optimisation step, over all its batches and processes: the summed loss is
                divided by it. Without it the loss is the mean over this batch. (T5's own forward ignores it.)
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                pixel_mask=pixel_mask,
                vision_features=vision_features,
                vision_mask=vision_mask,
                **kwargs,
            )
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        outputs = super().forward(
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_outputs=encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        if labels is None:
            return outputs
        return Seq2SeqLMOutput(loss=token_loss(outputs.logits, labels, num_items_in_batch), **outputs)

    @torch.no_grad()
    def score_choices(
        self, choice_labels: torch.LongTensor, attention_mask: torch.Tensor, **encoder_inputs
    ) -> torch.FloatTensor:
        """
        The log-probability of each choice's target text, given the source (and the picture).

        Args:
            choice_labels (`torch.LongTensor` of shape `(batch_size, num_choices, target_length)`):
                Each choice's target, padded with -100. A problem with fewer choices has rows of -100 only.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`)
            encoder_inputs: the other inputs of `forward` that the encoder reads.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_choices)`; `-inf` where there is no choice.
        """
        num_choices = choice_labels.shape[1]
        encoder_outputs = self.encoder(attention_mask=attention_mask, **encoder_inputs)
        states = encoder_outputs.last_hidden_state.repeat_interleave(num_choices, dim=0)
        labels = choice_labels.flatten(0, 1)
        logits = self(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=attention_mask.repeat_interleave(num_choices, dim=0),
            decoder_input_ids=self._shift_right(labels),
            use_cache=False,
            return_dict=True,
        ).logits
        is_target = labels != -100
        token_log_probs = logits.float().log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        log_probs = (token_log_probs * is_target).sum(dim=-1)
        return log_probs.masked_fill(~is_target.any(dim=-1), -math.inf).view(-1, num_choices)


def token_loss(
    logits: torch.FloatTensor, labels: torch.LongTensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.FloatTensor:
    """Cross-entropy over the real target tokens: their mean, or their sum over `num_items_in_batch`."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    labels = labels.to(logits.device)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


MMCoTForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
