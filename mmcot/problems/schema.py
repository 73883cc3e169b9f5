"""The schema of problems: its columns, the checks of a row, and what is done with problems once they are read.

`sources.py` reads them. Pictures stay on disk (`pictures.py` reads them). Nothing here knows the model, templates or
stages.
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
        "rationales": datasets.List(_TEXT),  # where there is more than one solution, all of them
        "direct_answers": datasets.List(_TEXT),  # what people answered who were shown no choices
        "subject": _TEXT,
        "grade": _TEXT,
        "topic": _TEXT,
        "category": _TEXT,
        "skill": _TEXT,
        "split": _TEXT,
    }
)
GOLD_COLUMNS = ("answer", "lecture", "solution", "rationales", "direct_answers")
SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {"validation": "val", "valid": "val", "dev": "val"}
TEXT_COLUMNS = [name for name, feature in FEATURES.items() if feature == _TEXT]
LIST_COLUMNS = [name for name, feature in FEATURES.items() if isinstance(feature, datasets.List)]
MAX_CHOICES = 26  # a letter for each


def member(data: dict[str, Any], name: str, kind: type, file: Path) -> Any:
    value = data.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{file}: {name!r} is {shown(value)}; expected a {kind.__name__}.")
    return value


@dataclass(frozen=True)
class PicturePaths:
    """
    What a path of a picture means in a source.

    Args:
        folder: what it is relative to; None where a path is refused: rows from elsewhere would name files of the
            machine that reads them.
        stays_inside: refuse a path that leaves the folder.
        must_exist: whether the pictures' files must be there.
    """

    folder: Path | None
    stays_inside: bool = False
    must_exist: bool = True

    def resolve(self, path: str, where: str) -> Path:
        if self.folder is None:
            raise ValueError(f"{where}: image is the path {shown(path)}; expected its bytes.")
        resolved = self.folder / path
        if self.stays_inside and not resolved.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{where}: picture {shown(path)} is outside of {self.folder}; expected a file in it.")
        return resolved


def checked(
    rows: Iterable[tuple[str, dict[str, Any]]], source: str, paths: PicturePaths, max_images: int | None = None
) -> list[dict[str, Any]]:
    """
    The rows with every column of the schema.

    Args:
        rows: each with the place where it is found, for an error.

    Raises:
        ValueError: the first bad row: where it is, what was found and what was expected.
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
    """The row with an empty value in each column that it lacks; columns beside the schema stay."""
    complete = {name: empty(name) if row.get(name) is None else row[name] for name in FEATURES}
    extra = {name: value for name, value in row.items() if name not in FEATURES}
    return {**complete, "id": str(complete["id"]), **extra}


def with_pictures(row: dict[str, Any], where: str, paths: PicturePaths, max_images: int | None) -> dict[str, Any]:
    if max_images is not None and len(row["images"]) > max_images:
        raise ValueError(
            f"{where}: images holds {len(row['images'])} pictures; max_images is {max_images}. Raise it "
            f"(--max_images) or leave pictures out."
        )
    return {**row, "images": [stored(picture, paths, where) for picture in row["images"]]}


def check_ids(ids: Sequence[str], source: str) -> None:
    seen: set[str] = set()
    for problem_id in ids:
        if problem_id in seen:
            raise ValueError(
                f"{source}, problem {problem_id}: this id stands there twice; expected one problem per id."
            )
        seen.add(problem_id)


def empty(column: str) -> Any:
    return {"answer": -1}.get(column, [] if column in LIST_COLUMNS else "")


def split_named(split: Any, where: str) -> str:
    """One of `SPLITS`, also by its other names (`validation`)."""
    name = SPLIT_ALIASES.get(split, split) if isinstance(split, str) else split
    if name not in SPLITS:
        raise ValueError(f"{where}: split is {shown(split)}; expected one of {', '.join(SPLITS)}.")
    return name


def check_fields(row: dict[str, Any], where: str) -> None:
    choices, answer = row["choices"], row["answer"]
    for name in TEXT_COLUMNS:
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: {name} is {shown(row[name])}; expected a text.")
        check_characters(row[name], name, where)
    if not row["question"].strip():
        raise ValueError(f"{where}: question is {row['question']!r}; expected a text that is not empty.")
    for name in ("choices", "rationales", "direct_answers"):
        if not isinstance(row[name], list) or not all(isinstance(text, str) for text in row[name]):
            raise ValueError(f"{where}: {name} is {shown(row[name])}; expected a list of texts.")
        for text in row[name]:
            check_characters(text, name, where)
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"{where}: choices has {len(choices)} texts; expected {MAX_CHOICES} at most, one per letter.")
    # bool is an int to Python, and an answer `true` is not choice 1.
    if type(answer) is not int or (answer != -1 and choices and not 0 <= answer < len(choices)):
        indices = f"an index from 0 to {len(choices) - 1}, or " if choices else ""
        raise ValueError(f"{where}: answer is {shown(answer)}; expected {indices}-1 for unknown.")
    if not isinstance(row["images"], list):
        raise ValueError(f"{where}: images is {shown(row['images'])}; expected a list of pictures.")


