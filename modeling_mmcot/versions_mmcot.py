"""The supported versions of Python and libraries, and all code that depends on differences between versions.

Every entry file of a loader imports this file before anything else, so that an unsupported version is reported in one
sentence. Each difference names the version that introduced it: delete it when the lower bound rises above that version.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from importlib.metadata import version

PYTHON = (3, 11)
# Lowest supported version of each library, and the first unsupported one (None if there is no known limit).
WINDOWS: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "torch": ((2, 9), None),
    "transformers": ((5, 12), (6, 0)),  # a major version changes the interfaces that remote code uses
    "peft": ((0, 19), None),  # only if stages are adapters
}
REQUIRED = ("torch", "transformers")


def requirement(name: str) -> str:
    """Return a library's supported versions as a pip requirement."""
    lowest, too_new = WINDOWS[name]
    return f"{name}>={'.'.join(map(str, lowest))}" + (f",<{too_new[0]}" if too_new else "")


def check_versions(*names: str) -> None:
    """
    Check the versions of Python and libraries.

    Args:
        names (`str`):
            Names of libraries in `WINDOWS`.

    Raises:
        ImportError: If a version is not supported; the message contains the installed and the required version, and
            the command to install it.
    """
    if sys.version_info[:2] < PYTHON:
        found, lowest = (".".join(map(str, numbers[:2])) for numbers in (sys.version_info, PYTHON))
        raise ImportError(f"mmcot needs Python {lowest} or newer, but this is {found}: python{lowest} -m venv .venv")
    for name in names:
        lowest, too_new = WINDOWS[name]
        installed = version(name)
        numbers = tuple(map(int, re.findall(r"\d+", installed)[:2]))
        if numbers < lowest or (too_new is not None and numbers >= too_new):
            raise ImportError(
                f"mmcot needs {requirement(name)}, but {name} {installed} is installed: "
                f"pip install '{requirement(name)}'"
            )


check_versions(*REQUIRED)

from transformers import PreTrainedModel  # noqa: E402 (only after the check)
from transformers.models.t5.modeling_t5 import T5Stack  # noqa: E402

# transformers 5.24 renamed the cache argument and output of T5's decoder from `past_key_values` to `cache`.
CACHE = "cache" if "cache" in inspect.signature(T5Stack.forward).parameters else "past_key_values"

# transformers 5.13 calls `is_custom_code` before it initializes a module's weights; earlier versions `is_remote_code`.
CUSTOM_CODE_METHOD = "is_custom_code" if hasattr(PreTrainedModel, "is_custom_code") else "is_remote_code"


def takes_cache_by_either_name(forward: Callable) -> Callable:
    """Make a `forward` accept its argument `cache` also as `past_key_values`, its name before transformers 5.24."""

    @functools.wraps(forward)
    def wrapped(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("cache and past_key_values were both given: they are two names of one argument.")
            kwargs["cache"] = past_key_values
        return forward(self, *args, **kwargs)

    return wrapped
