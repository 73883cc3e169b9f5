"""Some problems of a split: by id, by the text of a column, the first few. Nothing is known of models."""

import argparse
from collections.abc import Sequence

from datasets import Dataset

from mmcot.problems.schema import FEATURES, first_few, shown


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """The options of `select`, for a command."""
    parser.add_argument("--ids", nargs="+", metavar="ID", help="of these problems")
    parser.add_argument("--filter", action="append", default=[], metavar="COLUMN=TEXT", help="of those with that text")
    parser.add_argument("--limit", type=int, metavar="N", help="of the first N")


def select(
    problems: Dataset, ids: Sequence[str] | None = None, filters: Sequence[str] = (), limit: int | None = None
) -> Dataset:
    """
    The problems that are asked for, in the order of the dataset.

    Args:
        ids: of these problems.
        filters: `COLUMN=TEXT` each, which must all hold.
        limit: the first so many of what is left.

    Raises:
        ValueError: an id or a column that is not there, or nothing is left.
    """
    if ids is not None:
        absent = sorted(set(ids) - set(problems["id"]))
        if absent:
            raise ValueError(f"--ids: {len(absent)} of {len(ids)} are not in this split: {first_few(absent)}.")
        wanted = set(ids)
        problems = problems.select([row for row, name in enumerate(problems["id"]) if name in wanted])
    for text in filters:
        problems = filtered(problems, text)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"--limit is {limit}; expected 1 or more.")
        problems = problems.select(range(min(limit, len(problems))))
    return problems


def filtered(problems: Dataset, text: str) -> Dataset:
    column, separator, wanted = text.partition("=")
    known = [name for name, feature in FEATURES.items() if getattr(feature, "dtype", None) == "string"]
    if not separator or column not in known:
        raise ValueError(f"--filter is {text!r}; expected COLUMN=TEXT with a COLUMN of {', '.join(known)}.")
    rows = [row for row, value in enumerate(problems[column]) if value == wanted]
    if not rows:
        found = first_few([shown(value) for value in sorted(set(problems[column]))])
        raise ValueError(f"--filter {text}: no problem has that {column}; there are {found}.")
    return problems.select(rows)
