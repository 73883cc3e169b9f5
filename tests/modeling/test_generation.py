"""Decoding without needless work gives what decoding with it gives."""

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
    """Weights of some size, so that what is generated is not one token only."""
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


class LikesEos(LogitsProcessor):
    """Ends each row at a length of its own; knows a row by its place in the batch."""

    def __call__(self, input_ids, scores):
        for row in range(len(input_ids)):
            scores[row, 1] = 100.0 if input_ids.shape[1] > 2 + row % 11 else -100.0
        return scores


def rows_decoded(model):
    """How many rows each call of the decoder had."""
    sizes = []
    model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("ends", ["as_they_will", "one_after_another", "never"])
def test_greedy_search_gives_the_tokens_of_transformers(model, sources, ends):
    options = {"logits_processor": LogitsProcessorList([LikesEos()] if ends == "one_after_another" else [])}
    if ends == "never":
        options.update(suppress_tokens=[1], max_new_tokens=2 * CACHE_STEP + 10)
    expected = model.generate(**sources, **options)
    assert torch.equal(model.generate(**sources, **options, custom_generate=greedy_search), expected)
    lengths = (expected != 0).sum(dim=1)
    assert (len(lengths.unique()) > 5) == (ends == "one_after_another")


def test_finished_texts_leave_the_batch(model, sources):
    sizes = rows_decoded(model)
    options = {"logits_processor": LogitsProcessorList([LikesEos()])}
    tokens = model.generate(**sources, **options, custom_generate=greedy_search)
    real = int((tokens[:, 1:] != 0).sum())
    assert sizes[0] == 24 and sizes == sorted(sizes, reverse=True)
    assert sum(sizes) < 1.2 * real < 24 * len(sizes)


def test_a_growing_cache_holds_what_a_plain_one_does_and_seldom_copies():
    torch.manual_seed(0)
    plain, growing, places = DynamicLayer(), GrowingLayer(), []
    for number in range(3 * CACHE_STEP):
        new = torch.randn(2, 6 if number <= CACHE_STEP else 3, 4, 1, 8)
        for expected, found in zip(plain.update(*new), growing.update(*new), strict=True):
            assert torch.equal(found, expected)
        places.append(growing.keys.data_ptr())
        if number == CACHE_STEP:
            for layer in (plain, growing):
                layer.batch_select_indices(torch.tensor([0, 2, 5]))
    assert sum(place != before for before, place in pairwise(places)) <= 5


def test_sampled_texts_share_one_encoding(model, sources):
    """Self-consistency: many texts of one problem, read once."""
    calls = []
    model.encoder.register_forward_hook(lambda _, args, output: calls.append(len(output.last_hidden_state)))
    torch.manual_seed(0)
    texts = model.generate(**sources, do_sample=True, num_return_sequences=4)
    assert len(texts) == 96 and calls == [24]


def test_packed_weights_give_the_same_and_leave_the_model_as_it_was(model, sources):
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


def test_weights_of_another_kind_are_not_packed():
    """torchao's quantized ones are such a subclass, and have no oneDNN form."""

    class Quantized(torch.Tensor):
        pass

    model = tiny_model()
    layer = model.decoder.block[0].layer[0].SelfAttention.q
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantized), requires_grad=False)
    with packed_linears(model):
        assert "forward" not in layer.__dict__
        assert "forward" in model.decoder.block[0].layer[0].SelfAttention.k.__dict__


@pytest.mark.parametrize("max_packed_length", [256, 0])  # packed; in a pass for each choice
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    "choices",
    [
        [[[5, 6, 7, 1], [5, 6, 8, 1]], [[5, 6, 9, 10, 1], [5, 6, 9, 1]]],  # all begin alike, unlike far
        [[[5, 1], [5, 1]], [[5, 6, 1], [5, 6, 1]]],  # the same choice twice
        [[[5, 6, 1], [5, 6, 7, 1]], [[9, 1], [11, 12, 13, 14, 15, 1]]],  # one begins as the other ends; nothing alike
        [[[5, 6, 7, 1]], []],  # one choice; none
        [[], []],  # none at all
        [[[1], [5, 1]], [[5], [6]]],  # of one token
    ],
)
def test_packed_choices_score_as_separate_passes(sources, choices, scaled, max_packed_length, monkeypatch):
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


def test_choices_are_decoded_in_one_pass_without_copies_of_the_source(sources):
    model = tiny_model(vision_config=None)
    seen = []
    model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["input_ids"].shape, kwargs["encoder_hidden_states"].shape)),
        with_kwargs=True,
    )
    labels = torch.tensor([[[5, 6, 7, 8, 20, 9, 1], [5, 6, 7, 8, 21, 9, 1], [5, 6, 7, 8, 22, 9, 1]]]).expand(24, -1, -1)
    model.score_choices(labels, **sources)
    # The start and four tokens that all share, then two tokens of each choice: the last one is only predicted.
    assert seen == [((24, 5 + 3 * 2), (24, 9, 32))]
