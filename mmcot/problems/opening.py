"""A source by name -> tables of rows by split, as they lie there: files, folders, datasets of the Hub or of Python.

Rows of text files are in memory; all others are a `datasets.Dataset` and stay on disk. What a row means is not known
here (`columns.py`, `sources.py`).
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
from mmcot.problems.row_files import READERS, Rows, read_rows
from mmcot.problems.schema import SPLIT_ALIASES, SPLITS, PicturePaths, first_few, split_named
from mmcot.problems.splits import named_parts
from mmcot.storage.digests import cached_sha256_of_file, sha256_of_text
from mmcot.storage.files import cache_folder

SOURCES = (
    "demo, a ScienceQA or A-OKVQA folder, a dataset of the Hub (by its id or hf://datasets/…), a .jsonl, .csv, .tsv, "
    ".parquet or .arrow file of problems (or train=FILE,val=FILE,test=FILE), or a folder with such Parquet or Arrow "
    "files, with metadata.jsonl or metadata.csv and pictures, or of save_to_disk"
)
IN_PYTHON = "dataset-given-in-python"  # what stands in records for a dataset that has no other name
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
        name: of the file or source, for errors.
        rows: of a text file each with the place where it is found.
        paths: what a path of a picture means in it.
        digest: of its content, where it is a `datasets.Dataset`.
        columns: ours = theirs, by the source's own convention.
    """

    name: str
    rows: Rows | AnyDataset
    paths: PicturePaths
    digest: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    are_cells: bool = False

    def found_columns(self) -> dict[str, str]:
        """Each column with the first place where it is found."""
        if not isinstance(self.rows, list):
            return dict.fromkeys(self.rows.column_names, self.name)
        found: dict[str, str] = {}
        for where, row in self.rows:
            for name in row:
                found.setdefault(name, where)
        return found

    def labels(self) -> dict[str, list[str]]:
        """Names of classes, of the columns that hold their numbers; an answer is a number."""
        features = {} if isinstance(self.rows, list) else self.rows.features
        return {name: one.names for name, one in features.items() if isinstance(one, datasets.ClassLabel)}

    def values(self, column: str) -> list[Any]:
        return [row.get(column) for _, row in self.rows] if isinstance(self.rows, list) else list(self.rows[column])


Tables = dict[str | None, Table]  # by the split that a table serves whole; None: its rows say it, or nothing does


def open_source(source: str | Path | Given, streaming: bool = False) -> Tables:
    """
    Raises:
        ValueError: there is no such source, or it cannot be read.
    """
    if isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        return by_split(source, IN_PYTHON, PicturePaths(Path()))
    if not isinstance(source, (str, Path)):
        raise ValueError(f"dataset is a {type(source).__name__}; expected a datasets.Dataset, a DatasetDict or a name.")
    name, path = str(source), Path(source)
    parts = named_parts(name)
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
    path = Path(source)
    return not path.exists() and path.suffix == "" and re.fullmatch(HUB_ID, source) is not None


def only_table(part: str) -> Table:
    tables = open_source(part)
    if tables.keys() != {None}:
        raise ValueError(f"{part} has splits of its own; expected a file that serves one split.")
    return tables[None]


def open_file(file: Path) -> Table:
    paths = PicturePaths(file.parent)
    if file.suffix in READERS:
        return Table(str(file), read_rows(file), paths, are_cells=file.suffix != ".jsonl")
    if not file.is_file():
        raise ValueError(f"{file}: no such file.")
    digest = content_digest([file], file.parent)
    rows = loaded(str(file), DATA_FILES[file.suffix], digest, data_files=str(file))["train"]
    return Table(str(file), undecoded(rows), paths, digest)


