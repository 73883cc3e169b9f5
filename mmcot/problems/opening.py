"""Opens a source as tables of unconverted rows by split: files, folders, datasets of the Hub or from Python.

Rows of text files are in memory; all other rows are a `datasets.Dataset` and stay on disk. `columns.py` and
`sources.py` interpret the rows.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from huggingface_hub import hf_hub_download

from mmcot.problems.columns import log_once, logger
from mmcot.problems.row_files import CELLS, READERS, Rows, read_rows
from mmcot.problems.schema import SPLIT_ALIASES, SPLITS, PicturePaths, first_few, normalize_split
from mmcot.problems.splits import parse_split_files
from mmcot.storage.digests import cached_sha256_of_file, sha256_of_text
from mmcot.storage.files import cache_folder

SOURCES = (
    "demo, study, a ScienceQA or A-OKVQA folder, a dataset of the Hub (by its id or hf://datasets/…), a .jsonl, .csv, "
    ".tsv, .parquet or .arrow file of problems (or train=FILE,val=FILE,test=FILE), or a folder: Parquet or Arrow "
    "files, metadata.jsonl or metadata.csv with pictures, or the output of save_to_disk"
)
IN_PYTHON = "dataset-given-in-python"  # how records name a dataset from Python
DATA_FILES = {".parquet": "parquet", ".arrow": "arrow"}
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
METADATA_FILES = ("metadata.jsonl", "metadata.csv")

Given = datasets.Dataset | datasets.DatasetDict
AnyDataset = datasets.Dataset | datasets.IterableDataset


@dataclass
class Table:
    """
    Rows of a source, in order.

    Args:
        name: the name of the file or source, for errors.
        rows: a dataset, or for a text file a list of rows with their places.
        paths: how the picture paths of the source are resolved.
        digest: the digest of the content, if the rows are a `datasets.Dataset`.
        columns: ours = theirs, by the convention of the source's format.
        are_cells: whether the rows come from a CSV or TSV file, with texts as values.
    """

    name: str
    rows: Rows | AnyDataset
    paths: PicturePaths
    digest: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    are_cells: bool = False

    def found_columns(self) -> dict[str, str]:
        """Return each column with the place of its first occurrence."""
        if not isinstance(self.rows, list):
            return dict.fromkeys(self.rows.column_names, self.name)
        found: dict[str, str] = {}
        for where, row in self.rows:
            for name in row:
                found.setdefault(name, where)
        return found

    def labels(self) -> dict[str, list[str]]:
        """Return the names of the classes, for columns that contain class numbers. (An answer stays a number.)"""
        features = {} if isinstance(self.rows, list) else self.rows.features
        return {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}

    def values(self, column: str) -> list[Any]:
        """Return the values of a column in all rows."""
        return [row.get(column) for _, row in self.rows] if isinstance(self.rows, list) else list(self.rows[column])


# The tables by the split that all their rows belong to; None if the rows name their splits, or no split is named.
Tables = dict[str | None, Table]


def open_source(source: str | Path | Given, streaming: bool = False) -> Tables:
    """
    Open a source.

    Args:
        source: as in `sources.load_problems`, but not a known dataset.
        streaming: do not download or convert the rows of Parquet files or of a Hub dataset.

    Raises:
        ValueError: the source does not exist or cannot be read.
    """
    if isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        return tables_by_split(source, IN_PYTHON, PicturePaths(Path()))
    if not isinstance(source, (str, Path)):
        raise ValueError(f"dataset is a {type(source).__name__}; expected a datasets.Dataset, a DatasetDict or a name.")
    name, path = str(source), Path(source)
    parts = parse_split_files(name)
    if parts is not None:
        return {split: only_table(part) for split, part in parts.items()}
    if name.startswith("hf://"):
        return open_hub_address(name, streaming)
    if path.is_dir():
        return open_folder(path, streaming)
    if path.suffix in READERS or path.suffix in DATA_FILES:
        return {None: open_file(path)}
    if is_hub_id(name):
        return open_hub_dataset(name, None, streaming)
    raise ValueError(f"dataset is {name!r}; expected {SOURCES}.")


def is_hub_id(source: str) -> bool:
    """Whether a source is OWNER/NAME and not a local path."""
    path = Path(source)
    return not path.exists() and path.suffix == "" and re.fullmatch(HUB_ID, source) is not None


def only_table(part: str) -> Table:
    """
    Open a file that contains one split.

    Raises:
        ValueError: the source has several splits.
    """
    tables = open_source(part)
    if tables.keys() != {None}:
        raise ValueError(f"{part} has splits of its own; expected a file with one split.")
    return tables[None]


def open_file(file: Path) -> Table:
    """Open a file of rows; its picture paths are relative to its folder."""
    paths = PicturePaths(file.parent)
    if file.suffix in READERS:
        return Table(str(file), read_rows(file), paths, are_cells=file.suffix in CELLS)
    if not file.is_file():
        raise ValueError(f"{file}: no such file.")
    digest = content_digest([file], file.parent)
    rows = load_tables(str(file), DATA_FILES[file.suffix], digest, data_files=str(file))["train"]
    return Table(str(file), without_decoding(rows), paths, digest)


def open_folder(folder: Path, streaming: bool = False) -> Tables:
    """Open the output of `save_to_disk`, a folder of pictures with metadata, or a folder of Parquet or Arrow files."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return tables_by_split(open_saved_dataset(folder), str(folder), PicturePaths(Path()), folder_digest(folder))
    tables = open_picture_folder(folder)
    if tables:
        return tables
    kind = next((suffix for suffix in DATA_FILES if any(data_files(folder, suffix))), None)
    if kind is None:
        raise ValueError(f"dataset is {str(folder)!r}, a folder without known files; expected {SOURCES}.")
    digest = None if streaming else folder_digest(folder)
    files = files_by_split(folder, data_files(folder, kind))
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    # The files may come from a stranger and must not name pictures outside of their folder.
    paths = PicturePaths(folder, stays_inside=True)
    named = {name or "train": part for name, part in files.items()}
    found = load_tables(str(folder), DATA_FILES[kind], digest, data_files=named, **options)
    return tables_by_split(found["train"] if None in files else found, str(folder), paths, digest)


