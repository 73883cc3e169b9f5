"""T5's encoder with a picture tower and a fusion. `modeling_mmcot.py` adds the decoder and the output head.

The encoder turns pictures into patches, calls the fusion at its `place`, and returns states that the decoder attends to
as in T5. What a fusion computes is in `fusion_mmcot.py`.
"""

from dataclasses import dataclass

from .versions_mmcot import check_versions  # noqa: F401  # isort: skip (it must run before the imports below)

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Block, T5Stack
from transformers.utils import can_return_tuple

from .configuration_mmcot import MMCoTConfig
from .fusion_contract_mmcot import ENCODER_INPUT, ENCODER_LAYERS, ENCODER_OUTPUT, Fusion, StateFusion
from .fusion_mmcot import build_fusion
from .layers_mmcot import use_fast_layers
from .versions_mmcot import CUSTOM_CODE_METHOD
from .vision_mmcot import build_vision_tower, encode_pictures, find_tower, tower_width


@dataclass
class MMCoTEncoderOutput(BaseModelOutput):
    """
    Output of [`MMCoTEncoder`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, source_length, hidden_size)`):
            The states that the decoder attends to, fused with the picture. If the fusion turns patches into tokens,
            these follow the tokens of the text; otherwise `source_length` is `sequence_length`.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True` is passed):
            T5's hidden states: of the embeddings and of each layer, each of shape
            `(batch_size, source_length, hidden_size)`. A fusion of the last states is not included.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True` is passed):
            T5's attention weights: one tensor of shape `(batch_size, num_heads, source_length, source_length)` for
            each layer.
        attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*):
            1 for a real state. Returned if the fusion turned patches into tokens; the decoder then needs this mask
            instead of the one of the text.
        fusion_attentions (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_patches)`, *optional*):
            The attention of each token to each patch; 0 for a problem without picture, unless it is fused with zeros
            (`config.zeros_for_missing_pictures`). Averaged over the layers that fuse. Returned when
            `output_attentions=True` is passed and the batch has a picture, but not by a fusion that turns patches into
            tokens.
        fusion_gate (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            The weight of the picture in the fused states, 0 to 1. Returned by a gated fusion of the last states, under
            the same conditions as `fusion_attentions`.
    """

    attention_mask: torch.Tensor | None = None
    fusion_attentions: torch.FloatTensor | None = None
    fusion_gate: torch.FloatTensor | None = None


class InitializedAsT5:
    """Initialization of encoder and model: T5's for T5's modules, and the fusion's own for the fusion."""

    @classmethod
    def is_custom_code(cls) -> bool:
        # With True, transformers skips `_init_weights` for all modules without direct parameters (T5's attention and
        # feed-forward, the fusion), and they would start with a standard deviation of 1.0. That check protects against
        # remote code that fills tensors without transformers' init functions; this code uses only these functions.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Fusion):
            module.initialize(self.config.initializer_factor)


setattr(InitializedAsT5, CUSTOM_CODE_METHOD, InitializedAsT5.is_custom_code)


