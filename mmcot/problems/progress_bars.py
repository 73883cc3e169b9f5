"""Progress bars of libraries, where what they name is not what a command does."""

import contextlib
from collections.abc import Iterator

import datasets


@contextlib.contextmanager
def without_dataset_bars() -> Iterator[None]:
    """No bars of `datasets`: it tells of "Flattening the indices", or generates a "train split" of any split's rows."""
    was_silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_silent:
            datasets.enable_progress_bars()
