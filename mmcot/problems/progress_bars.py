"""Hides progress bars of libraries that would misdescribe the work of a command."""

import contextlib
from collections.abc import Iterator

import datasets


@contextlib.contextmanager
def without_dataset_bars() -> Iterator[None]:
    """Hide the bars of `datasets`, such as "Flattening the indices", or "Generating train split" for any split."""
    was_silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_silent:
            datasets.enable_progress_bars()
