"""Re-export of `MMCoTConfig`. The class is defined in `modeling_mmcot`, with the other code that ships to the Hub."""

from modeling_mmcot.configuration_mmcot import MMCoTConfig

__all__ = ["MMCoTConfig"]
