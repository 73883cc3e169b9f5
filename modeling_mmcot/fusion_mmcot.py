"""How the picture enters the text: one module per fusion, and the table name -> class.

A fusion takes the encoder's text states and the picture's patches and gives new text states of the same shape. It does
not see pixels (`vision_mmcot.py`) or tokens (`modeling_mmcot.py`).
"""

import torch
from torch import nn


class GatedFusion(nn.Module):
    """
    The gated fusion of Multimodal Chain-of-Thought (Zhang et al. 2023, arXiv 2302.00923, section 4.2):

        h_vis  = W_h x_vis
        h_attn = softmax(h_lang h_vis^T / sqrt(d)) h_vis
        g      = sigmoid(W_l h_lang + W_v h_attn)
        h      = (1 - g) * h_lang + g * h_attn

    No biases and no further projections; the authors' released checkpoints hold another form of it.
    """

    def __init__(self, hidden_size: int, vision_hidden_size: int):
        super().__init__()
        self.vision_projection = nn.Linear(vision_hidden_size, hidden_size, bias=False)
        self.language_gate = nn.Linear(hidden_size, hidden_size, bias=False)
        self.vision_gate = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                The text encoder's last states.
            vision_features (`torch.FloatTensor` of shape `(batch_size, num_patches, vision_hidden_size)`):
                The patches.
            vision_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`):
                True for a real patch. A row without any keeps its `hidden_states`, to the bit.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`.
        """
        patches = self.vision_projection(vision_features)
        scores = hidden_states @ patches.transpose(1, 2) / hidden_states.shape[-1] ** 0.5
        # The lowest finite number instead of -inf: a row without a real patch must not become NaN, in its gradient too.
        scores = scores.masked_fill(~vision_mask[:, None, :], torch.finfo(scores.dtype).min)
        attended = scores.softmax(dim=-1) @ patches
        gate = torch.sigmoid(self.language_gate(hidden_states) + self.vision_gate(attended))
        fused = (1 - gate) * hidden_states + gate * attended
        has_picture = vision_mask.any(dim=1)[:, None, None]
        return torch.where(has_picture, fused, hidden_states)


FUSIONS: dict[str, type[nn.Module]] = {"gated": GatedFusion}


def build_fusion(name: str, hidden_size: int, vision_hidden_size: int) -> nn.Module:
    """The fusion of that name; an unknown one is a `ValueError` that lists those that exist."""
    if name not in FUSIONS:
        raise ValueError(f"fusion is {name!r}; known fusions: {', '.join(sorted(FUSIONS))}.")
    return FUSIONS[name](hidden_size, vision_hidden_size)
