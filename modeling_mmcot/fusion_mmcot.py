"""Fusion of text states with picture patches: one module per fusion, and the table name -> class.

A fusion maps text states and picture patches to new text states of the same shape. It also returns the attention of
each text token to each patch, and its gate. The encoder calls it at its `place`. `vision_mmcot.py` computes the
patches, `modeling_mmcot.py` the text states.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import nn

# Places where the encoder calls a fusion: on the token embeddings, before its first layer, or on its last states.
ENCODER_INPUT, ENCODER_OUTPUT = "encoder_input", "encoder_output"


class FusionOutput(NamedTuple):
    """
    Output of a fusion.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The fused states.
        attentions (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_patches)`):
            The attention over patches. It sums to 1 over the patches of a row, and is 0 for a row without patches.
        gate (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The weight of the picture in the fused states, 0 to 1; 0 for a row without patches.
    """

    hidden_states: torch.Tensor
    attentions: torch.Tensor
    gate: torch.Tensor


class Fusion(nn.Module):
    """
    Base class of all fusions: handles masks and rows without picture. A subclass defines `attend` and `gate`, and
    overrides `place` if needed.
    """

    place: ClassVar[str] = ENCODER_OUTPUT

    def attend(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the attention output for each token, `(batch_size, sequence_length, hidden_size)`, and the attention
        weights, `(batch_size, sequence_length, num_patches)`. Each row of `vision_mask` has a real patch.
        """
        raise NotImplementedError

    def gate(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the weight of the picture for each token, 0 to 1, `(batch_size, sequence_length, hidden_size)`."""
        raise NotImplementedError

    def forward(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> FusionOutput:
        """
        Fuse text states with picture patches.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                The text states at the fusion's place.
            vision_features (`torch.FloatTensor` of shape `(batch_size, num_patches, vision_hidden_size)`):
                The patches.
            vision_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`):
                True for a real patch. A row without real patches keeps its `hidden_states`, bit for bit.
        """
        has_picture = vision_mask.any(dim=1)[:, None, None]
        # A row without real patches attends to all patches, and its result is dropped: a softmax over no patches would
        # be NaN, also in the gradient. Masked patches are set to zero, because 0 times NaN or infinity would be NaN in
        # the sums below.
        vision_features = vision_features.masked_fill(~vision_mask[..., None], 0)
        attended, weights = self.attend(hidden_states, vision_features, vision_mask | ~has_picture[:, 0])
        gate = self.gate(hidden_states, attended)
        fused = (1 - gate) * hidden_states + gate * attended
        return FusionOutput(torch.where(has_picture, fused, hidden_states), weights * has_picture, gate * has_picture)


class GatedFusion(Fusion):
    """
    The gated fusion of Multimodal Chain-of-Thought (Zhang et al. 2023, arXiv 2302.00923, section 4.2):

        h_vis  = W_h x_vis
        h_attn = softmax(h_lang h_vis^T / sqrt(d)) h_vis
        g      = sigmoid(W_l h_lang + W_v h_attn)
        h      = (1 - g) * h_lang + g * h_attn

    There are no biases and no further projections. The authors' released checkpoints use another form,
    `GatedMHAFusion`.
    """

    def __init__(self, hidden_size: int, vision_hidden_size: int):
        super().__init__()
        self.vision_projection = nn.Linear(vision_hidden_size, hidden_size, bias=False)
        self.language_gate = nn.Linear(hidden_size, hidden_size, bias=False)
        self.vision_gate = nn.Linear(hidden_size, hidden_size, bias=False)

    def attend(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.vision_projection(vision_features)
        scores = hidden_states @ patches.transpose(1, 2) / hidden_states.shape[-1] ** 0.5
        weights = scores.masked_fill(~vision_mask[:, None, :], -torch.inf).softmax(dim=-1)
        return weights @ patches, weights

    def gate(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.language_gate(hidden_states) + self.vision_gate(attended))


class GatedMHAFusion(Fusion):
    """
    The fusion of the authors' released checkpoints (model.py of amazon-science/mm-cot, `JointEncoder`):

        h_vis  = W_h x_vis + b_h
        h_attn = MultiheadAttention(h_lang, h_vis, h_vis)      one head, its own projections and biases
        g      = sigmoid(W_g [h_lang; h_attn] + b_g)
        h      = (1 - g) * h_lang + g * h_attn
    """

    def __init__(self, hidden_size: int, vision_hidden_size: int):
        super().__init__()
        self.vision_projection = nn.Linear(vision_hidden_size, hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads=1, batch_first=True)
        self.joint_gate = nn.Linear(2 * hidden_size, hidden_size)

    def attend(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.vision_projection(vision_features)
        return self.attention(hidden_states, patches, patches, key_padding_mask=~vision_mask)

    def gate(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.joint_gate(torch.cat([hidden_states, attended], dim=-1)))


FUSIONS: dict[str, type[Fusion]] = {"gated": GatedFusion, "gated_mha": GatedMHAFusion}


def build_fusion(name: str, hidden_size: int, vision_hidden_size: int) -> Fusion:
    """
    Build the fusion with the given name in `FUSIONS`.

    Raises:
        ValueError: If the name is unknown; the message lists the known names.
    """
    if name not in FUSIONS:
        raise ValueError(f"fusion is {name!r}; known fusions: {', '.join(sorted(FUSIONS))}.")
    return FUSIONS[name](hidden_size, vision_hidden_size)
