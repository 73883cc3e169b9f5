"""Prepares, trains, evaluates and publishes. What ships to the Hub is `modeling_mmcot`."""

import logging

# Which PEFT imports, and which warns on some CPUs of a kernel that it cannot fetch and that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
