"""The contract of a fusion: where it acts in the encoder, what it receives and returns, and which rows it may change.

A fusion is a subclass of one of three classes, which handle masks and rows without picture:

- `StateFusion` maps the encoder's last states to new states;
- `TokenFusion` turns patches into tokens of the source;
- `LayerFusion` has a `StateFusion` of its own before some of the encoder's layers.

`fusion_mmcot.py` contains the fusions, and `modeling_mmcot.py` calls them. Nothing here stores anything between calls:
several threads can use a model.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .configuration_mmcot import MMCoTConfig

# Places where a fusion acts: tokens of the encoder's input, before some of its layers, or on its last states.
ENCODER_INPUT, ENCODER_LAYERS, ENCODER_OUTPUT = "encoder_input", "encoder_layers", "encoder_output"


class FusionOutput(NamedTuple):
    """
    Output of a [`StateFusion`].

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The fused states.
        attentions (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_patches)`):
            The attention over patches, averaged over heads. It sums to 1 over the patches of a row, and is 0 for a row
            without patches.
        gate (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            The weight of the picture in the fused states, 0 to 1; 0 for a row without patches. `None` for a fusion
            without such a gate.
    """

    hidden_states: torch.Tensor
    attentions: torch.Tensor
    gate: torch.Tensor | None = None


class Fusion(nn.Module):
    """
    Base class of all fusions.

    Args:
        config ([`MMCoTConfig`]):
            The model's configuration. `config.fusion_options` are the other arguments of a subclass.
    """

    place: ClassVar[str]

    def __init__(self, config: MMCoTConfig):
        super().__init__()

    @torch.no_grad()
    def initialize(self, factor: float) -> None:
        """Draw matrices such that they preserve the scale of their input; set scales to 1 and everything else to 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                init.normal_(parameter, std=factor * parameter.shape[1] ** -0.5)
            elif name.endswith("norm.weight"):
                init.ones_(parameter)
            else:
                init.zeros_(parameter)


class StateFusion(Fusion):
    """Maps text states and patches to new text states of the same shape. A subclass defines `fuse`."""

    place: ClassVar[str] = ENCODER_OUTPUT

    def fuse(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> FusionOutput:
        """Fuse text states with patches, as `forward` does. Each row of `vision_mask` has a real patch."""
        raise NotImplementedError

    def forward(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> FusionOutput:
        """
        Fuse text states with picture patches.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                The text states.
            vision_features (`torch.FloatTensor` of shape `(batch_size, num_patches, vision_hidden_size)`):
                The patches.
            vision_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`):
                True for a real patch. A row without real patches keeps its `hidden_states`, bit for bit.
        """
        has_picture = vision_mask.any(dim=1)[:, None, None]
        vision_features, vision_mask = with_finite_attention(vision_features, vision_mask)
        fused = self.fuse(hidden_states, vision_features, vision_mask)
        return FusionOutput(
            torch.where(has_picture, fused.hidden_states, hidden_states),
            fused.attentions * has_picture,
            None if fused.gate is None else fused.gate * has_picture,
        )


class TokenFusion(Fusion):
    """Turns patches into tokens of the source. A subclass defines `tokens`."""

    place: ClassVar[str] = ENCODER_INPUT

    def tokens(
        self, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Return the tokens of each row, `(batch_size, num_tokens, hidden_size)`, and their mask,
        `(batch_size, num_tokens)`, or None if all of them are real. Each row of `vision_mask` has a real patch.
        """
        raise NotImplementedError

    def forward(self, vision_features: torch.Tensor, vision_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute the tokens for the patches, with the arguments of [`StateFusion.forward`].

        Returns:
            The tokens, `(batch_size, num_tokens, hidden_size)`, and their mask, `(batch_size, num_tokens)`, which is
            False for all tokens of a row without real patches.
        """
        has_picture = vision_mask.any(dim=1, keepdim=True)
        tokens, mask = self.tokens(*with_finite_attention(vision_features, vision_mask))
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens, mask & has_picture


class LayerFusion(Fusion):
    """
    Fuses the states before every `every`-th layer of the encoder, from the first one on, with modules of their own. A
    subclass defines `layer`.

    Raises:
        ValueError: If `every` is not between 1 and the number of layers.
    """

    place: ClassVar[str] = ENCODER_LAYERS

    def __init__(self, config: MMCoTConfig, every: int = 1):
        super().__init__(config)
        if not 1 <= every <= config.num_layers:
            raise ValueError(
                f"fusion_options: every is {every}; expected 1 to {config.num_layers}, the number of encoder layers."
            )
        self.every = every

    def layer(self, config: MMCoTConfig) -> StateFusion:
        """Build the fusion before one layer."""
        raise NotImplementedError

    def forward(self, vision_features: torch.Tensor, vision_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the patches, and their mask, that the fusions of all layers read; by default they are unchanged."""
        return vision_features, vision_mask


def with_finite_attention(
    vision_features: torch.Tensor, vision_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Set masked patches to zero, because 0 times NaN or infinity would be NaN in sums, and let a row without real patches
    attend to all of its patches, because a softmax over no patches would be NaN, also in the gradient. The result of
    such a row must be dropped.
    """
    features = vision_features.masked_fill(~vision_mask[..., None], 0)
    return features, vision_mask | ~vision_mask.any(dim=1, keepdim=True)
