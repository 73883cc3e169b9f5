"""Prepares, trains, evaluates and publishes models. The package that ships to the Hub is `modeling_mmcot`."""

import logging

# PEFT imports bitsandbytes, which warns on some CPUs about a kernel that it cannot fetch and mmcot does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
