"""Loads a source of problems as a `datasets.Dataset` of the schema. `opening.py` opens it; this module reads its rows.

It also defines how a command gets a source: `--dataset`, `--columns`, `--split_seed`, or a dataset from Python.
"""

import argparse
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher

from mmcot.problems import columns as columns_module
from mmcot.problems import schema as schema_module
from mmcot.problems.columns import Plan, is_absent, log_once, parse_columns, plan_columns
from mmcot.problems.known_datasets import is_known, load_known
from mmcot.problems.opening import IN_PYTHON, SOURCES, Given, Table, open_source
from mmcot.problems.schema import (
    FEATURES,
    SPLITS,
    PicturePaths,
    check_fields,
    check_ids,
    normalize_split,
    with_all_columns,
    with_pictures,
)
from mmcot.problems.splits import SPLIT_SEED, content_key, draw_split, picture_keys
from mmcot.storage.files import cache_folder

logger = logging.getLogger(__name__)

BATCH = 64  # rows that are read together; small, because rows may contain pictures


def load_problems(
    source: str | Path | Given,
    split: str,
    max_images: int | None = None,
    pictures: bool = True,
    columns: str | Mapping[str, str] | None = None,
    split_seed: int = SPLIT_SEED,
    extra_columns: Sequence[str] = (),
) -> datasets.Dataset:
    """
    Load the problems of a split.

    Args:
        source: one of
            - `demo`, a harder one such as `demo:2`, or `demo:SKILL` for the problems of one skill (`demo.generate`);
            - `study[:FAMILY,…][@DIFFICULTY]` (`study.generate`);
            - a ScienceQA folder: `problems.json`, `pid_splits.json`, `images/SPLIT/ID/image.png`, and optionally
              `captions.json`;
            - an A-OKVQA folder: `aokvqa_v1p0_SPLIT.json`, and COCO's `coco/SPLIT2017/IMAGE_ID.jpg` in it or beside it;
            - a `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.arrow` file of rows, or one file for each split
              (`train=FILE,val=FILE,test=FILE`);
            - a folder with `metadata.jsonl` or `metadata.csv` and pictures, a folder of Parquet or Arrow files, or the
              output of `save_to_disk`;
            - a dataset of the Hub, by its id or `hf://datasets/…`;
            - a `datasets.Dataset` or `datasets.DatasetDict`.
        split: `train`, `val` (also `validation`) or `test`.
        max_images: the largest number of pictures of a problem. Only the first pictures of a ScienceQA problem are
            read: `image.png`, then those of its choices, `choice_0.png` and so on. With 1, this is the picture that
            the original code reads. In any other source, a row with more pictures is an error.
        pictures: whether the files of the pictures must exist.
        columns: `OURS=THEIRS,…` or a mapping, if the source has other column names.
        split_seed: the seed that divides rows without `split` (`splits.py`).
        extra_columns: columns beside the schema to keep, as texts.

    Raises:
        ValueError: with the file or id, the field, the value found and the value expected.
    """
    split, columns = normalize_split(split, name_of(source)), parse_columns(columns)
    extra_columns = tuple(name for name in extra_columns if name not in FEATURES)
    if is_known_source(source):
        if columns or extra_columns:
            raise ValueError(
                f"{source} has the columns of its release: there is no {first_of(columns, extra_columns)!r}."
            )
        return load_known(str(source), split, max_images, pictures)
    reader = reader_of(source, split, columns, split_seed, extra_columns)
    reader.max_images = max_images
    reader.paths = replace(reader.paths, must_exist=pictures)
    problems = reader.problems()
    check_ids(problems["id"], reader.name)
    if reader.is_divided:
        log_once(
            logger,
            f"{reader.name}: no row has a split, so a hash of each row's content and split_seed {split_seed} divides "
            f"the rows 8:1:1; {split} has {len(problems)} of {len(reader.table.rows)}",
        )
    return problems


def first_of(*names: Sequence[str] | Mapping[str, str]) -> str:
    """Return the first of the user's column names."""
    return next(iter([*names[0].values(), *names[1]]))


def is_divided(source: str | Path | Given, columns: str | Mapping[str, str] | None = None) -> bool:
    """Whether no row has a split, so that `load_problems` divides the rows."""
    if is_known_source(source):
        return False
    tables = open_source(source)
    return None in tables and reader_of(source, SPLITS[0], parse_columns(columns), SPLIT_SEED, ()).is_divided


