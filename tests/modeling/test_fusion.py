"""The fusions: the paper's five equations, masks, unchanged rows. test_convert.py tests the authors' form."""

import numpy as np
import pytest
import torch

from modeling_mmcot.fusion_mmcot import FUSIONS, GatedFusion, build_fusion


@pytest.fixture(params=FUSIONS)
def fusion(request):
    torch.manual_seed(0)
    return build_fusion(request.param, hidden_size=16, vision_hidden_size=12).double()


@pytest.fixture
def states():
    torch.manual_seed(1)
    return torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 7, 12, dtype=torch.float64)


def test_equals_the_papers_five_equations_in_float64(states):
    torch.manual_seed(0)
    fusion = GatedFusion(hidden_size=16, vision_hidden_size=12).double()
    hidden_states, features = states
    mask = torch.ones(3, 7, dtype=torch.bool)
    h_lang, x_vis = hidden_states.numpy(), features.numpy()
    w_h, w_l, w_v = (
        layer.weight.detach().numpy() for layer in (fusion.vision_projection, fusion.language_gate, fusion.vision_gate)
    )
    expected, attentions, gates = np.empty_like(h_lang), np.empty((3, 5, 7)), np.empty_like(h_lang)
    for row in range(3):
        h_vis = x_vis[row] @ w_h.T
        logits = h_lang[row] @ h_vis.T / np.sqrt(16)
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        attentions[row] = weights
        h_attn = weights @ h_vis
        gate = 1 / (1 + np.exp(-(h_lang[row] @ w_l.T + h_attn @ w_v.T)))
        gates[row] = gate
        expected[row] = (1 - gate) * h_lang[row] + gate * h_attn
    fused, fusion_attentions, fusion_gate = fusion(hidden_states, features, mask)
    np.testing.assert_allclose(fused.detach().numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fusion_attentions.detach().numpy(), attentions, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fusion_gate.detach().numpy(), gates, rtol=0, atol=1e-12)


def test_ignores_masked_patches(fusion, states):
    hidden_states, features = states
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[:, 5:] = False
    fused, attentions, _ = fusion(hidden_states, features, mask)
    assert torch.equal(fused, fusion(hidden_states, features * mask[..., None], mask)[0])
    shorter, *_ = fusion(hidden_states, features[:, :5], mask[:, :5])
    torch.testing.assert_close(fused, shorter, rtol=0, atol=1e-12)
    assert attentions[..., 5:].eq(0).all()
    torch.testing.assert_close(attentions.sum(dim=-1), torch.ones(3, 5, dtype=torch.float64))


def test_row_without_patches_keeps_its_states_and_finite_gradients(fusion, states):
    hidden_states, features = states
    hidden_states.requires_grad_()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1] = False
    fused, attentions, _ = fusion(hidden_states, features, mask)
    assert torch.equal(fused[1], hidden_states[1]) and attentions[1].eq(0).all()
    assert not torch.equal(fused[0], hidden_states[0])
    fused.sum().backward()
    assert torch.equal(hidden_states.grad[1], torch.ones(5, 16, dtype=torch.float64))
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


def test_lists_known_fusions_for_an_unknown_name():
    with pytest.raises(ValueError, match="'gatd'.*gated.*gated_mha"):
        build_fusion("gatd", 16, 12)


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignores_nan_and_infinity_in_masked_patches(name, value):
    torch.manual_seed(0)
    fusion = build_fusion(name, 8, 6)
    states, patches = torch.randn(2, 3, 8), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    expected, *_ = fusion(states, patches, mask)
    patches[~mask] = value
    fused, weights, _ = fusion(states, patches.requires_grad_(), mask)
    torch.testing.assert_close(fused, expected)
    fused.sum().backward()
    assert patches.grad.isfinite().all() and weights.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters() if parameter.grad is not None)
