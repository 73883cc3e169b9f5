"""Hides progress bars of libraries that misdescribe the work of a command."""

import contextlib
from collections.abc import Iterator

import datasets


@contextlib.contextmanager
def without_dataset_bars() -> Iterator[None]:
    """Hide the bars of `datasets`, such as "Flattening the indices", or "Generating train split" for any split."""
    were_hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            datasets.enable_progress_bars()