def name_of(source: str | Path | Given) -> str:
    """Return the name of a source, for errors and records."""
    return str(source) if isinstance(source, (str, Path)) else IN_PYTHON


def is_known_source(source: str | Path | Given) -> bool:
    """Whether a source is a known dataset in the form of its release (`known_datasets.py`)."""
    return isinstance(source, (str, Path)) and is_known(str(source))


def splits_of(source: str | Path | Given) -> list[str]:
    """Return the splits of a source."""
    tables = {None: None} if is_known_source(source) else open_source(source)
    return [split for split in SPLITS if None in tables or split in tables]


def stream_rows(source: str | Path, columns: str | Mapping[str, str] | None) -> datasets.IterableDataset:
    """
    Return a stream of the training problems, which are read and checked row by row and not kept.

    Raises:
        ValueError: the source is neither a dataset of the Hub nor a folder of Parquet files, or has no named splits.
    """
    tables = {} if is_known_source(source) else open_source(source, streaming=True)
    if not tables or not isinstance(next(iter(tables.values())).rows, datasets.IterableDataset):
        raise ValueError(
            f"dataset is {name_of(source)!r}; streaming reads a dataset of the Hub, by its id or its Parquet files."
        )
    if "train" not in tables:
        raise ValueError(f"{name_of(source)}: streaming needs a split named train, beside validation and test.")
    return table_reader(tables["train"], "train", True, parse_columns(columns), SPLIT_SEED, ()).mapped()


def reader_of(
    source: str | Path | Given, split: str, columns: dict[str, str], split_seed: int, extra_columns: tuple[str, ...]
) -> "Reader":
    tables = open_source(source)
    if split not in tables and None not in tables:
        raise ValueError(
            f"{name_of(source)} has no split {split!r}; found "
            f"{', '.join(map(str, tables))}. Name one file for each split as train=FILE,val=FILE,test=FILE."
        )
    return table_reader(tables.get(split) or tables[None], split, split in tables, columns, split_seed, extra_columns)


def table_reader(
    table: Table, split: str, is_whole: bool, columns: dict[str, str], split_seed: int, extra_columns: tuple[str, ...]
) -> "Reader":
    """
    Return the reader of a table.

    Args:
        is_whole: whether all rows of the table belong to the split.

    Raises:
        ValueError: only some of the rows have a split.
    """
    columns = {**table.columns, **columns}
    plan = plan_columns(table.found_columns(), table.name, columns, extra_columns, table.are_cells, table.labels())
    is_divided = False
    if not is_whole:
        absent, total = count_without_split(table, plan), len(table.rows)
        if 0 < absent < total:
            raise ValueError(
                f"{table.name}: {absent} of {total} rows have no split and the others have one; expected a split in "
                f"all rows or in none."
            )
        is_divided = absent == total
    return Reader(table.name, plan, table.paths, split, is_whole, is_divided, split_seed, table)


def count_without_split(table: Table, plan: Plan) -> int:
    """Return the number of rows that do not name their split."""
    theirs = plan.names.get("split")
    if theirs is None:
        return len(table.rows)
    return sum(is_absent(value) or value == "" for value in table.values(theirs))


