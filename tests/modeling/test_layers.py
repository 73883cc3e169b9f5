"""T5's activation and dropout in fewer passes: the same function, and the same distribution."""

import pytest
import torch
from conftest import TINY_TEXT, tiny_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from modeling_mmcot.layers_mmcot import UniformDropout

FLAN = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.1}


def test_flan_t5_activation_equals_transformers_within_rounding(batch, labels):
    model = tiny_model(vision_config=None, **FLAN)
    t5 = T5ForConditionalGeneration(T5Config(**{**TINY_TEXT, **FLAN})).eval()
    t5.load_state_dict(model.state_dict())
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = model(**texts, labels=labels), t5(**texts, labels=labels)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    ours.loss.backward(), theirs.loss.backward()
    for name, parameter in t5.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-5)


def test_replaces_every_dropout_of_t5_with_the_same_rate():
    model = tiny_model(**FLAN)
    parts = [*model.encoder.block.modules(), *model.decoder.modules(), model.encoder.dropout]
    dropouts = [module for module in parts if isinstance(module, nn.Dropout)]
    assert len(dropouts) > 10 and {(type(module), module.p) for module in dropouts} == {(UniformDropout, 0.1)}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_dropout_keeps_the_expected_fraction_and_scale(rate):
    torch.manual_seed(0)
    inputs = torch.ones(1000, 1000, requires_grad=True)
    outputs = UniformDropout(rate)(inputs)
    kept = outputs != 0
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=4e-3 * (1 - rate) ** 0.5)
    torch.testing.assert_close(outputs[kept], torch.full_like(outputs[kept], 1 / (1 - rate)))
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())
    torch.manual_seed(0)
    assert torch.equal(UniformDropout(rate)(inputs), outputs)
    assert UniformDropout(rate).eval()(inputs) is inputs and UniformDropout(0.0)(inputs) is inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.001, 0.01, 0.1])
def test_dropout_drops_the_expected_fraction_in_each_dtype(dtype, probability):
    torch.manual_seed(0)
    dropped = UniformDropout(probability).train()(torch.ones(2_000_000, dtype=dtype))
    assert (dropped == 0).float().mean().item() == pytest.approx(probability, rel=0.1)
