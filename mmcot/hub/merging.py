"""Checks that an adapter can be merged: no adapted module may share its weight, because merging changes that weight."""

from collections.abc import Sequence

from peft import (
    PeftModel,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


def shared_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that share their weight with another module."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            holders.setdefault(id(module.weight), []).append(name)
    return [name for names in holders.values() if len(names) > 1 for name in names]


def adapted_modules(model: PeftModel) -> list[str]:
    """Return the names, in the base, of the modules that the adapter changes or replaces."""
    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return [name for name, module in model.get_base_model().named_modules() if isinstance(module, kinds)]


def check_not_adapted(model: PeftModel, shared: Sequence[str]) -> None:
    """
    Check that an adapter can be merged.

    Raises:
        ValueError: the adapter changes a module that shares its weight with other modules.
    """
    for name in adapted_modules(model):
        if name in shared:
            raise ValueError(
                f"An adapter changes {name}, which shares its weight with other modules: merging would change them "
                f"too. Remove {name} from the adapter's modules."
            )