def open_folder(folder: Path, streaming: bool = False) -> Tables:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return by_split(from_disk(folder), str(folder), PicturePaths(Path()), folder_digest(folder))
    tables = open_picture_folder(folder)
    if tables:
        return tables
    kind = next((suffix for suffix in DATA_FILES if any(data_files(folder, suffix))), None)
    if kind is None:
        raise ValueError(f"dataset is {str(folder)!r}, a folder that holds nothing known; expected {SOURCES}.")
    digest = None if streaming else folder_digest(folder)
    files = files_by_split(folder, data_files(folder, kind))
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    # Of files that came from elsewhere a path may not lead out of their folder.
    paths = PicturePaths(folder, stays_inside=True)
    named = {name or "train": part for name, part in files.items()}
    found = loaded(str(folder), DATA_FILES[kind], digest, data_files=named, **options)
    return by_split(found["train"] if None in files else found, str(folder), paths, digest)


def data_files(folder: Path, suffix: str) -> list[Path]:
    """Those of a folder, but what tools keep in hidden folders."""
    files = (file.relative_to(folder) for file in folder.rglob(f"*{suffix}"))
    return sorted(folder / file for file in files if not any(part.startswith(".") for part in file.parts))


def files_by_split(folder: Path, files: list[Path]) -> dict[str | None, list[str]]:
    """
    By the split that their names or folders say (`data/train-00000-of-00001.parquet`), under None where none does.
    `datasets` looks at the names of all that lies there, pictures too.
    """
    words = re.compile(rf"(?:^|[^a-z])({'|'.join((*SPLITS, *SPLIT_ALIASES))})(?![a-z])")
    found: dict[str | None, list[str]] = {}
    for file in files:
        match = words.search(file.relative_to(folder).as_posix().lower())
        found.setdefault(match and match[1], []).append(str(file))
    if None in found and len(found) > 1:
        raise ValueError(f"{folder}: the name of {found[None][0]} says no split, and those of other files do.")
    return found


def from_disk(folder: Path) -> Given:
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(f"{folder}: not a whole dataset of save_to_disk ({error}).") from error


def open_picture_folder(folder: Path) -> Tables:
    """The convention of `imagefolder`: `metadata.jsonl` or `.csv` with `file_name`, in it or in a folder per split."""
    names = (*SPLITS, *SPLIT_ALIASES)
    found = [name for name in names if found_in(folder / name)]
    tables: Tables = {split_named(name, name): metadata_table(folder / name) for name in found}
    if len(tables) < len(found):
        raise ValueError(f"{folder} has two folders of one split: {', '.join(found)}.")
    if not found_in(folder):
        return tables
    if tables:
        raise ValueError(f"{folder} has metadata of its own and of splits; expected one of both.")
    table = metadata_table(folder)
    for _, row in table.rows:  # pictures in a folder per split say which one it is
        first = Path(str(row.get("file_name"))).parts[0]
        if first in names:
            row.setdefault("split", first)
    return {None: table}


def found_in(folder: Path) -> list[Path]:
    return [folder / name for name in METADATA_FILES if (folder / name).is_file()]


def metadata_table(folder: Path) -> Table:
    file, *others = found_in(folder)
    if others:
        raise ValueError(f"{folder} has both {' and '.join(METADATA_FILES)}; expected one of them.")
    table = open_file(file)
    conventions = {"file_name": "image", "file_names": "images"}
    columns = {ours: theirs for theirs, ours in conventions.items() if theirs in table.found_columns()}
    return replace(table, columns=columns, paths=PicturePaths(folder, stays_inside=True))


