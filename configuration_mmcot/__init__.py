"""`MMCoTConfig` by its own name. The class lives in `modeling_mmcot`, with the rest of what ships to the Hub."""

from modeling_mmcot.configuration_mmcot import MMCoTConfig

__all__ = ["MMCoTConfig"]
