"""Fast decoding: finished texts leave the batch, the cache grows without copies, and targets share their prefix.

`greedy_search` is passed to `generate` as `custom_generate`; `score_choices` decodes the output of `pack_choices`. This
file does not depend on pictures: the encoder's states are fused already, with a mask of their own if tokens were added.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    Cache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from .versions_mmcot import CACHE

# Finished rows are removed when they reach this share of the batch, because each removal copies the remaining cache.
FINISHED_SHARE = 1 / 8
# Number of tokens by which the cache grows.
CACHE_STEP = 64
# Upper limit, in bytes, for packed copies of weights.
MAX_PACKED = 4e9


def greedy_search(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> torch.LongTensor:
    """
    Decode greedily, with the same tokens as transformers' own greedy search. Finished rows leave the batch.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, 1)`):
            The decoder's start tokens.
        logits_processor (`LogitsProcessorList`), stopping_criteria (`StoppingCriteriaList`):
            Receive all rows of the batch, finished or not, as in transformers.
        model_kwargs:
            The model inputs that `generate` prepares; only `encoder_outputs` and `attention_mask` are used.

    Returns:
        `torch.LongTensor` of shape `(batch_size, length)`: start token, text, eos and padding.

    Raises:
        FloatingPointError: If the first logits contain NaN.
    """
    with torch.inference_mode():
        sequences, tokens = input_ids, input_ids
        # Not `pad_token_id`, because for a model without one, `generate` pads with eos.
        pad = generation_config._pad_token_tensor
        pad = input_ids.new_tensor(0) if pad is None else pad  # without eos, all texts have the same length
        rows = torch.arange(len(input_ids), device=input_ids.device)  # the batch's rows, as indices into `sequences`
        is_open = torch.ones_like(rows, dtype=torch.bool)  # which rows of the batch are not finished
        states = model_kwargs["encoder_outputs"].last_hidden_state
        attention_mask = source_mask(model_kwargs["encoder_outputs"], model_kwargs["attention_mask"])
        cache = EncoderDecoderCache(
            Cache(layer_class_to_replicate=GrowingLayer), Cache(layer_class_to_replicate=DynamicLayer)
        )
        while is_open.any():
            outputs = model.decoder(
                input_ids=tokens,
                encoder_hidden_states=states,
                encoder_attention_mask=attention_mask,
                use_cache=True,
                **{CACHE: cache},
            )
            logits = model.next_token_logits(outputs.last_hidden_state[:, -1]).float()
            if sequences.shape[1] == 1 and logits.isnan().any():
                raise FloatingPointError("the decoder computes NaN")
            if logits_processor:
                all_logits = logits.new_zeros(len(sequences), logits.shape[-1])
                all_logits[rows] = logits
                logits = logits_processor(sequences, all_logits)[rows]
            tokens = logits.argmax(dim=-1).where(is_open, pad)
            column = pad.expand(len(sequences), 1).clone()
            column[rows, 0] = tokens
            sequences = torch.cat([sequences, column], dim=1)
            is_open = is_open & ~stopping_criteria(sequences, None)[rows]
            tokens = tokens[:, None]
            if (~is_open).sum() >= FINISHED_SHARE * len(rows):
                stay = is_open.nonzero()[:, 0]
                rows, tokens, is_open, attention_mask = rows[stay], tokens[stay], is_open[stay], attention_mask[stay]
                states = states[stay]
                cache.self_attention_cache.batch_select_indices(stay)
                cache.cross_attention_cache.batch_select_indices(stay)
    return sequences.clone()  # outside of inference mode, so that the result is a normal tensor


def source_mask(encoder_outputs: BaseModelOutput | tuple, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the mask of the encoder's states: the encoder's own, if its fusion added tokens, or else the text's."""
    extended_mask = getattr(encoder_outputs, "attention_mask", None)
    return attention_mask if extended_mask is None else extended_mask


class GrowingLayer(DynamicLayer):
    """A cache layer with preallocated space: new tokens are written in place, without a copy of the earlier ones."""

    capacity = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[2]
        if total > self.capacity:
            self.capacity = total + CACHE_STEP
            batch_size, num_heads, _, head_dim = key_states.shape
            self.buffers = key_states.new_empty(2, batch_size, num_heads, self.capacity, head_dim)
            if length > 0:
                self.buffers[0, :, :, :length] = self.keys
                self.buffers[1, :, :, :length] = self.values
        self.buffers[0, :, :, length:total] = key_states
        self.buffers[1, :, :, length:total] = value_states
        self.keys, self.values = self.buffers[:, :, :, :total]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # copies the remaining rows, without preallocated space
        self.capacity = 0


