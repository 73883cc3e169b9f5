"""The schema of problems: its columns, the checks of a row, and operations on loaded problems.

`sources.py` reads problems. Pictures stay on disk (`pictures/reading.py` reads them). This module does not depend on
models, templates or stages.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from mmcot.problems.progress_bars import without_dataset_bars
from mmcot.storage.files import read_json

_TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "id": _TEXT,
        "question": _TEXT,
        "choices": datasets.List(_TEXT),
        "context": _TEXT,
        "images": datasets.List(datasets.Image(decode=False)),
        "caption": _TEXT,
        "answer": datasets.Value("int64"),  # index of the right choice, -1 = unknown
        "lecture": _TEXT,
        "solution": _TEXT,
        "rationales": datasets.List(_TEXT),  # all solutions, if there are several
        "direct_answers": datasets.List(_TEXT),  # answers of people who did not see the choices
        "observation": _TEXT,  # what the picture shows that matters for the question: the gold description
        "gold_passages": datasets.List(_TEXT),  # ids of the passages of a corpus that the answer needs
        "subject": _TEXT,
        "grade": _TEXT,
        "topic": _TEXT,
        "category": _TEXT,
        "skill": _TEXT,
        "split": _TEXT,
    }
)
# The passages that a stage retrieved for a problem, best first; `query` and `date` are those of a live search.
PASSAGES = datasets.List(
    {**dict.fromkeys(("id", "title", "text", "source", "query", "date"), _TEXT), "score": datasets.Value("float64")}
)
GOLD_COLUMNS = ("answer", "lecture", "solution", "rationales", "direct_answers", "observation", "gold_passages")
SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {"validation": "val", "valid": "val", "dev": "val"}
TEXT_COLUMNS = [name for name, feature in FEATURES.items() if feature == _TEXT]
LIST_COLUMNS = [name for name, feature in FEATURES.items() if isinstance(feature, datasets.List)]
MAX_CHOICES = 26  # one letter for each


def member(data: dict[str, Any], name: str, kind: type, file: Path) -> Any:
    """
    Return `data[name]`.

    Raises:
        ValueError: the value is missing or not of the type `kind`.
    """
    value = data.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{file}: {name!r} is {short_repr(value)}; expected a {kind.__name__}.")
    return value


@dataclass(frozen=True)
class PicturePaths:
    """
    How the picture paths of a source are resolved.

    Args:
        folder: the folder that paths are relative to. None refuses paths: in rows from another machine, a path would
            name a file of this machine.
        stays_inside: refuse a path that leaves the folder.
        must_exist: whether the files of the pictures must exist.
    """

    folder: Path | None
    stays_inside: bool = False
    must_exist: bool = True

    def resolve(self, path: str, where: str) -> Path:
        """
        Return the file of a picture.

        Raises:
            ValueError: the path is refused.
        """
        if self.folder is None:
            raise ValueError(f"{where}: image is the path {short_repr(path)}; expected its bytes.")
        resolved = self.folder / path
        if self.stays_inside and not resolved.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{where}: picture {short_repr(path)} is outside of {self.folder}; expected a file in it.")
        return resolved


def check_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], source: str, paths: PicturePaths, max_images: int | None = None
) -> list[dict[str, Any]]:
    """
    Check rows and return them with every column of the schema.

    Args:
        rows: the rows, each with its place, for errors.
        source: the name of the source, for errors.

    Raises:
        ValueError: with the place of the first invalid row, the value found and the value expected.
    """
    complete = []
    for where, row in rows:
        row = with_all_columns(row)
        where = f"{where}, problem {row['id']}"
        check_fields(row, where)
        complete.append(with_pictures(row, where, paths, max_images))
    check_ids([row["id"] for row in complete], source)
    return complete


def with_all_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with an empty value in each missing column of the schema. Other columns are kept."""
    complete = {name: empty_value(name) if row.get(name) is None else row[name] for name in FEATURES}
    extra = {name: value for name, value in row.items() if name not in FEATURES}
    return {**complete, "id": str(complete["id"]), **extra}


