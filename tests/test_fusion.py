"""The fusion: the paper's five equations, masks, and what it leaves alone."""

import numpy as np
import pytest
import torch

from modeling_mmcot.fusion_mmcot import GatedFusion, build_fusion


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    return GatedFusion(hidden_size=16, vision_hidden_size=12).double()


@pytest.fixture
def states():
    torch.manual_seed(1)
    return torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 7, 12, dtype=torch.float64)


def test_equals_the_five_equations_in_float64(fusion, states):
    hidden_states, features = states
    mask = torch.ones(3, 7, dtype=torch.bool)
    h_lang, x_vis = hidden_states.numpy(), features.numpy()
    w_h, w_l, w_v = (
        layer.weight.detach().numpy() for layer in (fusion.vision_projection, fusion.language_gate, fusion.vision_gate)
    )
    expected = np.empty_like(h_lang)
    for row in range(3):
        h_vis = x_vis[row] @ w_h.T
        logits = h_lang[row] @ h_vis.T / np.sqrt(16)
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        h_attn = weights @ h_vis
        gate = 1 / (1 + np.exp(-(h_lang[row] @ w_l.T + h_attn @ w_v.T)))
        expected[row] = (1 - gate) * h_lang[row] + gate * h_attn
    np.testing.assert_allclose(fusion(hidden_states, features, mask).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_a_masked_patch_is_as_if_it_were_not_there(fusion, states):
    hidden_states, features = states
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[:, 5:] = False
    shorter = fusion(hidden_states, features[:, :5], mask[:, :5])
    assert torch.equal(fusion(hidden_states, features, mask), fusion(hidden_states, features * mask[..., None], mask))
    torch.testing.assert_close(fusion(hidden_states, features, mask), shorter, rtol=0, atol=1e-12)


def test_a_row_without_patches_keeps_its_states_and_gives_a_finite_gradient(fusion, states):
    hidden_states, features = states
    hidden_states.requires_grad_()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1] = False
    fused = fusion(hidden_states, features, mask)
    assert torch.equal(fused[1], hidden_states[1])
    assert not torch.equal(fused[0], hidden_states[0])
    fused.sum().backward()
    assert torch.equal(hidden_states.grad[1], torch.ones(5, 16, dtype=torch.float64))
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'gatd'.*gated"):
        build_fusion("gatd", 16, 12)