@contextlib.contextmanager
def packed_linears(model: PreTrainedModel) -> Iterator[None]:
    """
    Within the block, run the model's float32 linear layers on a CPU with weights in oneDNN's packed layout.

    Decoding is two to three times faster (benchmarks/README.md), with the same results except for rounding. There are
    no gradients, and the weights must not change inside the block. On other devices, or if the packed copies would
    exceed `MAX_PACKED`, the layers stay unchanged.
    """
    linears = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and type(module.weight) is nn.Parameter  # not quantized
        and ("forward" not in module.__dict__ or module in PACKED)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    ]
    is_useful = torch.backends.mkldnn.is_available() and sum(linear.weight.nbytes for linear in linears) < MAX_PACKED
    is_useful = is_useful and not torch.is_autocast_enabled("cpu")  # its bfloat16 inputs do not match float32 weights
    packed = []
    try:
        with PACKING:
            for linear in linears if is_useful else []:
                packed.append(linear)
                pack_linear(linear)
        yield
    finally:
        with PACKING:
            for linear in packed:
                unpack_linear(linear)


# The packed layers: for each, the number of blocks that use it and the state of its weights when it was packed. Threads
# share the packed weights of a model, and the last thread that leaves its block unpacks them.
PACKED: weakref.WeakKeyDictionary[nn.Linear, tuple[int, tuple]] = weakref.WeakKeyDictionary()
PACKING = threading.Lock()


def pack_linear(linear: nn.Linear) -> None:
    """Replace the layer's `forward` by one with packed weights, and count one more user."""
    weight = linear.weight
    state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
    users, packed_state = PACKED.get(linear, (0, None))
    if packed_state != state:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        linear.forward = functools.partial(packed_linear, weight=packed, bias=linear.bias)
    PACKED[linear] = (users + 1, state)


def unpack_linear(linear: nn.Linear) -> None:
    """Count one user fewer, and restore the layer's own `forward` after the last one."""
    users, state = PACKED.get(linear, (0, None))
    if users > 1:
        PACKED[linear] = (users - 1, state)
    else:
        PACKED.pop(linear, None)
        linear.__dict__.pop("forward", None)


def packed_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@dataclass
class PackedChoices:
    """
    The targets of each problem's choices as one sequence: their common prefix once, then the rest of each target.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, packed_length)`):
            The decoder's input tokens.
        depth (`torch.LongTensor` of shape `(batch_size, packed_length)`):
            The position of each token in its own target.
        branch (`torch.LongTensor` of shape `(batch_size, packed_length)`):
            The index of each token's choice; -1 for the common prefix, -2 for padding.
        position (`torch.LongTensor` of shape `(num_labels,)`):
            For each target token, the index in `input_ids.flatten()` of the token before it.
        label (`torch.LongTensor` of shape `(num_labels,)`):
            The target tokens.
        choice (`torch.LongTensor` of shape `(num_labels,)`):
            For each target token, the index of its choice in the flattened `(batch_size, num_choices)`.
    """

    input_ids: torch.LongTensor
    depth: torch.LongTensor
    branch: torch.LongTensor
    position: torch.LongTensor
    label: torch.LongTensor
    choice: torch.LongTensor

    def attention(self) -> torch.BoolTensor:
        """Return the attention mask, `(batch_size, packed_length, packed_length)`: a token sees its target so far."""
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        is_own_target = (key == -1) | (key == query)
        return is_own_target & (self.depth[:, None, :] <= self.depth[:, :, None])


def pack_choices(choice_labels: torch.LongTensor, start_token_id: int) -> PackedChoices:
    """
    Pack the targets of each problem's choices into one sequence.

    Args:
        choice_labels (`torch.LongTensor` of shape `(batch_size, num_choices, target_length)`):
            The target of each choice, padded with -100. A problem with fewer choices has rows of -100 only.
        start_token_id (`int`):
            The decoder's start token.
    """
    num_choices = choice_labels.shape[1]
    packed, targets = [], []
    for number, rows in enumerate(choice_labels.tolist()):
        labels = {choice: [token for token in row if token != -100] for choice, row in enumerate(rows)}
        labels = {choice: tokens for choice, tokens in labels.items() if tokens}
        shared = shared_prefix(list(labels.values()))
        tokens = [(start_token_id, 0, -1), *((token, depth + 1, -1) for depth, token in enumerate(shared))]
        for choice, own in labels.items():
            flat = number * num_choices + choice
            targets.extend((number, depth, token, flat) for depth, token in enumerate(shared))
            before = len(shared)  # index of the token before the target's next token
            for depth in range(len(shared), len(own)):
                targets.append((number, before, own[depth], flat))
                if depth + 1 < len(own):
                    before = len(tokens)
                    tokens.append((own[depth], depth + 1, choice))
        packed.append(tokens)
    length = max(map(len, packed))
    padded = [tokens + [(start_token_id, 0, -2)] * (length - len(tokens)) for tokens in packed]
    input_ids, depth, branch = torch.tensor(padded, device=choice_labels.device).unbind(-1)
    number, position, label, choice = choice_labels.new_tensor(targets).view(-1, 4).unbind(-1)
    return PackedChoices(input_ids, depth, branch, number * length + position, label, choice)


def shared_prefix(targets: list[list[int]]) -> list[int]:
    """Return the common prefix of all targets, without the last token of the shortest target."""
    prefix: list[int] = []
    for tokens in zip(*(target[:-1] for target in targets), strict=False):
        if len(set(tokens)) > 1:
            break
        prefix.append(tokens[0])
    return prefix
