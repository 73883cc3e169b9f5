"""A source of problems -> `datasets.Dataset` of the one schema: what is opened (`opening.py`) read row by row.

Here too is how a command is told of a source: `--dataset`, `--columns`, `--split_seed`, or a dataset given in Python.
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
from mmcot.problems import schema as problems_module
from mmcot.problems.columns import Plan, is_absent, log_once, parse_columns, plan_columns
from mmcot.problems.known_datasets import is_known, load_known
from mmcot.problems.opening import IN_PYTHON, SOURCES, Given, Table, open_source
from mmcot.problems.schema import (
    FEATURES,
    SPLITS,
    PicturePaths,
    check_fields,
    check_ids,
    split_named,
    with_all_columns,
    with_pictures,
)
from mmcot.problems.splits import SPLIT_SEED, content_key, drawn_split, picture_keys
from mmcot.storage.files import cache_folder

logger = logging.getLogger(__name__)

BATCH = 64  # rows that are read together; they hold their pictures


def load_problems(
    source: str | Path | Given,
    split: str,
    max_images: int | None = None,
    pictures: bool = True,
    columns: str | Mapping[str, str] | None = None,
    split_seed: int = SPLIT_SEED,
    keep: Sequence[str] = (),
) -> datasets.Dataset:
    """
    Args:
        source: one of
            - `demo`, `demo:2` and so on for a harder one, `demo:SKILL` for one skill's problems (`demo.generate`);
            - a ScienceQA folder: `problems.json`, `pid_splits.json`, `images/SPLIT/ID/image.png`, perhaps
              `captions.json`;
            - an A-OKVQA folder: `aokvqa_v1p0_SPLIT.json`, and COCO's `coco/SPLIT2017/IMAGE_ID.jpg` in it or beside it;
            - a `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.arrow` file of rows, or one for each split
              (`train=FILE,val=FILE,test=FILE`);
            - a folder with `metadata.jsonl` or `metadata.csv` and pictures, one of Parquet or Arrow files, or one that
              `save_to_disk` wrote;
            - a dataset of the Hub, by its id or `hf://datasets/…`;
            - a `datasets.Dataset` or `datasets.DatasetDict`.
        split: `train`, `val` (also `validation`) or `test`.
        max_images: the most pictures of a problem. Of ScienceQA's (`image.png`, then its choices' `choice_0.png` and so
            on) the first so many are taken: with 1 what the original takes. More in a row of another source are an
            error.
        pictures: whether the pictures' files must be there.
        columns: `OURS=THEIRS,…` or such a mapping, where a source names its columns otherwise.
        split_seed: of the division of rows without `split` (`splits.py`).
        keep: columns beside the schema's that are kept, as texts.

    Raises:
        ValueError: what is wrong with the source, by file or id, field, what was found and what was expected.
    """
    split, columns = split_named(split, name_of(source)), parse_columns(columns)
    keep = tuple(name for name in keep if name not in FEATURES)
    if is_known_source(source):
        if columns or keep:
            raise ValueError(f"{source} has the columns of its release: there is no {first_of(columns, keep)!r}.")
        return load_known(str(source), split, max_images, pictures)
    reader = reader_of(source, split, columns, split_seed, keep)
    reader.max_images = max_images
    reader.paths = replace(reader.paths, must_exist=pictures)
    problems = reader.problems()
    check_ids(problems["id"], reader.name)
    if reader.is_divided:
        log_once(
            logger,
            f"{reader.name}: no row has a split, so a hash of its content and split_seed {split_seed} divides them "
            f"8:1:1; {split} has {len(problems)} of {len(reader.table.rows)}",
        )
    return problems


def first_of(*names: Sequence[str] | Mapping[str, str]) -> str:
    return next(iter([*names[0].values(), *names[1]]))


def is_divided(source: str | Path | Given, columns: str | Mapping[str, str] | None = None) -> bool:
    """Whether no row says its split, so that `load_problems` divides them."""
    if is_known_source(source):
        return False
    tables = open_source(source)
    return None in tables and reader_of(source, SPLITS[0], parse_columns(columns), SPLIT_SEED, ()).is_divided


def name_of(source: str | Path | Given) -> str:
    return str(source) if isinstance(source, (str, Path)) else IN_PYTHON


def is_known_source(source: str | Path | Given) -> bool:
    return isinstance(source, (str, Path)) and is_known(str(source))


def splits_of(source: str | Path | Given) -> list[str]:
    """Those that it can give."""
    tables = {None: None} if is_known_source(source) else open_source(source)
    return [split for split in SPLITS if None in tables or split in tables]


def stream_rows(source: str | Path, columns: str | Mapping[str, str] | None) -> datasets.IterableDataset:
    """
    The training problems of a source that is not kept but read while it is used, each row checked when it comes.

    Raises:
        ValueError: it is no dataset of the Hub or folder of Parquet files, or has no splits of its own.
    """
    tables = {} if is_known_source(source) else open_source(source, streaming=True)
    if not tables or not isinstance(next(iter(tables.values())).rows, datasets.IterableDataset):
        raise ValueError(
            f"dataset is {name_of(source)!r}; streaming reads a dataset of the Hub, by its id or its Parquet files: "
            f"{SOURCES}."
        )
    if "train" not in tables:
        raise ValueError(f"{name_of(source)}: streaming needs the split train by name, beside validation and test.")
    return table_reader(tables["train"], "train", True, parse_columns(columns), SPLIT_SEED, ()).mapped()


def reader_of(
    source: str | Path | Given, split: str, columns: dict[str, str], split_seed: int, keep: tuple[str, ...]
) -> "Reader":
    tables = open_source(source)
    if split not in tables and None not in tables:
        raise ValueError(
            f"{name_of(source)} has no split {split!r}; found "
            f"{', '.join(map(str, tables))}. A file for each is named as train=FILE,val=FILE,test=FILE."
        )
    return table_reader(tables.get(split) or tables[None], split, split in tables, columns, split_seed, keep)


def table_reader(
    table: Table, split: str, is_whole: bool, columns: dict[str, str], split_seed: int, keep: tuple[str, ...]
) -> "Reader":
    """
    Args:
        is_whole: whether the table serves that split with all its rows.
    """
    columns = {**table.columns, **columns}
    plan = plan_columns(table.found_columns(), table.name, columns, keep, table.are_cells, table.labels())
    is_divided = False
    if not is_whole:
        absent, total = without_split(table, plan), len(table.rows)
        if 0 < absent < total:
            raise ValueError(
                f"{table.name}: {absent} of {total} rows have no split and the others have one; expected it in all "
                f"rows or in none."
            )
        is_divided = absent == total
    return Reader(table.name, plan, table.paths, split, is_whole, is_divided, split_seed, table)


def without_split(table: Table, plan: Plan) -> int:
    """How many rows do not say their split."""
    theirs = plan.names.get("split")
    if theirs is None:
        return len(table.rows)
    return sum(is_absent(value) or value == "" for value in table.values(theirs))


@dataclass
class Reader:
    """
    The rows of a table that are of one split -> problems.

    Args:
        is_whole: whether all rows are of that split, whatever they say.
        is_divided: whether no row says its split.
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
        features, rows = self.features(), self.table.rows
        if not isinstance(rows, list) and len(rows):
            return self.mapped()
        read = (self.read(raw, number, where) for number, (where, raw) in enumerate(rows))
        complete = [row for row in read if row is not None]
        # By column, because Dataset.from_list fails where a split has no rows.
        return datasets.Dataset.from_dict({name: [row[name] for row in complete] for name in features}, features)

    def features(self) -> datasets.Features:
        return datasets.Features({**FEATURES, **dict.fromkeys(self.plan.keep, datasets.Value("string"))})

    def mapped(self) -> datasets.Dataset | datasets.IterableDataset:
        """Of rows on disk problems on disk; of a stream a stream."""
        rows, read = self.table.rows, replace(self, table=None).read_batch
        options: dict[str, Any] = {"batched": True, "batch_size": BATCH, "with_indices": True}
        options |= {"remove_columns": rows.column_names, "features": self.features()}
        if isinstance(rows, datasets.IterableDataset):
            return rows.map(read, **options)
        modules = (columns_module, problems_module, inspect.getmodule(Reader))
        # `datasets` does not see what of this code has changed.
        code = [inspect.getsource(module) for module in modules]
        key = Hasher.hash((self.table.digest, vars(replace(self, table=None)), code))
        file = cache_folder() / "problems" / f"{key}.arrow"
        file.parent.mkdir(parents=True, exist_ok=True)
        options |= {"cache_file_name": str(file), "new_fingerprint": key, "desc": f"reading {self.name}"}
        # A division hangs on the content of pictures too, which lie outside of the table.
        is_kept = not self.is_divided or self.paths.folder is None
        return rows.map(read, load_from_cache_file=is_kept, **options)

    def read_batch(self, columns: dict[str, list], numbers: list[int]) -> dict[str, list]:
        raws = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        rows = (
            self.read(raw, number, f"{self.name}, row {number + 1}") for raw, number in zip(raws, numbers, strict=True)
        )
        complete = [row for row in rows if row is not None]
        return {name: [row[name] for row in complete] for name in self.features()}

    def read(self, raw: Mapping[str, Any], number: int, where: str) -> dict[str, Any] | None:
        """The problem of a row; None where it is of another split."""
        row = self.plan.row(raw, where)
        if not self.is_divided and self.split_of(row.pop("split", None), where) != self.split:
            return None
        row = with_all_columns({"id": f"{self.split}-{number}", **row, "split": self.split})
        where = f"{where}, problem {row['id']}"
        check_fields(row, where)
        if self.is_divided:
            key = content_key(row, picture_keys(row["images"], self.paths, where))
            if drawn_split(key, self.split_seed) != self.split:
                return None
        return with_pictures(row, where, self.paths, self.max_images)

    def split_of(self, said: Any, where: str) -> str:
        if not self.is_whole:
            return split_named(said, where)
        if said is not None and said != "" and split_named(said, where) != self.split:
            log_once(logger, f"{self.name}: it is given as {self.split}, and so are its rows that name another split")
        return self.split


