"""Decoding without needless work: texts that are finished leave the batch, a token more does not copy those before it,
targets share what they begin with.

`greedy_search` is given to `generate` as `custom_generate`; what `pack_choices` gives is decoded by `score_choices`.
Nothing here knows of pictures: the encoder's states come fused.
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

from .versions_mmcot import CACHE

# Finished rows leave together, when they are this share of the batch: each leaving copies the cache of those that stay.
LEAVING_SHARE = 1 / 8
# Tokens for which the cache has room when it grows.
ROOM = 64
# Bytes of weights that are held a second time at most.
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
    What transformers' own greedy decoding gives, token for token; but a row that is finished leaves the batch.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, 1)`): the decoder's start tokens.
        logits_processor, stopping_criteria: see every row of the batch, finished or not, as in transformers.
        model_kwargs: as `generate` prepares them; `encoder_outputs` and their `attention_mask` are used.

    Returns:
        `torch.LongTensor` of shape `(batch_size, length)`: start token, text, eos, and pad tokens after it.
    """
    with torch.inference_mode():
        sequences, tokens = input_ids, input_ids
        # Not `pad_token_id`: where a model names none, `generate` pads with its eos.
        pad = generation_config._pad_token_tensor
        pad = input_ids.new_tensor(0) if pad is None else pad  # without any eos no text ends before the others
        rows = torch.arange(len(input_ids), device=input_ids.device)  # those in the batch, by number in `sequences`
        is_open = torch.ones_like(rows, dtype=torch.bool)  # of those in the batch, which are not finished
        states, attention_mask = model_kwargs["encoder_outputs"].last_hidden_state, model_kwargs["attention_mask"]
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
                every = logits.new_zeros(len(sequences), logits.shape[-1])
                every[rows] = logits
                logits = logits_processor(sequences, every)[rows]
            tokens = logits.argmax(dim=-1).where(is_open, pad)
            column = pad.expand(len(sequences), 1).clone()
            column[rows, 0] = tokens
            sequences = torch.cat([sequences, column], dim=1)
            is_open = is_open & ~stopping_criteria(sequences, None)[rows]
            tokens = tokens[:, None]
            if (~is_open).sum() >= LEAVING_SHARE * len(rows):
                stay = is_open.nonzero()[:, 0]
                rows, tokens, is_open, attention_mask = rows[stay], tokens[stay], is_open[stay], attention_mask[stay]
                states = states[stay]
                cache.self_attention_cache.batch_select_indices(stay)
                cache.cross_attention_cache.batch_select_indices(stay)
    return sequences.clone()  # outside of inference mode: a tensor like any other


class GrowingLayer(DynamicLayer):
    """A cache's layer with room for the tokens to come: they are written beside the earlier ones, which stay."""

    capacity = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[2]
        if total > self.capacity:
            self.capacity = total + ROOM
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
        super().batch_select_indices(indices)  # copies of those that stay, without room
        self.capacity = 0


@contextlib.contextmanager
def packed_linears(model: PreTrainedModel) -> Iterator[None]:
    """
    On a CPU, the model's float32 linear layers with their weights laid out as oneDNN reads them, which decodes two to
    three times faster (benchmarks/README.md). The same results but for rounding; without gradients, and the weights
    must not change meanwhile. Nothing happens on other devices, or where a second copy of the weights is too large.
    """
    linears = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and type(module.weight) is nn.Parameter  # not a quantized one
        and ("forward" not in module.__dict__ or module in PACKED)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    ]
    is_useful = torch.backends.mkldnn.is_available() and sum(linear.weight.nbytes for linear in linears) < MAX_PACKED
    is_useful = is_useful and not torch.is_autocast_enabled("cpu")  # whose bfloat16 inputs float32 weights do not take
    taken = []
    try:
        with PACKING:
            for linear in linears if is_useful else []:
                taken.append(linear)
                pack(linear)
        yield
    finally:
        with PACKING:
            for linear in taken:
                unpack(linear)


# Layers that are packed now, each with how many blocks use it and the state of its weights when it was packed. Threads
# share the packed weights of one model, and the last of them to leave unpacks it.
PACKED: weakref.WeakKeyDictionary[nn.Linear, tuple[int, tuple]] = weakref.WeakKeyDictionary()
PACKING = threading.Lock()


def pack(linear: nn.Linear) -> None:
    weight = linear.weight
    state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
    users, packed_state = PACKED.get(linear, (0, None))
    if packed_state != state:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        linear.forward = functools.partial(packed_linear, weight=packed, bias=linear.bias)
    PACKED[linear] = (users + 1, state)


def unpack(linear: nn.Linear) -> None:
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
    The targets of each problem's choices as one sequence: what all of them begin with once, then each one's own rest.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, packed_length)`): for the decoder.
        depth (`torch.LongTensor` of shape `(batch_size, packed_length)`): a token's position in its own target.
        branch (`torch.LongTensor` of shape `(batch_size, packed_length)`): its choice; -1 in what all share, -2 where
            there is nothing.
        position, label, choice (`torch.LongTensor` of shape `(num_labels,)`): each target token, after which token of
            `input_ids.flatten()` it stands, and the number of its choice in `(batch_size, num_choices)`, flattened.
    """

    input_ids: torch.LongTensor
    depth: torch.LongTensor
    branch: torch.LongTensor
    position: torch.LongTensor
    label: torch.LongTensor
    choice: torch.LongTensor

    def attention(self) -> torch.BoolTensor:
        """Which token sees which, `(batch_size, packed_length, packed_length)`: its own target so far."""
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        is_own_target = (key == -1) | (key == query)
        return is_own_target & (self.depth[:, None, :] <= self.depth[:, :, None])


def pack_choices(choice_labels: torch.LongTensor, start_token_id: int) -> PackedChoices:
    """
    Args:
        choice_labels (`torch.LongTensor` of shape `(batch_size, num_choices, target_length)`):
            Each choice's target, padded with -100. A problem with fewer choices has rows of -100 only.
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
            before = len(shared)  # the token after which the next one of this target stands
            for depth in range(len(shared), len(own)):
                targets.append((number, before, own[depth], flat))
                if depth + 1 < len(own):
                    before = len(tokens)
                    tokens.append((own[depth], depth + 1, choice))
        packed.append(tokens)
    length = max(map(len, packed))
    filled = [tokens + [(start_token_id, 0, -2)] * (length - len(tokens)) for tokens in packed]
    input_ids, depth, branch = torch.tensor(filled, device=choice_labels.device).unbind(-1)
    number, position, label, choice = choice_labels.new_tensor(targets).view(-1, 4).unbind(-1)
    return PackedChoices(input_ids, depth, branch, number * length + position, label, choice)


def shared_prefix(targets: list[list[int]]) -> list[int]:
    """What all targets begin with, short of the whole of the shortest one."""
    prefix: list[int] = []
    for tokens in zip(*(target[:-1] for target in targets), strict=False):
        if len(set(tokens)) > 1:
            break
        prefix.append(tokens[0])
    return prefix