def with_pictures(row: dict[str, Any], where: str, paths: PicturePaths, max_images: int | None) -> dict[str, Any]:
    """
    Return the row with its pictures in the form of the schema.

    Raises:
        ValueError: there are more than `max_images` pictures, or a picture is invalid or missing.
    """
    if max_images is not None and len(row["images"]) > max_images:
        raise ValueError(
            f"{where}: images contains {len(row['images'])} pictures; max_images is {max_images}. Raise it "
            f"(--max_images) or remove pictures."
        )
    return {**row, "images": [stored_picture(picture, paths, where) for picture in row["images"]]}


def check_ids(ids: Sequence[str], source: str) -> None:
    """
    Raises:
        ValueError: two problems have the same id.
    """
    seen: set[str] = set()
    for problem_id in ids:
        if problem_id in seen:
            raise ValueError(f"{source}, problem {problem_id}: this id occurs twice; expected one problem per id.")
        seen.add(problem_id)


def empty_value(column: str) -> Any:
    """Return the value of a column that a row lacks."""
    return {"answer": -1}.get(column, [] if column in LIST_COLUMNS else "")


def normalize_split(split: Any, where: str) -> str:
    """
    Return one of `SPLITS` for its name or an alias (`validation`).

    Raises:
        ValueError: there is no such split.
    """
    name = SPLIT_ALIASES.get(split, split) if isinstance(split, str) else split
    if name not in SPLITS:
        raise ValueError(f"{where}: split is {short_repr(split)}; expected one of {', '.join(SPLITS)}.")
    return name


def check_fields(row: dict[str, Any], where: str) -> None:
    """
    Check the types and values of a row, except for the pictures themselves.

    Raises:
        ValueError: with the place, the column, the value found and the value expected.
    """
    choices, answer = row["choices"], row["answer"]
    for name in TEXT_COLUMNS:
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: {name} is {short_repr(row[name])}; expected a text.")
        check_characters(row[name], name, where)
    if not row["question"].strip():
        raise ValueError(f"{where}: question is {row['question']!r}; expected a text that is not empty.")
    for name in ("choices", "rationales", "direct_answers", "gold_passages"):
        if not isinstance(row[name], list) or not all(isinstance(text, str) for text in row[name]):
            raise ValueError(f"{where}: {name} is {short_repr(row[name])}; expected a list of texts.")
        for text in row[name]:
            check_characters(text, name, where)
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"{where}: choices has {len(choices)} texts; expected {MAX_CHOICES} at most, one per letter.")
    # bool is a subclass of int in Python, but an answer `true` is not choice 1.
    if type(answer) is not int or (answer != -1 and choices and not 0 <= answer < len(choices)):
        indices = f"an index from 0 to {len(choices) - 1}, or " if choices else ""
        raise ValueError(f"{where}: answer is {short_repr(answer)}; expected {indices}-1 for unknown.")
    if not isinstance(row["images"], list):
        raise ValueError(f"{where}: images is {short_repr(row['images'])}; expected a list of pictures.")


