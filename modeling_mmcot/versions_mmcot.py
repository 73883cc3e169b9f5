"""Which versions this code runs with, and the one place that knows what differs between them.

Every shipped file that a loader opens first imports this one before anything else, so that a version outside of the
window is refused in one sentence. A difference names the version that brought it: delete it when the lower bound rises.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from importlib.metadata import version

PYTHON = (3, 11)
# Each library's lowest version, and the first that is too new (None where there is no reason for one).
WINDOWS: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "torch": ((2, 9), None),
    "transformers": ((5, 12), (6, 0)),  # a major version changes what remote code relies on
    "peft": ((0, 19), None),  # only where stages are adapters
}
REQUIRED = ("torch", "transformers")


def needed(name: str) -> str:
    """A library's window as pip takes it."""
    lowest, too_new = WINDOWS[name]
    return f"{name}>={'.'.join(map(str, lowest))}" + (f",<{too_new[0]}" if too_new else "")


def check_versions(*names: str) -> None:
    """
    Args:
        names: of libraries in `WINDOWS`.

    Raises:
        ImportError: Python or a library is outside of its window: what is installed, what is needed, what to type.
    """
    if sys.version_info[:2] < PYTHON:
        found, lowest = (".".join(map(str, numbers[:2])) for numbers in (sys.version_info, PYTHON))
        raise ImportError(f"mmcot needs Python {lowest} or newer, and this is {found}: python{lowest} -m venv .venv")
    for name in names:
        lowest, too_new = WINDOWS[name]
        installed = version(name)
        numbers = tuple(map(int, re.findall(r"\d+", installed)[:2]))
        if numbers < lowest or (too_new is not None and numbers >= too_new):
            raise ImportError(
                f"mmcot needs {needed(name)}, and {name} {installed} is installed: pip install '{needed(name)}'"
            )


check_versions(*REQUIRED)

from transformers import PreTrainedModel  # noqa: E402 (only after the check)
from transformers.models.t5.modeling_t5 import T5Stack  # noqa: E402

# transformers 5.24 renamed the cache that T5's decoder takes and returns, from `past_key_values` to `cache`.
CACHE = "cache" if "cache" in inspect.signature(T5Stack.forward).parameters else "past_key_values"

# transformers 5.13 asks `is_custom_code` before it initializes a module's weights; before, `is_remote_code`.
CUSTOM_CODE_METHOD = "is_custom_code" if hasattr(PreTrainedModel, "is_custom_code") else "is_remote_code"


def takes_cache_by_either_name(forward: Callable) -> Callable:
    """A `forward` with an argument `cache`, which may be given as `past_key_values` too (before transformers 5.24)."""

    @functools.wraps(forward)
    def wrapped(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("cache and past_key_values were both given: they are one argument's two names.")
            kwargs["cache"] = past_key_values
        return forward(self, *args, **kwargs)

    return wrapped