def open_hub_address(address: str, streaming: bool) -> Tables:
    """`hf://datasets/OWNER/NAME`, perhaps `@REVISION`, and perhaps a file in it."""
    match = re.fullmatch(rf"hf://datasets/({HUB_ID}?)(?:@([^/]+))?(?:/(.+))?", address)
    if match is None:
        raise ValueError(f"dataset is {address!r}; expected hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME/FILE.")
    repo_id, revision, file = match.groups()
    if file is None:
        return open_hub_dataset(repo_id, revision, streaming)
    if Path(file).suffix not in (*READERS, *DATA_FILES):
        raise ValueError(f"dataset is {address!r}; expected a .jsonl, .csv, .tsv, .parquet or .arrow file in it.")
    try:
        table = open_file(Path(hf_hub_download(repo_id, file, repo_type="dataset", revision=revision)))
    except OSError as error:  # huggingface_hub's errors are of this kind
        raise ValueError(f"{address}: the file cannot be had ({error}).") from error
    return {None: replace(table, name=address, paths=PicturePaths(None))}


def open_hub_dataset(repo_id: str, revision: str | None, streaming: bool) -> Tables:
    found = loaded(repo_id, repo_id, None, revision=revision, streaming=streaming)
    return by_split(found, repo_id, PicturePaths(None))


def loaded(source: str, kind: str, digest: str | None, **options: Any) -> Mapping[str, AnyDataset]:
    """By `datasets`; with a digest of files, not what it kept of others of the same names and times."""
    if digest is not None:
        options["cache_dir"] = str(cache_folder() / "tables" / digest)
    try:
        return datasets.load_dataset(kind, **options)
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        if kind in DATA_FILES.values():
            cause = error.__cause__ or error
            raise ValueError(f"{source}: not a whole {kind.capitalize()} file ({cause}).") from error
        raise ValueError(
            f"dataset is {source!r}; expected {SOURCES}. As a dataset of the Hub it cannot be loaded ({error})."
        ) from error


def by_split(
    found: AnyDataset | Mapping[str, AnyDataset], name: str, paths: PicturePaths, digest: str | None = None
) -> Tables:
    """The splits of ours; a lone `train` is what `datasets` calls rows of which no split is said."""
    if isinstance(found, (datasets.Dataset, datasets.IterableDataset)):
        return {None: table_of(found, name, paths, digest)}
    tables: Tables = {}
    for theirs, rows in found.items():
        split = SPLIT_ALIASES.get(str(theirs), str(theirs))
        if split in tables:
            raise ValueError(f"{name} has two splits that are {split!r}: {', '.join(map(str, found))}.")
        if split in SPLITS:
            tables[split] = table_of(rows, name, paths, digest and f"{digest}-{split}")
    others = [str(theirs) for theirs in found if SPLIT_ALIASES.get(str(theirs), str(theirs)) not in SPLITS]
    if not tables:
        raise ValueError(f"{name} has the splits {first_few(others)}; expected train, validation or test among them.")
    if others:
        log_once(logger, f"{name}: splits that are not read: {', '.join(others)}")
    return {None: tables["train"]} if tables.keys() == {"train"} and not others else tables


def table_of(rows: AnyDataset, name: str, paths: PicturePaths, digest: str | None) -> Table:
    if rows.column_names is None:
        raise ValueError(f"{name}: its columns are not known before it is read; expected Parquet.")
    return Table(name, undecoded(rows), paths, digest or getattr(rows, "_fingerprint", ""))


def undecoded(rows: AnyDataset) -> AnyDataset:
    """Pictures as they are stored, and rows as Python objects."""
    stored = datasets.Image(decode=False)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, stored)
        elif isinstance(feature, (datasets.List, datasets.LargeList)) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, type(feature)(stored))
    return rows.with_format(None) if isinstance(rows, datasets.Dataset) else rows


def folder_digest(folder: Path) -> str:
    """Of all that decides its rows, but the pictures beside them."""
    kept = {*DATA_FILES, ".json", ".md", ".yaml"}
    return content_digest((file for file in folder.rglob("*") if file.suffix in kept and file.is_file()), folder)


def content_digest(files: Iterable[Path], folder: Path) -> str:
    lines = (f"{file.relative_to(folder)} {cached_sha256_of_file(file)}\n" for file in sorted(files))
    return sha256_of_text("".join(lines))[:32]
