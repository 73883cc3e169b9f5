"""The fusions of text with picture patches: one class per fusion, and the table name -> class.

`fusion_contract_mmcot.py` says what a fusion receives and returns, and handles masks and rows without picture.
`vision_mmcot.py` computes the patches. A fusion whose models are published must not change what it computes: add a new
one instead.
"""

import difflib
import inspect

import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from .configuration_mmcot import NO_FUSION, MMCoTConfig
from .fusion_contract_mmcot import Fusion, FusionOutput, LayerFusion, StateFusion, TokenFusion


class GatedFusion(StateFusion):
    """
    The gated fusion of Multimodal Chain-of-Thought (Zhang et al. 2023, arXiv 2302.00923, section 4.2):

        h_vis  = W_h x_vis
        h_attn = softmax(h_lang h_vis^T / sqrt(d)) h_vis
        g      = sigmoid(W_l h_lang + W_v h_attn)
        h      = (1 - g) * h_lang + g * h_attn

    There are no biases and no further projections. The authors' released checkpoints use another form,
    `GatedMHAFusion`.
    """

    def __init__(self, config: MMCoTConfig):
        super().__init__(config)
        self.vision_projection = nn.Linear(config.vision_hidden_size, config.d_model, bias=False)
        self.language_gate = nn.Linear(config.d_model, config.d_model, bias=False)
        self.vision_gate = nn.Linear(config.d_model, config.d_model, bias=False)

    def fuse(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> FusionOutput:
        patches = self.vision_projection(vision_features)
        scores = hidden_states @ patches.transpose(1, 2) / hidden_states.shape[-1] ** 0.5
        weights = scores.masked_fill(~vision_mask[:, None, :], -torch.inf).softmax(dim=-1)
        attended = weights @ patches
        gate = torch.sigmoid(self.language_gate(hidden_states) + self.vision_gate(attended))
        return FusionOutput((1 - gate) * hidden_states + gate * attended, weights, gate)


class GatedMHAFusion(StateFusion):
    """
    The fusion of the authors' released checkpoints (model.py of amazon-science/mm-cot, `JointEncoder`):

        h_vis  = W_h x_vis + b_h
        h_attn = MultiheadAttention(h_lang, h_vis, h_vis)      one head, its own projections and biases
        g      = sigmoid(W_g [h_lang; h_attn] + b_g)
        h      = (1 - g) * h_lang + g * h_attn
    """

    def __init__(self, config: MMCoTConfig):
        super().__init__(config)
        self.vision_projection = nn.Linear(config.vision_hidden_size, config.d_model)
        self.attention = nn.MultiheadAttention(config.d_model, num_heads=1, batch_first=True)
        self.joint_gate = nn.Linear(2 * config.d_model, config.d_model)

    def fuse(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> FusionOutput:
        patches = self.vision_projection(vision_features)
        attended, weights = self.attention(hidden_states, patches, patches, key_padding_mask=~vision_mask)
        gate = torch.sigmoid(self.joint_gate(torch.cat([hidden_states, attended], dim=-1)))
        return FusionOutput((1 - gate) * hidden_states + gate * attended, weights, gate)


class CrossAttention(nn.Module):
    """
    Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.2) of states to patches, without biases,
    with the number and the size of the text model's heads:

        head_i = softmax(W_q_i h (W_k_i x)^T / sqrt(d_kv)) W_v_i x
        output = W_o [head_1; ...; head_n]
    """

    def __init__(self, config: MMCoTConfig, patch_size: int):
        super().__init__()
        self.num_heads, size = config.num_heads, config.num_heads * config.d_kv
        self.query = nn.Linear(config.d_model, size, bias=False)
        self.key = nn.Linear(patch_size, size, bias=False)
        self.value = nn.Linear(patch_size, size, bias=False)
        self.output = nn.Linear(size, config.d_model, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, patches: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output, and the weights averaged over heads, `(batch_size, sequence_length, num_patches)`."""
        query, key, value = (
            project(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, inputs in ((self.query, hidden_states), (self.key, patches), (self.value, patches))
        )
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(dim=-1)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        return self.output(attended), weights.mean(dim=1)


class CrossAttentionFusion(StateFusion):
    """
    Multi-head attention to the patches and a residual connection, without a gate (Vaswani et al. 2017, arXiv
    1706.03762, sections 3.1 and 3.2.2):

        h = h_lang + CrossAttention(h_lang, x_vis)
    """

    def __init__(self, config: MMCoTConfig):
        super().__init__(config)
        self.attention = CrossAttention(config, config.vision_hidden_size)

    def fuse(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> FusionOutput:
        attended, weights = self.attention(hidden_states, vision_features, vision_mask)
        return FusionOutput(hidden_states + attended, weights)


class PrefixFusion(TokenFusion):
    """
    Patches as tokens of the source, which encoder and decoder attend to as to text (VL-T5: Cho et al. 2021, arXiv
    2102.02779, section 3.1; LLaVA: Liu et al. 2023, arXiv 2304.08485, section 4.1):

        token = LayerNorm(W x_vis)

    No position bias applies to pairs with a patch, so their order has no influence. Unlike in VL-T5, there are no
    embeddings of boxes and of the picture's number: what a patch says of its position comes from the tower.
    """

    def __init__(self, config: MMCoTConfig):
        super().__init__(config)
        self.vision_projection = nn.Linear(config.vision_hidden_size, config.d_model, bias=False)
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def tokens(
        self, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.layer_norm(self.vision_projection(vision_features)), vision_mask


class LayerNorm(nn.LayerNorm):
    """Casts its input to its own precision: in a T5 of half precision, the states between layers can be float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype))


class FeedForward(nn.Module):
    """The feed-forward module of Flamingo's new layers: normalization, fourfold width, squared ReLU."""

    def __init__(self, size: int):
        super().__init__()
        self.layer_norm = LayerNorm(size)
        self.expansion = nn.Linear(size, 4 * size, bias=False)
        self.contraction = nn.Linear(4 * size, size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.contraction(self.expansion(self.layer_norm(hidden_states)).relu().square())


class ResamplerLayer(nn.Module):
    """One layer of the perceiver resampler: the latents attend to the patches and to themselves."""

    def __init__(self, config: MMCoTConfig):
        super().__init__()
        self.patch_norm, self.latent_norm = LayerNorm(config.d_model), LayerNorm(config.d_model)
        self.attention = CrossAttention(config, config.d_model)
        self.feed_forward = FeedForward(config.d_model)

    def forward(self, latents: torch.Tensor, patches: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        queries = self.latent_norm(latents)
        keys = torch.cat([self.patch_norm(patches), queries], dim=1)
        latents = latents + self.attention(queries, keys, nn.functional.pad(mask, (0, queries.shape[1]), value=True))[0]
        return latents + self.feed_forward(latents)


class ResamplerFusion(TokenFusion):
    """
    `num_latents` tokens for a problem's patches, whatever their number, from a perceiver resampler of `num_layers`
    layers (Flamingo: Alayrac et al. 2022, arXiv 2204.14198, section 2.1, figure 5 in A.1.1):

        latents = latents + CrossAttention(LN(latents), [LN(W x_vis); LN(latents)])
        latents = latents + FeedForward(LN(latents))

    The tokens enter the source as in `PrefixFusion`. There are no time embeddings, because there are no videos.

    Raises:
        ValueError: If `num_latents` or `num_layers` is less than 1, or if `config.num_vision_tokens` says that there
            are fewer patches than latents.
    """

    def __init__(self, config: MMCoTConfig, num_latents: int = 16, num_layers: int = 2):
        super().__init__(config)
        check_positive(num_latents=num_latents, num_layers=num_layers)
        num_patches = config.num_vision_tokens and config.num_vision_tokens * config.max_images
        if num_patches and num_latents > num_patches:
            raise ValueError(
                f"fusion_options: num_latents is {num_latents}, but a problem has at most {num_patches} patches."
            )
        self.vision_projection = nn.Linear(config.vision_hidden_size, config.d_model, bias=False)
        self.latents = nn.Parameter(torch.empty(num_latents, config.d_model))
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(num_layers))
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def tokens(
        self, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        patches = self.vision_projection(vision_features)
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(latents, patches, vision_mask)
        return self.layer_norm(latents), None


class FlamingoLayer(StateFusion):
    """
    Flamingo's gated cross-attention and feed-forward (Alayrac et al. 2022, arXiv 2204.14198, section 2.2, figure 4):

        h = h + tanh(a) * CrossAttention(LN(h), x_vis)
        h = h + tanh(b) * FeedForward(LN(h))

    `a` and `b` start at 0: at first, the states do not change. Unlike in the published block, a row without picture
    also skips the feed-forward, so that its states are those of T5 after training, too.
    """

    def __init__(self, config: MMCoTConfig):
        super().__init__(config)
        self.layer_norm = LayerNorm(config.d_model)
        self.attention = CrossAttention(config, config.vision_hidden_size)
        self.feed_forward = FeedForward(config.d_model)
        # Of shape (1,), because FSDP does not shard scalars.
        self.attention_gate = nn.Parameter(torch.empty(1))
        self.feed_forward_gate = nn.Parameter(torch.empty(1))

    def fuse(
        self, hidden_states: torch.Tensor, vision_features: torch.Tensor, vision_mask: torch.Tensor
    ) -> FusionOutput:
        attended, weights = self.attention(self.layer_norm(hidden_states), vision_features, vision_mask)
        hidden_states = hidden_states + self.attention_gate.tanh() * attended
        hidden_states = hidden_states + self.feed_forward_gate.tanh() * self.feed_forward(hidden_states)
        return FusionOutput(hidden_states, weights)


class FlamingoFusion(LayerFusion):
    """
    A `FlamingoLayer` before every `every`-th layer of the encoder (Alayrac et al. 2022, arXiv 2204.14198, section 2.2).
    Flamingo has them in its decoder, which is its whole text model, and reads the patches through a resampler; here
    they are in the encoder, which has the text's positions, and read the patches themselves.
    """

    def layer(self, config: MMCoTConfig) -> StateFusion:
        return FlamingoLayer(config)


FUSIONS: dict[str, type[Fusion]] = {
    "gated": GatedFusion,
    "gated_mha": GatedMHAFusion,
    "cross_attention": CrossAttentionFusion,
    "prefix": PrefixFusion,
    "resampler": ResamplerFusion,
    "flamingo": FlamingoFusion,
}


def build_fusion(config: MMCoTConfig) -> Fusion | None:
    """
    Build the fusion `config.fusion`, a name in `FUSIONS`, with `config.fusion_options`; None for `"none"`, or if the
    model has no pictures (`config.vision_hidden_size` is None).

    Raises:
        ValueError: If the name or an option is unknown (the message lists the known ones), or an option is no integer.
    """
    name, options = config.fusion, config.fusion_options or {}
    known = sorted([*FUSIONS, NO_FUSION])
    if name not in known:
        similar = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {similar[0]!r}?" if similar else ""
        raise ValueError(f"fusion is {name!r}; known fusions: {', '.join(known)}.{hint}")
    parameters = [] if name == NO_FUSION else list(inspect.signature(FUSIONS[name]).parameters)[1:]
    for option, value in options.items():
        if option not in parameters:
            expected = ", ".join(parameters) or "none"
            raise ValueError(f"fusion_options: the fusion {name!r} has no option {option!r}; its options: {expected}.")
        if type(value) is not int:
            raise ValueError(f"fusion_options: {option} is {value!r}; expected an integer.")
    if name == NO_FUSION or config.vision_hidden_size is None:
        return None
    return FUSIONS[name](config, **options)


def check_positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"fusion_options: {name} is {value}; expected 1 or more.")
