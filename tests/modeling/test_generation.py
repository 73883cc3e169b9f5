"""Optimized decoding (greedy search, packed weights, packed choices) gives the results of plain decoding."""

import functools
from itertools import pairwise

import pytest
import torch
from conftest import log_probability, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from modeling_mmcot.generation_mmcot import CACHE_STEP, GrowingLayer, greedy_search, packed_linears


@pytest.fixture
def model():
    """A model with large weights, so that a text has more than one distinct token."""
    model = tiny_model(vision_config=None, initializer_factor=3.0)
    model.generation_config.max_new_tokens = 40
    return model


@pytest.fixture
def sources():
    torch.manual_seed(0)
    input_ids = torch.randint(3, 60, (24, 9))
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, 24, 3):
        input_ids[row, 4:], attention_mask[row, 4:] = 0, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


class StaggeredEos(LogitsProcessor):
    """Ends the rows at different lengths; a row's index in the batch defines its length."""

    def __call__(self, input_ids, scores):
        for row in range(len(input_ids)):
            scores[row, 1] = 100.0 if input_ids.shape[1] > 2 + row % 11 else -100.0
        return scores


def record_batch_sizes(model):
    """A list to which each call of the decoder appends its number of rows."""
    sizes = []
    model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("ends", ["by_model", "staggered", "never"])
def test_greedy_search_equals_transformers(model, sources, ends):
    options = {"logits_processor": LogitsProcessorList([StaggeredEos()] if ends == "staggered" else [])}
    if ends == "never":
        options.update(suppress_tokens=[1], max_new_tokens=2 * CACHE_STEP + 10)
    expected = model.generate(**sources, **options)
    assert torch.equal(model.generate(**sources, **options, custom_generate=greedy_search), expected)
    lengths = (expected != 0).sum(dim=1)
    assert (len(lengths.unique()) > 5) == (ends == "staggered")


def test_removes_finished_texts_from_the_batch(model, sources):
    sizes = record_batch_sizes(model)
    options = {"logits_processor": LogitsProcessorList([StaggeredEos()])}
    tokens = model.generate(**sources, **options, custom_generate=greedy_search)
    real = int((tokens[:, 1:] != 0).sum())
    assert sizes[0] == 24 and sizes == sorted(sizes, reverse=True)
    assert sum(sizes) < 1.2 * real < 24 * len(sizes)


def test_growing_cache_equals_dynamic_cache_with_few_copies():
    torch.manual_seed(0)
    plain, growing, addresses = DynamicLayer(), GrowingLayer(), []
    for number in range(3 * CACHE_STEP):
        new = torch.randn(2, 6 if number <= CACHE_STEP else 3, 4, 1, 8)
        for expected, found in zip(plain.update(*new), growing.update(*new), strict=True):
            assert torch.equal(found, expected)
        addresses.append(growing.keys.data_ptr())
        if number == CACHE_STEP:
            for layer in (plain, growing):
                layer.batch_select_indices(torch.tensor([0, 2, 5]))
    assert sum(address != before for before, address in pairwise(addresses)) <= 5


def test_sampled_texts_share_one_encoding(model, sources):
    """For self-consistency: many texts of one problem, encoded once."""
    calls = []
    model.encoder.register_forward_hook(lambda _, args, output: calls.append(len(output.last_hidden_state)))
    torch.manual_seed(0)
    texts = model.generate(**sources, do_sample=True, num_return_sequences=4)
    assert len(texts) == 96 and calls == [24]


def test_packed_weights_change_neither_outputs_nor_the_model(model, sources):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plain = functools.partial(model, **sources, labels=sources["input_ids"])
    with torch.no_grad():
        expected, tokens = plain().logits, model.generate(**sources)
        with packed_linears(model):
            assert "forward" in model.lm_head.__dict__
            torch.testing.assert_close(plain().logits, expected, rtol=1e-5, atol=1e-4)
            assert torch.equal(model.generate(**sources), tokens)
        assert torch.equal(plain().logits, expected)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_does_not_pack_tensor_subclasses():
    """torchao's quantized weights are such a subclass, and have no oneDNN form."""

    class Quantized(torch.Tensor):
        pass

    model = tiny_model()
    layer = model.decoder.block[0].layer[0].SelfAttention.q
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantized), requires_grad=False)
    with packed_linears(model):
        assert "forward" not in layer.__dict__
        assert "forward" in model.decoder.block[0].layer[0].SelfAttention.k.__dict__


@pytest.mark.parametrize("max_packed_length", [256, 0])  # packed; one pass per choice
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    "choices",
    [
        [[[5, 6, 7, 1], [5, 6, 8, 1]], [[5, 6, 9, 10, 1], [5, 6, 9, 1]]],  # shared prefixes of different lengths
        [[[5, 1], [5, 1]], [[5, 6, 1], [5, 6, 1]]],  # the same choice twice
        [[[5, 6, 1], [5, 6, 7, 1]], [[9, 1], [11, 12, 13, 14, 15, 1]]],  # one ends earlier; no shared prefix
        [[[5, 6, 7, 1]], []],  # one choice; no choices
        [[], []],  # no choices in any problem
        [[[1], [5, 1]], [[5], [6]]],  # targets of one token
    ],
)
def test_packed_choices_score_like_separate_passes(sources, choices, scaled, max_packed_length, monkeypatch):
    monkeypatch.setattr("modeling_mmcot.modeling_mmcot.MAX_PACKED_LENGTH", max_packed_length)
    model = tiny_model(vision_config=None, scale_decoder_outputs=scaled, initializer_factor=2.0)
    source = {name: tensor[:2] for name, tensor in sources.items()}
    labels = torch.full((2, 2, 6), -100)
    for number, targets in enumerate(choices):
        for choice, tokens in enumerate(targets):
            labels[number, choice, : len(tokens)] = torch.tensor(tokens)
    scores = model.score_choices(labels, **source)
    for number, targets in enumerate(choices):
        for choice in range(2):
            if choice >= len(targets):
                assert scores[number, choice] == -torch.inf
                continue
            row = {name: tensor[number : number + 1] for name, tensor in source.items()}
            expected = log_probability(model, row, torch.tensor(targets[choice]))
            torch.testing.assert_close(scores[number, choice], expected, rtol=1e-4, atol=1e-4)


def test_decodes_choices_in_one_pass_without_copying_the_source(sources):
    model = tiny_model(vision_config=None)
    seen = []
    model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["input_ids"].shape, kwargs["encoder_hidden_states"].shape)),
        with_kwargs=True,
    )
    labels = torch.tensor([[[5, 6, 7, 8, 20, 9, 1], [5, 6, 7, 8, 21, 9, 1], [5, 6, 7, 8, 22, 9, 1]]]).expand(24, -1, -1)
    model.score_choices(labels, **sources)
    # The start token and four shared tokens, then two tokens of each choice, because its last one is only predicted.
    assert seen == [((24, 5 + 3 * 2), (24, 9, 32))]