def check_characters(text: str, column: str, where: str) -> None:
    """JSON can escape half of a surrogate pair, which no file in UTF-8 can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {column} is {shown(text)}, which has half of a surrogate pair; expected Unicode."
        ) from error


def stored(picture: Any, paths: PicturePaths, where: str) -> dict[str, Any]:
    """A picture as the schema holds it. A file must be there and not be empty, where it must exist; it is not read."""
    picture = {"path": picture} if isinstance(picture, str) else picture
    if isinstance(picture, dict) and picture.get("bytes") and isinstance(picture["bytes"], bytes):
        # Without their path: datasets would take what lies there, seen from this process, instead of the bytes.
        return {"bytes": picture["bytes"], "path": None}
    if not isinstance(picture, dict) or picture.get("bytes") or not isinstance(picture.get("path"), str):
        raise ValueError(f'{where}: images holds {shown(picture)}; expected paths or {{"bytes", "path"}}.')
    check_characters(picture["path"], "images", where)
    path = paths.resolve(picture["path"], where)
    if not paths.must_exist:
        return {"bytes": None, "path": picture["path"]}
    check_file(path, where)
    return {"bytes": None, "path": str(path)}


def check_file(picture: Path, where: str) -> None:
    if not picture.is_file():
        raise ValueError(f"{where}: picture {picture} is missing.")
    if picture.stat().st_size == 0:
        raise ValueError(f"{where}: picture {picture} is an empty file.")


def shown(value: Any) -> str:
    """What was found, for an error: whole if it is short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def first_few(names: list[str]) -> str:
    """Of many names those that an error can show."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def without_gold(problems: datasets.Dataset) -> datasets.Dataset:
    """The problems as they may be shown to a model that answers them."""
    return problems.remove_columns([name for name in GOLD_COLUMNS if name in problems.column_names])


def is_answered(problems: datasets.Dataset) -> bool:
    """Whether the answer of any is known. Of A-OKVQA's test split none is."""
    return any(answer >= 0 for answer in problems["answer"])


def require_answers(problems: datasets.Dataset) -> None:
    """For training and scoring: every problem has choices and a known answer."""
    for problem in problems.select_columns(["id", "choices", "answer"]):
        require_answer(problem)


def require_answer(problem: dict[str, Any]) -> None:
    choices, answer = problem["choices"], problem["answer"]
    if not choices:
        raise ValueError(f"problem {problem['id']}: choices is empty; training and scoring need at least one choice.")
    if not 0 <= answer < len(choices):
        raise ValueError(
            f"problem {problem['id']}: answer is {answer}; training and scoring need an index from 0 to "
            f"{len(choices) - 1}."
        )


def join_captions(problems: datasets.Dataset, path: str) -> datasets.Dataset:
    """The problems with their captions from a `captions.json`; every problem with a picture must have one there."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected a captions.json.")
    captions = member(read_json(Path(path)), "captions", dict, Path(path))
    rows = problems.select_columns(["id", "images"])
    absent = [row["id"] for row in rows if row["images"] and not isinstance(captions.get(row["id"]), str)]
    if absent:
        raise ValueError(f"{path}: {len(absent)} problems with a picture have no caption there: {first_few(absent)}.")
    return with_column(problems, "caption", [captions.get(problem_id) or "" for problem_id in problems["id"]])


def join_column(problems: datasets.Dataset, column: str, path: str) -> datasets.Dataset:
    """The problems with a text column from a JSON file `{id: text}`, which must have every problem's id."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected JSON of the form {{id: text}}.")
    texts = read_json(path)
    absent = [problem_id for problem_id in problems["id"] if not isinstance(texts.get(problem_id), str)]
    if absent:
        raise ValueError(f"{path}: {len(absent)} of {len(problems)} problems have no text there: {first_few(absent)}.")
    return with_column(problems, column, [texts[problem_id] for problem_id in problems["id"]])


def with_column(problems: datasets.Dataset, column: str, texts: list[str]) -> datasets.Dataset:
    """The problems with these texts in that column, whether they have it or not."""
    if column in problems.column_names:
        problems = problems.remove_columns(column)
    with without_dataset_bars():
        return problems.add_column(column, texts, feature=_TEXT)