def check_characters(text: str, column: str, where: str) -> None:
    """
    Raises:
        ValueError: the text contains half of a surrogate pair. JSON can escape it, but a UTF-8 file cannot contain it,
            and no tokenizer accepts it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {column} is {short_repr(text)}, which has half of a surrogate pair; expected Unicode."
        ) from error


def stored_picture(picture: Any, paths: PicturePaths, where: str) -> dict[str, Any]:
    """
    Return a picture in the form of the schema. The file is not read.

    Raises:
        ValueError: the value is not a picture, or its file must exist (`paths.must_exist`) and is missing or empty.
    """
    picture = {"path": picture} if isinstance(picture, str) else picture
    if isinstance(picture, dict) and picture.get("bytes") and isinstance(picture["bytes"], bytes):
        # Without the path, because `datasets` would read a file at that path in place of the bytes.
        return {"bytes": picture["bytes"], "path": None}
    if not isinstance(picture, dict) or picture.get("bytes") or not isinstance(picture.get("path"), str):
        raise ValueError(f'{where}: images contains {short_repr(picture)}; expected paths or {{"bytes", "path"}}.')
    check_characters(picture["path"], "images", where)
    path = paths.resolve(picture["path"], where)
    if not paths.must_exist:
        return {"bytes": None, "path": picture["path"]}
    check_file(path, where)
    return {"bytes": None, "path": str(path)}


def check_file(picture: Path, where: str) -> None:
    """
    Raises:
        ValueError: the file of a picture is missing or empty.
    """
    if not picture.is_file():
        raise ValueError(f"{where}: picture {picture} is missing.")
    if picture.stat().st_size == 0:
        raise ValueError(f"{where}: picture {picture} is an empty file.")


def short_repr(value: Any) -> str:
    """Return the representation of a value for an error, at most 80 characters long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def first_few(names: list[str]) -> str:
    """Return the first five names and the number of the others, for an error."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def without_gold(problems: datasets.Dataset) -> datasets.Dataset:
    """Return the problems without gold columns, as a model may see them."""
    return problems.remove_columns([name for name in GOLD_COLUMNS if name in problems.column_names])


def is_answered(problems: datasets.Dataset) -> bool:
    """Whether the answer of any problem is known. In the test split of A-OKVQA, no answer is known."""
    return any(answer >= 0 for answer in problems["answer"])


def require_answers(problems: datasets.Dataset) -> None:
    """
    Check for training and scoring that every problem has choices and a known answer.

    Raises:
        ValueError: with the first problem that lacks them.
    """
    for problem in problems.select_columns(["id", "choices", "answer"]):
        require_answer(problem)


def require_answer(problem: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the problem has no choices or no known answer.
    """
    choices, answer = problem["choices"], problem["answer"]
    if not choices:
        raise ValueError(f"problem {problem['id']}: choices is empty; training and scoring need at least one choice.")
    if not 0 <= answer < len(choices):
        raise ValueError(
            f"problem {problem['id']}: answer is {answer}; training and scoring need an index from 0 to "
            f"{len(choices) - 1}."
        )


def join_captions(problems: datasets.Dataset, path: str) -> datasets.Dataset:
    """
    Return the problems with the captions of a `captions.json`.

    Raises:
        ValueError: the file does not exist, or lacks a caption for a problem with a picture.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected a captions.json.")
    captions = member(read_json(Path(path)), "captions", dict, Path(path))
    rows = problems.select_columns(["id", "images"])
    absent = [row["id"] for row in rows if row["images"] and not isinstance(captions.get(row["id"]), str)]
    if absent:
        raise ValueError(f"{path}: {len(absent)} problems with a picture have no caption there: {first_few(absent)}.")
    return with_column(problems, "caption", [captions.get(problem_id) or "" for problem_id in problems["id"]])


def join_column(problems: datasets.Dataset, column: str, path: str) -> datasets.Dataset:
    """
    Return the problems with a text column from a JSON file `{id: text}`.

    Raises:
        ValueError: the file does not exist, or lacks a text for a problem.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected JSON of the form {{id: text}}.")
    texts = read_json(path)
    absent = [problem_id for problem_id in problems["id"] if not isinstance(texts.get(problem_id), str)]
    if absent:
        raise ValueError(f"{path}: {len(absent)} of {len(problems)} problems have no text there: {first_few(absent)}.")
    return with_column(problems, column, [texts[problem_id] for problem_id in problems["id"]])


def with_column(problems: datasets.Dataset, column: str, values: list[str] | list[list[dict]]) -> datasets.Dataset:
    """Return the problems with these texts, or passages, in a new or replaced column."""
    if column in problems.column_names:
        problems = problems.remove_columns(column)
    feature = PASSAGES if values and isinstance(values[0], list) else _TEXT
    with without_dataset_bars():
        return problems.add_column(column, values, feature=feature)
