"""Whether adapters can be merged into their base: a module whose weight is shared cannot."""

from collections.abc import Sequence

from peft import (
    PeftModel,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


def shared_modules(model: nn.Module) -> list[str]:
    """Names of the modules whose weight is another module's too."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            holders.setdefault(id(module.weight), []).append(name)
    return [name for names in holders.values() if len(names) > 1 for name in names]


def adapted_modules(model: PeftModel) -> list[str]:
    """By their names in the base, those that the adapter changes or replaces."""
    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return [name for name, module in model.get_base_model().named_modules() if isinstance(module, kinds)]


def check_not_adapted(model: PeftModel, shared: Sequence[str]) -> None:
    """
    Raises:
        ValueError: the adapter changes a module whose weight others share.
    """
    for name in adapted_modules(model):
        if name in shared:
            raise ValueError(
                f"An adapter of {name}: its weight is other modules' too, which merging would change: leave it out."
            )