@dataclass
class Reader:
    """
    Reads the rows of a table that belong to one split, as problems.

    Args:
        is_whole: whether all rows belong to the split, even if they name another.
        is_divided: whether no row names its split.
    """

    name: str
    plan: Plan
    paths: PicturePaths
    split: str
    is_whole: bool
    is_divided: bool
    split_seed: int
    table: Table | None = None
    max_images: int | None = None

    def problems(self) -> datasets.Dataset:
        """Return the problems of the split."""
        features, rows = self.features(), self.table.rows
        if not isinstance(rows, list) and len(rows):
            return self.mapped()
        read = (self.read(raw, number, where) for number, (where, raw) in enumerate(rows))
        complete = [row for row in read if row is not None]
        # By column, because Dataset.from_list fails for a split without rows.
        return datasets.Dataset.from_dict({name: [row[name] for row in complete] for name in features}, features)

    def features(self) -> datasets.Features:
        """Return the features of the schema and of the extra columns."""
        return datasets.Features({**FEATURES, **dict.fromkeys(self.plan.extra_columns, datasets.Value("string"))})

    def mapped(self) -> datasets.Dataset | datasets.IterableDataset:
        """Convert rows on disk to problems on disk, or a stream to a stream."""
        rows, read = self.table.rows, replace(self, table=None).read_batch
        options: dict[str, Any] = {"batched": True, "batch_size": BATCH, "with_indices": True}
        options |= {"remove_columns": rows.column_names, "features": self.features()}
        if isinstance(rows, datasets.IterableDataset):
            return rows.map(read, **options)
        modules = (columns_module, schema_module, inspect.getmodule(Reader))
        # `datasets` does not detect changes of this code.
        code = [inspect.getsource(module) for module in modules]
        key = Hasher.hash((self.table.digest, vars(replace(self, table=None)), code))
        file = cache_folder() / "problems" / f"{key}.arrow"
        file.parent.mkdir(parents=True, exist_ok=True)
        options |= {"cache_file_name": str(file), "new_fingerprint": key, "desc": f"reading {self.name}"}
        # A division also depends on the content of pictures outside of the table, which the key does not cover.
        is_cacheable = not self.is_divided or self.paths.folder is None
        return rows.map(read, load_from_cache_file=is_cacheable, **options)

    def read_batch(self, columns: dict[str, list], numbers: list[int]) -> dict[str, list]:
        raws = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        rows = (
            self.read(raw, number, f"{self.name}, row {number + 1}") for raw, number in zip(raws, numbers, strict=True)
        )
        complete = [row for row in rows if row is not None]
        return {name: [row[name] for row in complete] for name in self.features()}

    def read(self, raw: Mapping[str, Any], number: int, where: str) -> dict[str, Any] | None:
        """Return the problem of a row, or None if it belongs to another split."""
        row = self.plan.row(raw, where)
        if not self.is_divided and self.split_of(row.pop("split", None), where) != self.split:
            return None
        row = with_all_columns({"id": f"{self.split}-{number}", **row, "split": self.split})
        where = f"{where}, problem {row['id']}"
        check_fields(row, where)
        if self.is_divided:
            key = content_key(row, picture_keys(row["images"], self.paths, where))
            if draw_split(key, self.split_seed) != self.split:
                return None
        return with_pictures(row, where, self.paths, self.max_images)

    def split_of(self, named: Any, where: str) -> str:
        """Return the split of a row. `named` is the value of its column; the split of a whole table overrides it."""
        if not self.is_whole:
            return normalize_split(named, where)
        if named is not None and named != "" and normalize_split(named, where) != self.split:
            log_once(logger, f"{self.name}: given as {self.split}, which overrides rows that name another split")
        return self.split


# The options of a source in a command.


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """Add `--columns` and `--split_seed` to a command that reads a dataset. (`arguments.py` has those of a recipe.)"""
    parser.add_argument("--columns", metavar="OURS=THEIRS,…", help="the dataset's columns, if they have other names")
    parser.add_argument("--split_seed", type=int, default=SPLIT_SEED, help="the seed that divides rows without a split")


def reading_options(arguments: Any) -> dict[str, Any]:
    """Return the options of a command or a recipe as keywords of `load_problems`."""
    return {"columns": arguments.columns, "split_seed": arguments.split_seed}


def non_default_options(arguments: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults, in the form of a command line."""
    columns = ",".join(f"{ours}={theirs}" for ours, theirs in parse_columns(arguments.columns).items())
    found = {"columns": columns, "split_seed": arguments.split_seed}
    return {name: value for name, value in found.items() if value not in ("", SPLIT_SEED)}


def choose_source(arguments: argparse.Namespace, given: Given | None) -> str | Given:
    """
    Return `--dataset` or the dataset of a Python caller. The latter's name in records becomes `arguments.dataset`.

    Raises:
        ValueError: neither or both are given.
    """
    if given is None:
        if arguments.dataset is None:
            raise ValueError(f"--dataset is missing: {SOURCES}.")
        return arguments.dataset
    if arguments.dataset is not None:
        raise ValueError(
            f"--dataset is {arguments.dataset!r}, but a dataset was also given in Python: give one of them."
        )
    arguments.dataset = IN_PYTHON
    return given


def load_all_splits(
    source: str | Given, splits: Iterable[str], max_images: int | None, pictures: bool, **reading: Any
) -> Dataset:
    """
    Load the problems of several splits as one dataset.

    Args:
        reading: further keywords of `load_problems`.
    """
    problems = [load_problems(source, split, max_images, pictures, **reading) for split in splits]
    return concatenate_datasets([part for part in problems if len(part)] or problems[:1])