def data_files(folder: Path, suffix: str) -> list[Path]:
    """Return the files of a folder with a suffix, except in the hidden folders of tools."""
    files = (file.relative_to(folder) for file in folder.rglob(f"*{suffix}"))
    return sorted(folder / file for file in files if not any(part.startswith(".") for part in file.parts))


def files_by_split(folder: Path, files: list[Path]) -> dict[str | None, list[str]]:
    """
    Group files by the split in the names of the files or folders (`data/train-00000-of-00001.parquet`), under None if
    no name contains a split. (`datasets` would consider the names of all files, including pictures.)

    Raises:
        ValueError: only some of the names contain a split.
    """
    words = re.compile(rf"(?:^|[^a-z])({'|'.join((*SPLITS, *SPLIT_ALIASES))})(?![a-z])")
    found: dict[str | None, list[str]] = {}
    for file in files:
        match = words.search(file.relative_to(folder).as_posix().lower())
        found.setdefault(match and match[1], []).append(str(file))
    if None in found and len(found) > 1:
        raise ValueError(f"{folder}: the name of {found[None][0]} contains no split, but other file names do.")
    return found


def open_saved_dataset(folder: Path) -> Given:
    """
    Open the output of `save_to_disk`.

    Raises:
        ValueError: it is damaged or incomplete.
    """
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(f"{folder}: not a complete dataset of save_to_disk ({error}).") from error


def open_picture_folder(folder: Path) -> Tables:
    """
    Open a folder with the convention of `imagefolder`: `metadata.jsonl` or `metadata.csv` with a column `file_name`, in
    the folder or in one folder for each split. Return no tables for a folder without metadata.
    """
    names = (*SPLITS, *SPLIT_ALIASES)
    found = [name for name in names if metadata_files(folder / name)]
    tables: Tables = {normalize_split(name, name): metadata_table(folder / name) for name in found}
    if len(tables) < len(found):
        raise ValueError(f"{folder} has two folders of one split: {', '.join(found)}.")
    if not metadata_files(folder):
        return tables
    if tables:
        raise ValueError(f"{folder} has metadata of its own and of splits; expected only one of the two.")
    table = metadata_table(folder)
    for _, row in table.rows:  # the folder of a picture may name its split
        first = Path(str(row.get("file_name"))).parts[0]
        if first in names:
            row.setdefault("split", first)
    return {None: table}


def metadata_files(folder: Path) -> list[Path]:
    """Return the metadata files of a folder."""
    return [folder / name for name in METADATA_FILES if (folder / name).is_file()]


def metadata_table(folder: Path) -> Table:
    """Open the metadata of a folder; picture paths must stay inside the folder."""
    file, *others = metadata_files(folder)
    if others:
        raise ValueError(f"{folder} has both {' and '.join(METADATA_FILES)}; expected one of them.")
    table = open_file(file)
    conventions = {"file_name": "image", "file_names": "images"}
    columns = {ours: theirs for theirs, ours in conventions.items() if theirs in table.found_columns()}
    return replace(table, columns=columns, paths=PicturePaths(folder, stays_inside=True))


