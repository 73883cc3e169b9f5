"""Faster versions of T5's activation and dropout, with fewer passes over memory.

The activation computes the same function, and the dropout has the same distribution. On two CPU cores, a training step
of a model in FLAN-T5-base's shape is 1.27 times faster with them (benchmarks/README.md).
"""

import torch
from torch import nn
from transformers.activations import GELUTanh, NewGELUActivation


class UniformDropout(nn.Dropout):
    """`nn.Dropout` that draws its mask on a CPU from uniform numbers, in half the time of Bernoulli sampling."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return inputs
        if inputs.device.type != "cpu":
            return super().forward(inputs)
        # In float32: random bfloat16 numbers have only 256 values from 0 to 1, too few to separate 0.1 % from 0.3 %.
        mask = torch.rand_like(inputs, dtype=torch.float32).ge_(self.p).div_(1 - self.p)
        return inputs * mask.to(inputs.dtype)


def use_fast_layers(model: nn.Module) -> None:
    """Replace `NewGELUActivation` (eight operations; PyTorch has a single one) and `nn.Dropout` in all submodules."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, GELUTanh())
            elif type(child) is nn.Dropout:
                setattr(module, name, UniformDropout(child.p))