# How a command is told of a source.


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """`--columns` and `--split_seed`, for a command that reads a dataset (a recipe's are in `arguments.py`)."""
    parser.add_argument("--columns", metavar="OURS=THEIRS,…", help="its columns, where they have other names")
    parser.add_argument("--split_seed", type=int, default=SPLIT_SEED, help="of the division of rows without a split")


def reading_options(arguments: Any) -> dict[str, Any]:
    """Those of a command or a recipe, as `load_problems` takes them."""
    return {"columns": arguments.columns, "split_seed": arguments.split_seed}


def non_default_options(arguments: Any) -> dict[str, Any]:
    """Those that are not the usual ones, as a command line says them."""
    columns = ",".join(f"{ours}={theirs}" for ours, theirs in parse_columns(arguments.columns).items())
    found = {"columns": columns, "split_seed": arguments.split_seed}
    return {name: value for name, value in found.items() if value not in ("", SPLIT_SEED)}


def choose_source(arguments: argparse.Namespace, given: Given | None) -> str | Given:
    """
    `--dataset`, or the dataset that a Python caller gave in its place, by which it goes in records.

    Raises:
        ValueError: there is none, or there are both.
    """
    if given is None:
        if arguments.dataset is None:
            raise ValueError(f"--dataset is missing: {SOURCES}.")
        return arguments.dataset
    if arguments.dataset is not None:
        raise ValueError(f"--dataset is {arguments.dataset!r}, and a dataset was given in Python: give one of them.")
    arguments.dataset = IN_PYTHON
    return given


def load_all_splits(
    source: str | Given, splits: Iterable[str], max_images: int | None, pictures: bool, **reading: Any
) -> Dataset:
    """
    Args:
        reading: of `load_problems`.
    """
    problems = [load_problems(source, split, max_images, pictures, **reading) for split in splits]
    return concatenate_datasets([part for part in problems if len(part)] or problems[:1])