def open_hub_address(address: str, streaming: bool) -> Tables:
    """Open `hf://datasets/OWNER/NAME`, optionally with `@REVISION` and a file."""
    match = re.fullmatch(rf"hf://datasets/({HUB_ID}?)(?:@([^/]+))?(?:/(.+))?", address)
    if match is None:
        raise ValueError(f"dataset is {address!r}; expected hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME/FILE.")
    repo_id, revision, file = match.groups()
    if file is None:
        return open_hub_dataset(repo_id, revision, streaming)
    if Path(file).suffix not in (*READERS, *DATA_FILES):
        endings = ", ".join((*READERS, *DATA_FILES))
        raise ValueError(f"dataset is {address!r}; expected a file in it with one of the endings {endings}.")
    try:
        table = open_file(Path(hf_hub_download(repo_id, file, repo_type="dataset", revision=revision)))
    except OSError as error:  # the errors of huggingface_hub are subclasses of OSError
        raise ValueError(f"{address}: the file cannot be downloaded ({error}).") from error
    return {None: replace(table, name=address, paths=PicturePaths(None))}


def open_hub_dataset(repo_id: str, revision: str | None, streaming: bool) -> Tables:
    """Open a dataset of the Hub by its id."""
    found = load_tables(repo_id, repo_id, None, revision=revision, streaming=streaming)
    return tables_by_split(found, repo_id, PicturePaths(None))


def load_tables(source: str, kind: str, digest: str | None, **options: Any) -> Mapping[str, AnyDataset]:
    """
    Load the rows with `datasets`.

    Args:
        source: the name of the source, for errors.
        kind: a Hub id, or the name of a file format in `datasets`.
        digest: the digest of the files, which selects the cache folder. The cache of `datasets` would confuse files of
            equal names and times.

    Raises:
        ValueError: the source cannot be loaded.
    """
    if digest is not None:
        options["cache_dir"] = str(cache_folder() / "tables" / digest)
    try:
        return datasets.load_dataset(kind, **options)
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        if kind in DATA_FILES.values():
            cause = error.__cause__ or error
            raise ValueError(f"{source}: not a complete {kind.capitalize()} file ({cause}).") from error
        raise ValueError(
            f"dataset is {source!r}; expected {SOURCES}. As a dataset of the Hub it cannot be loaded ({error})."
        ) from error


def tables_by_split(
    found: AnyDataset | Mapping[str, AnyDataset], name: str, paths: PicturePaths, digest: str | None = None
) -> Tables:
    """
    Return the tables of the known splits. A single split `train` counts as rows without a split, because `datasets`
    uses this name for them.

    Raises:
        ValueError: no split has a known name, or two splits have the same meaning.
    """
    if isinstance(found, (datasets.Dataset, datasets.IterableDataset)):
        return {None: table_of(found, name, paths, digest)}
    tables: Tables = {}
    for theirs, rows in found.items():
        split = SPLIT_ALIASES.get(str(theirs), str(theirs))
        if split in tables:
            raise ValueError(f"{name} has two splits for {split!r}: {', '.join(map(str, found))}.")
        if split in SPLITS:
            tables[split] = table_of(rows, name, paths, digest and f"{digest}-{split}")
    others = [str(theirs) for theirs in found if SPLIT_ALIASES.get(str(theirs), str(theirs)) not in SPLITS]
    if not tables:
        raise ValueError(f"{name} has the splits {first_few(others)}; expected train, validation or test among them.")
    if others:
        log_once(logger, f"{name}: splits that are not read: {', '.join(others)}")
    return {None: tables["train"]} if tables.keys() == {"train"} and not others else tables


def table_of(rows: AnyDataset, name: str, paths: PicturePaths, digest: str | None) -> Table:
    """
    Return a table of a dataset.

    Raises:
        ValueError: the dataset is a stream with unknown columns.
    """
    if rows.column_names is None:
        raise ValueError(f"{name}: its columns are unknown before it is read; expected Parquet.")
    return Table(name, without_decoding(rows), paths, digest or getattr(rows, "_fingerprint", ""))


def without_decoding(rows: AnyDataset) -> AnyDataset:
    """Return the dataset with pictures as they are stored, and rows as Python objects."""
    stored = datasets.Image(decode=False)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, stored)
        elif isinstance(feature, (datasets.List, datasets.LargeList)) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, type(feature)(stored))
    return rows.with_format(None) if isinstance(rows, datasets.Dataset) else rows


def folder_digest(folder: Path) -> str:
    """Return the digest of all files that determine the rows of a folder, without the pictures."""
    suffixes = {*DATA_FILES, ".json", ".md", ".yaml"}
    return content_digest((file for file in folder.rglob("*") if file.suffix in suffixes and file.is_file()), folder)


def content_digest(files: Iterable[Path], folder: Path) -> str:
    """Return a digest of the names and contents of files."""
    lines = (f"{file.relative_to(folder)} {cached_sha256_of_file(file)}\n" for file in sorted(files))
    return sha256_of_text("".join(lines))[:32]