class PreparedBlock(T5Block):
    """
    A layer of T5's encoder that first changes its inputs. A subclass defines `prepare`.

    `T5Stack` passes `encoder_hidden_states` to its layers as a positional argument, also in the encoder, whose layers
    do not use it. Here it contains what `prepare` needs: a tensor, so that gradient checkpointing sees it. Without it,
    the layer is T5's.
    """

    def prepare(
        self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None, given: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the states and the position bias that T5's layer reads."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> tuple:
        if encoder_hidden_states is not None:
            given = encoder_hidden_states.to(hidden_states.device)
            hidden_states, position_bias = self.prepare(hidden_states, position_bias, given)
        return super().forward(hidden_states, attention_mask, position_bias, None, *args, **kwargs)


class FusedBlock(PreparedBlock):
    """A layer after a fusion of its input with the patches. `given` contains them, with their mask as last feature."""

    def __init__(self, config: MMCoTConfig, index: int, fusion: StateFusion):
        super().__init__(config, has_relative_attention_bias=index == 0, layer_idx=index)
        self.fusion = fusion

    @staticmethod
    def packed(patches: torch.Tensor, mask: torch.BoolTensor) -> torch.Tensor:
        return torch.cat([patches, mask[..., None].to(patches)], dim=-1)

    def prepare(
        self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None, given: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.fusion(hidden_states, given[..., :-1], given[..., -1].bool()).hidden_states, position_bias


# Kinds of source tokens, if a fusion adds tokens: the values of the attention mask of the text, then the added tokens.
PADDING, TEXT, ADDED, ADDED_PADDING = range(4)


class TokenBlock(PreparedBlock):
    """
    The first layer, if a fusion adds tokens: the position bias applies to pairs of text tokens only. `given` contains
    the kind of each token, of shape `(batch_size, source_length)`.

    The layers get no attention mask: this layer adds it to the position bias, which is shared by all layers. It does so
    itself, because FSDP gathers its weights only within it.
    """

    def prepare(
        self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None, given: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        length = given.shape[1]
        bias = self.layer[0].SelfAttention.compute_bias(length, length, device=hidden_states.device)
        is_text = (given <= TEXT)[:, None]
        bias = bias.masked_fill(~(is_text[..., None] & is_text[..., None, :]), 0)
        is_padding = (given == PADDING) | (given == ADDED_PADDING)
        return hidden_states, bias.masked_fill(is_padding[:, None, None], torch.finfo(bias.dtype).min)


class MMCoTEncoder(InitializedAsT5, T5Stack):
    """T5's encoder with a picture tower and a fusion, which it calls at the fusion's `place`."""

    config_class = MMCoTConfig

    def __init__(self, config: MMCoTConfig):
        super().__init__(config)
        use_fast_layers(self)
        self.vision_tower = None
        if config.vision_config is not None:
            find_tower(config.vision_config, config.vision_tower)
            self.vision_tower = build_vision_tower(config.vision_config)
            check_width(self.vision_tower, config.vision_hidden_size)
        self.fusion = build_fusion(config)
        place = None if self.fusion is None else self.fusion.place
        if place == ENCODER_INPUT and config.zeros_for_missing_pictures:
            raise ValueError(
                f"zeros_for_missing_pictures is set, but the fusion {config.fusion!r} makes tokens of the patches: the "
                f"number of zeros, which depends on the batch, would change the result."
            )
        if place == ENCODER_INPUT:
            self.block[0] = TokenBlock(config, has_relative_attention_bias=True, layer_idx=0)
        elif place == ENCODER_LAYERS:
            for index in range(0, config.num_layers, self.fusion.every):
                self.block[index] = FusedBlock(config, index, self.fusion.layer(config))
        use_fast_layers(self.block)
        self.freeze_vision()
        self.post_init()

    def freeze_vision(self) -> None:
        """Freeze the tower if `config.freeze_vision` is set: no gradients, evaluation mode."""
        if self.vision_tower is not None and self.config.freeze_vision:
            self.vision_tower.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "MMCoTEncoder":
        super().train(mode)
        self.freeze_vision()
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_fusion_attentions: bool = False,
        **kwargs,
    ) -> MMCoTEncoderOutput:
        """
        Encode the text and fuse it with the picture. See [`MMCoTForConditionalGeneration.forward`] for the arguments.

        Args:
            output_fusion_attentions (`bool`, *optional*, defaults to `False`):
                Whether to return the fusion's attention and gate, also without T5's attention, which SDPA does not
                compute.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        is_shown = output_attentions or output_fusion_attentions
        patches, mask = self.picture_patches(pixel_values, pixel_mask, vision_features, vision_mask)
        patches, mask = self.fill_missing(patches, mask, input_ids if inputs_embeds is None else inputs_embeds)
        place = None if patches is None else self.fusion.place
        extended_mask = None
        if place == ENCODER_INPUT:
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            input_ids, inputs_embeds, kinds = None, *self.add_tokens(embeds, attention_mask, patches, mask)
            attention_mask, kwargs["encoder_hidden_states"] = None, kinds
            extended_mask = ((kinds == TEXT) | (kinds == ADDED)).long()
        elif place == ENCODER_LAYERS:
            patches, mask = self.fusion(patches.to(self.embed_tokens.weight.dtype), mask)
            kwargs["encoder_hidden_states"] = FusedBlock.packed(patches, mask)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=True if is_shown and place == ENCODER_LAYERS else output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        states, attentions, gate, hidden_states = outputs.last_hidden_state, None, None, outputs.hidden_states
        if place == ENCODER_OUTPUT:
            states, attentions, gate = self.fusion(states, patches.to(states), mask)
        elif place == ENCODER_LAYERS and is_shown:
            attentions = self.layer_attentions(hidden_states, patches, mask)
            if isinstance(output_hidden_states, list | tuple):  # only some layers (transformers 5.24)
                hidden_states = tuple(hidden_states[index] for index in output_hidden_states)
        return MMCoTEncoderOutput(
            last_hidden_state=states,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
            attention_mask=extended_mask,
            fusion_attentions=attentions if is_shown else None,
            fusion_gate=gate if is_shown else None,
        )

    def layer_attentions(
        self, hidden_states: tuple[torch.FloatTensor, ...], patches: torch.FloatTensor, mask: torch.BoolTensor
    ) -> torch.FloatTensor:
        """Compute the attention over patches again from the inputs of the layers that fuse, averaged over them."""
        fused = [
            block.fusion(states, patches, mask).attentions
            for block, states in zip(self.block, hidden_states, strict=False)
            if isinstance(block, FusedBlock)
        ]
        return torch.stack([attentions.to(fused[0].device) for attentions in fused]).mean(dim=0)

    def add_tokens(
        self,
        embeds: torch.FloatTensor,
        attention_mask: torch.Tensor | None,
        patches: torch.FloatTensor,
        mask: torch.BoolTensor,
    ) -> tuple[torch.FloatTensor, torch.Tensor]:
        """Return the embedded text followed by the fusion's tokens, and the kind of each token."""
        tokens, token_mask = self.fusion(patches.to(embeds), mask)
        if attention_mask is None:
            attention_mask = torch.ones(embeds.shape[:2], device=embeds.device)
        kinds = [attention_mask.long(), torch.where(token_mask, ADDED, ADDED_PADDING)]
        return torch.cat([embeds, tokens], dim=1), torch.cat(kinds, dim=1)

    def fill_missing(
        self, patches: torch.FloatTensor | None, mask: torch.BoolTensor | None, source: torch.Tensor
    ) -> tuple[torch.FloatTensor | None, torch.BoolTensor | None]:
        """Return the patches that the fusion reads, and their mask; None, None if there is nothing to fuse."""
        if self.fusion is None:
            return None, None
        if self.config.zeros_for_missing_pictures:
            return self.zeros_where_missing(patches, mask, source)
        if patches is None and self.training:
            # DDP requires that all parameters take part in a step; with this mask the fusion changes no state.
            patches = self.zero_patches(source)
            mask = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
        return patches, mask

    def picture_patches(
        self,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_mask: torch.Tensor | None = None,
    ) -> tuple[torch.FloatTensor | None, torch.BoolTensor | None]:
        """
        Return the patches `(batch_size, num_patches, vision_hidden_size)` and their mask; None, None without any
        picture.

        Raises:
            ValueError: If the inputs do not match each other or the configuration.
        """
        if pixel_values is not None and vision_features is not None:
            raise ValueError("pixel_values and vision_features were both given: expected only one of them.")
        if pixel_values is not None:
            if self.vision_tower is None:
                raise ValueError(
                    "pixel_values were given, but this model has no picture tower (config.vision_config is None): "
                    "pass vision_features, or build the model with from_text_vision_pretrained."
                )
            num_images = pixel_values.shape[1] if pixel_values.dim() == 5 else 1
            if num_images > self.config.max_images:
                raise ValueError(
                    f"pixel_values contain {num_images} pictures per problem, but config.max_images is "
                    f"{self.config.max_images}."
                )
            vision_features, picture_mask = encode_pictures(
                self.vision_tower, self.config.vision_tower, pixel_values, pixel_mask
            )
            if vision_features is not None and vision_mask is not None:
                picture_mask = picture_mask & vision_mask.bool()
            vision_mask = picture_mask
        if vision_features is None:
            return None, None
        if self.fusion is None:
            raise ValueError(
                f"vision_features were given, but this model reads text only: config.vision_hidden_size is "
                f"{self.config.vision_hidden_size}, and config.fusion is {self.config.fusion!r}."
            )
        if vision_features.shape[-1] != self.config.vision_hidden_size:
            raise ValueError(
                f"vision_features are {vision_features.shape[-1]} wide, "
                f"but config.vision_hidden_size is {self.config.vision_hidden_size}."
            )
        if vision_mask is None:
            vision_mask = torch.ones(vision_features.shape[:2], dtype=torch.bool, device=vision_features.device)
        if vision_mask.shape != vision_features.shape[:2]:
            raise ValueError(
                f"vision_mask has the shape {tuple(vision_mask.shape)}; vision_features of shape "
                f"{tuple(vision_features.shape)} require a mask of shape {tuple(vision_features.shape[:2])}."
            )
        return vision_features, vision_mask.bool()

    def zeros_where_missing(
        self, patches: torch.FloatTensor | None, mask: torch.BoolTensor | None, source: torch.Tensor
    ) -> tuple[torch.FloatTensor, torch.BoolTensor]:
        """
        Use zeros as the patches of rows without picture. Their number has no influence, because attention to equal
        patches is uniform.
        """
        if patches is None:
            patches = self.zero_patches(source)
            return patches, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        is_missing = ~mask.any(dim=1, keepdim=True)
        return patches.masked_fill(is_missing[..., None], 0), mask | is_missing

    def zero_patches(self, source: torch.Tensor) -> torch.FloatTensor:
        """Return one patch of zeros for each row of the source."""
        # Not on the device of a weight, which has none if weights are offloaded.
        shape, dtype = (len(source), 1, self.config.vision_hidden_size), self.embed_tokens.weight.dtype
        return torch.zeros(shape, dtype=dtype, device=source.device)


def check_width(tower: PreTrainedModel, vision_hidden_size: int) -> None:
    if tower_width(tower) != vision_hidden_size:
        raise ValueError(
            f"The picture tower's patches are {tower_width(tower)} wide, but vision_hidden_size is "
            f"{vision_hidden_size}."
        )
