"""The model: a T5 with a fusion of text and picture in its encoder. Everything else is inherited from T5.

Notable:
- each picture is encoded once per problem: the encoder returns fused states, so that `generate`, its cache, beam search
  and the scoring of choices need no changes;
- T5's parameters keep T5's names; the new ones are in modules named `fusion` and in `encoder.vision_tower`;
- a row without picture is computed as in T5, bit for bit, with three exceptions: `zeros_for_missing_pictures`, for
  converted checkpoints; the rounding of FLAN-T5's activation, which is computed in one operation; and the rounding of
  sums over masked tokens, if patches are tokens of other rows of the batch (`TokenFusion`);
- an output head that is untied in its checkpoint (T5 v1.1, FLAN-T5) stays untied.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .versions_mmcot import check_versions  # noqa: F401  # isort: skip (it must run before the imports below)

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel, T5ForConditionalGeneration
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from .configuration_mmcot import MMCoTConfig
from .encoder_mmcot import FusedBlock, InitializedAsT5, MMCoTEncoder, TokenBlock, check_width
from .fusion_mmcot import FUSIONS
from .generation_mmcot import PackedChoices, pack_choices, source_mask
from .layers_mmcot import use_fast_layers
from .loading_mmcot import (
    FILE_OPTIONS,
    HUB_OPTIONS,
    PLACEMENT_OPTIONS,
    LoadingOptions,
    check_fusion,
    quantization_of_text,
)
from .versions_mmcot import CACHE, takes_cache_by_either_name
from .virtual_tokens_mmcot import VirtualTokens
from .vision_mmcot import find_tower, load_vision_tower, tower_name, tower_width

# Maximum length of a packed pass, in tokens of all choices of a problem. The cost of its attention grows with the
# square of this length. Up to this limit, a packed pass is faster than one pass per choice, both for few long and for
# many short choices (benchmarks/README.md).
MAX_PACKED_LENGTH = 256


@dataclass
class MMCoTSeq2SeqLMOutput(Seq2SeqLMOutput):
    """
    Output of [`MMCoTForConditionalGeneration`]: the fields of T5's [`~modeling_outputs.Seq2SeqLMOutput`], and the field
    below.

    Args:
        fusion_attentions (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_patches)`, *optional*):
            As in [`MMCoTEncoderOutput`].
    """

    fusion_attentions: torch.FloatTensor | None = None


class DamagedWeights(OSError, ValueError):
    """A damaged file of weights: an `OSError`, as transformers raises for it, and a `ValueError`."""


# GenerationMixin is listed, because `generate` is overridden: otherwise Auto classes add it, in a new class per load.
class MMCoTForConditionalGeneration(InitializedAsT5, T5ForConditionalGeneration, GenerationMixin):
    r"""
    Multimodal chain-of-thought (Zhang et al. 2023, arXiv 2302.00923): T5 with a picture, for one stage at a time.

    All features of T5 are supported: `generate` with cache and beam search, resizing of embeddings, saving, PEFT.
    Without a picture, the outputs are those of T5, bit for bit.

    Args:
        config ([`MMCoTConfig`]):
            The model's configuration.

    Example:

    ```python
    >>> import torch
    >>> from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration

    >>> config = MMCoTConfig(
    ...     vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
    ...     fusion="gated_mha", vision_hidden_size=256,
    ... )
    >>> model = MMCoTForConditionalGeneration(config).eval()
    >>> text = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "attention_mask": torch.ones(1, 4)}

    >>> # one picture as DETR sees it: 100 patches, 256 wide
    >>> vision_features = torch.randn(1, 100, 256)
    >>> model.generate(**text, vision_features=vision_features, max_new_tokens=4, min_new_tokens=4).shape
    torch.Size([1, 5])

    ```
    """

    config_class = MMCoTConfig
    input_modalities = ("image", "text")
    _no_split_modules = [
        "T5Block",
        FusedBlock.__name__,
        TokenBlock.__name__,
        *(fusion.__name__ for fusion in FUSIONS.values()),
    ]
    stages: Mapping[str, PreTrainedModel] | None = None  # all stages of the repository, loaded for the first chat
    virtual_tokens: VirtualTokens | None = None  # of the active adapter, for adapters by prompt learning

    def __init__(self, config: MMCoTConfig):
        super().__init__(config)
        self.loading_options = LoadingOptions()
        self.encoder = MMCoTEncoder(self.encoder.config)
        use_fast_layers(self.decoder)
        if config.vision_config is not None:
            # transformers sets a sub-config's dtype on loading. Setting it here keeps config.json the same when a model
            # is saved, loaded and saved again.
            config.vision_config.dtype = self.encoder.vision_tower.dtype
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and not self.config.scale_decoder_outputs:
            head = self.lm_head.weight
            init.normal_(head, std=self.config.initializer_factor * head.shape[1] ** -0.5)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        # T5Config always sets `tie_word_embeddings`; only unscaled outputs still indicate an untied head.
        tied = dict(T5ForConditionalGeneration._tied_weights_keys)
        is_tied = self.config.scale_decoder_outputs if self.config.tied_head is None else self.config.tied_head
        if not is_tied:
            del tied["lm_head.weight"]
        return tied

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        # An unscaled T5 with a tied head is saved without head: if the file lacks the head, it must be tied.
        lacks_head = missing_keys and "lm_head.weight" in missing_keys and "shared.weight" not in missing_keys
        if lacks_head and self.config.tied_head is None and not self.config.scale_decoder_outputs:
            self.config.tied_head = True
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args, **kwargs):
        """
        Load a model as [`~PreTrainedModel.from_pretrained`] does, with these differences:

        - only the text model's linear layers are quantized, unless the quantization config lists the modules to skip;
        - with `replace_fusion=True`, the fusion of the checkpoint may be replaced by another one, with new weights;
        - a stage in a subfolder gets the generation config in that subfolder;
        - the model remembers (in memory only) the arguments it was loaded with, to load the other stages with them.

        Raises:
            ValueError: If the checkpoint lacks a weight other than the fusion's, or its file is damaged, or it has
                another fusion than `fusion` and `fusion_options` describe.
        """
        returns_info = kwargs.pop("output_loading_info", False)
        replaces_fusion = kwargs.pop("replace_fusion", False)
        if replaces_fusion:
            kwargs["ignore_mismatched_sizes"] = True  # `check_fusion` refuses those of other weights
            kwargs.setdefault("fusion_options", None)  # not those of the fusion before
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = quantization_of_text(kwargs["quantization_config"])
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            where = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "model.safetensors")
            raise DamagedWeights(
                f"{where} (or a part of it) is damaged: {error}. Download it again (force_download=True)."
            ) from error
        missing = sorted(name for name in info["missing_keys"] if ".fusion." not in name)
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights, for example {missing[0]}, which would "
                f"be random: only the fusion may be new."
            )
        check_fusion(model, info, pretrained_model_name_or_path, kwargs, replaces_fusion)
        model.loading_options = LoadingOptions(
            {
                name: kwargs[name]
                for name in (*HUB_OPTIONS, *PLACEMENT_OPTIONS, *FILE_OPTIONS, "subfolder")
                if kwargs.get(name) is not None
            }
        )
        folder = os.path.join(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        is_given = kwargs.get("generation_config") is not None
        if not is_given and os.path.isfile(os.path.join(folder, "generation_config.json")):
            # transformers loses the subfolder of an absolute path, and would read the root's generation config.
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return (model, info) if returns_info else model

    @classmethod
    def from_text_vision_pretrained(
        cls, text_model: str, vision_model: str, vision_tower: str | None = None, **kwargs
    ) -> "MMCoTForConditionalGeneration":
        """
        Build a model from a pre-trained T5 and a pre-trained picture tower; only the fusion is new.

        Args:
            text_model (`str`):
                A T5 checkpoint (folder or Hub id).
            vision_model (`str`):
                A checkpoint that `AutoModel` loads as the tower, or a name in `vision_mmcot.TOWERS`.
            vision_tower (`str`, *optional*):
                A name in `vision_mmcot.TOWERS`, which defines the conversion of the tower's output to patches.
            kwargs:
                Passed to `from_pretrained` of the text model; may include fields of [`MMCoTConfig`].
        """
        tower = load_vision_tower(vision_model)
        model = cls.from_pretrained(text_model, vision_hidden_size=tower_width(tower), **kwargs)
        model.attach_tower(tower, tower_name(vision_model, vision_tower))
        return model

    def generate(self, *args, problems: Any = None, **kwargs):
        """
        Generate as [`~GenerationMixin.generate`] does. With `problems`, from `processor.apply_chat_template`, all
        stages of the model's repository answer the chats, and the output is `input_ids` followed by the replies
        (`inference_mmcot.reply`).
        """
        if problems is None:
            return super().generate(*args, **kwargs)
        from .inference_mmcot import reply

        return reply(problems, self, *args, **kwargs)

    def attach_tower(self, tower: PreTrainedModel, name: str | None = None) -> None:
        """
        Give the model a picture tower whose patches are `config.vision_hidden_size` wide.

        Args:
            tower (`PreTrainedModel`):
                The tower, from `vision_mmcot.load_vision_tower`.
            name (`str`, *optional*):
                Its name in `vision_mmcot.TOWERS`.

        Raises:
            ValueError: If the tower has another width, or does not match the name, or the model has no fusion.
        """
        if self.encoder.fusion is None:
            raise ValueError(f"The model reads text only (fusion is {self.config.fusion!r}), so a tower has no use.")
        check_width(tower, self.config.vision_hidden_size)
        find_tower(tower.config, name)
        self.encoder.vision_tower = tower.to(self.device, self.dtype)
        for config in (self.config, self.encoder.config):
            config.vision_config, config.vision_tower = tower.config, name
        self.encoder.train(self.training)

    @can_return_tuple
    @takes_cache_by_either_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.BoolTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool = False,
        smoothing: float = 0.0,
        **kwargs,
    ) -> MMCoTSeq2SeqLMOutput:
        r"""
        Run the model with T5's arguments and a picture, given as `pixel_values` or as `vision_features`, not both.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The tokens of the source, padded on the right or on the left.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for a real token.
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_images, 3, height, width)`, *optional*):
                Pictures for the tower, at most `config.max_images` per problem; their patches are concatenated in this
                order. The shape `(batch_size, 3, height, width)`, with one picture per problem, is also accepted.
            pixel_mask (`torch.Tensor` of shape `(batch_size, num_images, height, width)`, *optional*):
                1 for a real pixel, 0 for padding on the right and at the bottom, where image processors pad; all zeros
                for a missing picture. By default all pixels are real.
            vision_features (`torch.FloatTensor` of shape `(batch_size, num_patches, vision_hidden_size)`, *optional*):
                Precomputed patches.
            vision_mask (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*):
                1 for a real patch. A row of zeros is a problem without picture, whose states are those of plain T5
                (unless `config.zeros_for_missing_pictures` is set).
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                The target so far. By default computed from `labels`.
            decoder_attention_mask (`torch.Tensor` of shape `(batch_size, target_length)`, *optional*):
                1 for a real token.
            encoder_outputs (`MMCoTEncoderOutput` or `tuple`, *optional*):
                Outputs of this model's encoder. `last_hidden_state` of shape
                `(batch_size, source_length, hidden_size)` is already fused and is not fused again.
            cache (`Cache`, *optional*):
                The decoder's keys and values of the target so far, returned by an earlier call.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings to use instead of `input_ids`.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(batch_size, target_length, hidden_size)`, *optional*):
                Embeddings to use instead of `decoder_input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Target tokens; -100 is ignored.
            use_cache (`bool`, *optional*):
                Whether to return `cache`.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of target tokens of the whole optimization step, over all its batches and processes. The summed
                loss is divided by it. By default the loss is the mean over this batch. (T5's own forward ignores it.)
            skip_logits (`bool`, *optional*, defaults to `False`):
                Whether to return the loss without `logits` (with `labels`). The output head then processes only the
                real target tokens, not the padding.
            smoothing (`float`, *optional*, defaults to 0.0):
                The share of each target token's probability that the loss distributes over the vocabulary, as in
                `transformers.trainer_pt_utils.LabelSmoother`. (If the name contained `label`, the Trainer would expect
                labels of that name.)

        Returns:
            [`MMCoTSeq2SeqLMOutput`]: `loss` (a scalar, with `labels`), `logits` of shape
            `(batch_size, target_length, vocab_size)`, the fused `encoder_last_hidden_state` of shape
            `(batch_size, source_length, hidden_size)`, `fusion_attentions` of shape
            `(batch_size, sequence_length, num_patches)` with `output_attentions=True` (unless the fusion turns patches
            into tokens), and T5's other fields.

        Example:

        ```python
        >>> import torch
        >>> from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration

        >>> config = MMCoTConfig(
        ...     vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, max_images=2,
        ...     decoder_start_token_id=0,
        ...     vision_config={
        ...         "model_type": "vit", "image_size": 32, "patch_size": 16, "hidden_size": 24,
        ...         "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        ...     },
        ... )
        >>> model = MMCoTForConditionalGeneration(config).eval()

        >>> # two problems: the first has two pictures, the second none
        >>> input_ids = torch.tensor([[5, 6, 7, 1], [5, 1, 0, 0]])
        >>> pixel_mask = torch.ones(2, 2, 32, 32)
        >>> pixel_mask[1] = 0
        >>> outputs = model(
        ...     input_ids=input_ids,
        ...     attention_mask=(input_ids != 0).long(),
        ...     pixel_values=torch.randn(2, 2, 3, 32, 32),
        ...     pixel_mask=pixel_mask,
        ...     labels=torch.tensor([[8, 9, 1], [8, 1, -100]]),
        ...     output_attentions=True,
        ... )
        >>> outputs.loss.shape, outputs.logits.shape, outputs.encoder_last_hidden_state.shape
        (torch.Size([]), torch.Size([2, 3, 64]), torch.Size([2, 4, 32]))

        >>> # 5 patches a picture; a problem without picture attends to none
        >>> outputs.fusion_attentions.shape, outputs.fusion_attentions[1].sum().item()
        (torch.Size([2, 4, 10]), 0.0)

        ```
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
                return_dict=True,
                **kwargs,
            )
        attention_mask = source_mask(encoder_outputs, attention_mask)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        if skip_logits and labels is not None:
            outputs = self.decoder(
                input_ids=decoder_input_ids,
                attention_mask=decoder_attention_mask,
                inputs_embeds=decoder_inputs_embeds,
                encoder_hidden_states=encoder_outputs[0],
                encoder_attention_mask=attention_mask,
                use_cache=False,
                **{CACHE: cache},
                **kwargs,
            )
            is_target = labels != -100
            logits = self.next_token_logits(outputs.last_hidden_state[is_target])
            loss = token_loss(logits, labels[is_target], num_items_in_batch, smoothing)
            return MMCoTSeq2SeqLMOutput(loss=loss, encoder_last_hidden_state=encoder_outputs[0])
        outputs = super().forward(
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        loss = None
        if labels is not None:
            loss = token_loss(outputs.logits.flatten(0, 1), labels.flatten(), num_items_in_batch, smoothing)
        weights = getattr(encoder_outputs, "fusion_attentions", None)
        return MMCoTSeq2SeqLMOutput(loss=loss, fusion_attentions=weights, **outputs)

    @torch.no_grad()
    def score_choices(
        self,
        choice_labels: torch.LongTensor,
        attention_mask: torch.Tensor,
        encoder_outputs: BaseModelOutput | None = None,
        **encoder_inputs,
    ) -> torch.FloatTensor:
        """
        Compute the log-probability of the target text of each choice, given the source (and the picture).

        The decoder runs once: the choices of a problem share its encoder states, and the common prefix of their targets
        is computed once. Above `MAX_PACKED_LENGTH` tokens it runs once per choice.

        Args:
            choice_labels (`torch.LongTensor` of shape `(batch_size, num_choices, target_length)`):
                The target of each choice, padded with -100. A problem with fewer choices has rows of -100 only.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`):
                1 for a real token of the source.
            encoder_outputs (`MMCoTEncoderOutput`, *optional*):
                Outputs of this model's encoder, to use instead of `encoder_inputs`.
            encoder_inputs:
                The other inputs of `forward` that the encoder reads.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_choices)`, with `-inf` for missing choices.

        Example:

        ```python
        >>> import torch
        >>> from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration

        >>> size = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        >>> config = MMCoTConfig(**size, decoder_start_token_id=0)
        >>> model = MMCoTForConditionalGeneration(config).eval()
        >>> choice_labels = torch.tensor([[[8, 9, 1], [10, 1, -100]]])  # one problem, two choices
        >>> scores = model.score_choices(choice_labels, torch.ones(1, 3), input_ids=torch.tensor([[5, 6, 1]]))
        >>> scores.shape, bool((scores < 0).all())
        (torch.Size([1, 2]), True)

        ```
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(attention_mask=attention_mask, **encoder_inputs)
        attention_mask = source_mask(encoder_outputs, attention_mask)
        is_choice = (choice_labels != -100).any(dim=-1)
        packed = pack_choices(choice_labels, self.config.decoder_start_token_id)
        if packed.input_ids.shape[1] > MAX_PACKED_LENGTH:
            scores = self.score_one_by_one(choice_labels, attention_mask, encoder_outputs)
            return scores.masked_fill(~is_choice, -math.inf)
        prefix = None if self.virtual_tokens is None else self.virtual_tokens.prefix(len(packed.input_ids))
        states = self.decoder(
            input_ids=packed.input_ids,
            attention_mask=self.packed_mask(packed, 0 if prefix is None else prefix.get_seq_length()),
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            use_cache=False,
            **{CACHE: prefix},
        ).last_hidden_state
        positions, inverse = packed.position.unique(return_inverse=True)
        log_probs = self.next_token_logits(states.flatten(0, 1)[positions]).float().log_softmax(dim=-1)
        scores = log_probs.new_zeros(choice_labels.shape[:2]).flatten()
        scores.index_add_(0, packed.choice, log_probs[inverse, packed.label])
        return scores.view(is_choice.shape).masked_fill(~is_choice, -math.inf)

    def score_one_by_one(
        self, choice_labels: torch.LongTensor, attention_mask: torch.Tensor, encoder_outputs: BaseModelOutput
    ) -> torch.FloatTensor:
        """Compute `score_choices` with one pass per choice, for choices that are too long for a packed pass."""
        scores = []
        for labels in choice_labels.unbind(1):
            labels = labels[:, : max(1, int((labels != -100).sum(dim=1).max()))]
            prefix = None if self.virtual_tokens is None else self.virtual_tokens.prefix(len(labels))
            states = self.decoder(
                input_ids=self._shift_right(labels),
                encoder_hidden_states=encoder_outputs.last_hidden_state,
                encoder_attention_mask=attention_mask,
                use_cache=False,
                **{CACHE: prefix},
            ).last_hidden_state
            log_probs = self.next_token_logits(states).float().log_softmax(dim=-1)
            taken = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
            scores.append(taken.masked_fill(labels == -100, 0).sum(dim=1))
        return torch.stack(scores, dim=1)

    def packed_mask(self, packed: PackedChoices, prefix_length: int) -> torch.FloatTensor:
        """
        Return the mask to add to T5's position bias, so that each token of a packed sequence has the position in its
        own target, `(batch_size, num_heads, packed_length, prefix_length + packed_length)`.
        """
        attention = self.decoder.block[0].layer[0].SelfAttention
        before = torch.arange(-prefix_length, 0, device=packed.depth.device).expand(len(packed.depth), -1)
        distance = torch.cat([before, packed.depth], dim=1)[:, None, :] - packed.depth[:, :, None]
        bucket = attention._relative_position_bucket(
            distance,
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias = attention.relative_attention_bias(bucket).permute(0, 3, 1, 2)
        length = packed.input_ids.shape[1]
        mask = bias - attention.compute_bias(length, prefix_length + length, past_seen_tokens=prefix_length)
        is_seen = nn.functional.pad(packed.attention(), (prefix_length, 0), value=True)
        return mask.masked_fill(~is_seen[:, None], torch.finfo(mask.dtype).min)

    def next_token_logits(self, states: torch.FloatTensor) -> torch.FloatTensor:
        """Compute the logits from the decoder's last states."""
        if self.config.scale_decoder_outputs:
            states = states * self.model_dim**-0.5
        return self.lm_head(states)


def token_loss(
    logits: torch.FloatTensor,
    labels: torch.LongTensor,
    num_items_in_batch: torch.Tensor | int | None,
    smoothing: float,
) -> torch.FloatTensor:
    """Compute the cross-entropy of the real target tokens: the mean, or the sum divided by `num_items_in_batch`."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    labels = labels.to(logits.device)
    loss = nn.functional.cross_entropy(
        logits, labels, ignore_index=-100, reduction=reduction, label_smoothing=smoothing
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


MMCoTForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
