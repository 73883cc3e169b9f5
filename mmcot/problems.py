"""Sources of problems -> `datasets.Dataset` of the one schema, and the checks that a run makes before it starts.

Pictures stay on disk until `read_pictures`. Nothing here knows the model, templates or stages.
"""

import difflib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from mmcot.files import read_json

logger = logging.getLogger(__name__)

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
        "subject": _TEXT,
        "grade": _TEXT,
        "topic": _TEXT,
        "category": _TEXT,
        "skill": _TEXT,
        "split": _TEXT,
    }
)
GOLD_COLUMNS = ("answer", "lecture", "solution")
SPLITS = ("train", "val", "test")


def load_problems(source: str, split: str) -> datasets.Dataset:
    """
    Args:
        source: `demo`, a ScienceQA folder (`problems.json`, `pid_splits.json`, `images/SPLIT/ID/image.png`, perhaps
            `captions.json`), or a `.jsonl` / `.parquet` file of rows.
        split: `train`, `val` or `test`.

    Raises:
        ValueError: what is wrong with the source, by file or id, field, what was found and what was expected.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}.")
    path = Path(source)
    if source == "demo":
        from mmcot.demo import generate

        return datasets.Dataset.from_generator(generate, gen_kwargs={"split": split}, features=FEATURES)
    if path.is_dir():
        rows = scienceqa_rows(path, split)
    elif path.suffix in (".jsonl", ".parquet"):
        rows = table_rows(path, split)
    else:
        raise ValueError(
            f"dataset is {source!r}; expected demo, a ScienceQA folder, or a .jsonl or .parquet file of problems."
        )
    return datasets.Dataset.from_list(checked(rows, source), features=FEATURES)


def scienceqa_rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    for name in ("problems.json", "pid_splits.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; expected a ScienceQA folder.")
    problems = read_json(folder / "problems.json")
    ids = read_json(folder / "pid_splits.json")[split]
    captions_file = folder / "captions.json"
    captions = read_json(captions_file)["captions"] if captions_file.is_file() else {}
    absent = [problem_id for problem_id in ids if problem_id not in problems]
    if absent:
        logger.warning("%s: %d of %d %s problems are not in problems.json", folder, len(absent), len(ids), split)
    for problem_id in ids:
        if problem_id in problems:
            problem = problems[problem_id]
            picture = folder / "images" / split / problem_id / "image.png"
            yield {
                **{name: problem[name] for name in problem.keys() & FEATURES.keys()},
                "id": problem_id,
                "context": problem.get("hint", ""),
                "images": [str(picture)] if problem.get("image") else [],
                "caption": captions.get(problem_id, ""),
            }


def table_rows(file: Path, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a file; one without `split` serves every split, one with it gives the rows of that split."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file.")
    rows = jsonl_rows(file) if file.suffix == ".jsonl" else datasets.Dataset.from_parquet(str(file)).to_list()
    for number, row in enumerate(rows):
        for name in row.keys() - FEATURES.keys():
            near = difflib.get_close_matches(name, FEATURES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{file}, row {number + 1}: unknown column {name!r}{hint}; known: {', '.join(FEATURES)}.")
        if row.get("split") not in (None, *SPLITS):
            raise ValueError(
                f"{file}, row {number + 1}: split is {row['split']!r}; expected one of {', '.join(SPLITS)}."
            )
        if row.get("split") in (None, split):
            images = [resolved(picture, file.parent) for picture in row.get("images") or []]
            yield {"id": f"{split}-{number}", **row, "images": images, "split": split}


def jsonl_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not valid JSON ({error.msg}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: a problem is a JSON object; found {type(row).__name__}.")
            yield row


def resolved(picture: Any, folder: Path) -> Any:
    """A picture's path relative to the file that names it; bytes as they are."""
    if isinstance(picture, str):
        return str(folder / picture)
    if isinstance(picture, dict) and picture.get("bytes") is None and picture.get("path"):
        return str(folder / picture["path"])
    return picture


def checked(rows: Iterator[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """The rows with every column of the schema; the first bad one is an error that says where and what."""
    complete, ids = [], set()
    for row in rows:
        row = {name: row.get(name) if row.get(name) is not None else empty(name) for name in FEATURES}
        row["id"] = str(row["id"])
        where = f"{source}, problem {row['id']}"
        if row["id"] in ids:
            raise ValueError(f"{where}: this id stands there twice; expected one problem per id.")
        ids.add(row["id"])
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise ValueError(f"{where}: question is {row['question']!r}; expected a text.")
        choices, answer = row["choices"], row["answer"]
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"{where}: choices is {choices!r}; expected a list of texts.")
        if not isinstance(answer, int) or (answer != -1 and choices and not 0 <= answer < len(choices)):
            raise ValueError(
                f"{where}: answer is {answer!r}; expected an index from 0 to {len(choices) - 1}, or -1 for unknown."
            )
        row["images"] = [on_disk(picture, where) for picture in row["images"]]
        complete.append(row)
    return complete


def empty(column: str) -> Any:
    return {"choices": [], "images": [], "answer": -1}.get(column, "")


def on_disk(picture: Any, where: str) -> dict[str, Any]:
    """A picture as the schema holds it; one on disk must be there and not be empty, and is not read."""
    if isinstance(picture, dict) and picture.get("bytes"):
        return {"bytes": picture["bytes"], "path": picture.get("path")}
    if not isinstance(picture, str):
        raise ValueError(f'{where}: images holds {picture!r}; expected paths or {{"bytes", "path"}}.')
    if not Path(picture).is_file():
        raise ValueError(f"{where}: picture {picture} is missing.")
    if Path(picture).stat().st_size == 0:
        raise ValueError(f"{where}: picture {picture} is an empty file.")
    return {"bytes": None, "path": picture}


def without_gold(problems: datasets.Dataset) -> datasets.Dataset:
    """The problems as they may be shown to a model that answers them."""
    return problems.remove_columns([name for name in GOLD_COLUMNS if name in problems.column_names])


def require_answers(problems: datasets.Dataset) -> None:
    """For training and scoring: every problem has choices and a known answer."""
    for problem_id, choices, answer in zip(problems["id"], problems["choices"], problems["answer"], strict=True):
        if not choices:
            raise ValueError(f"problem {problem_id}: choices is empty; training and scoring need at least one choice.")
        if not 0 <= answer < len(choices):
            raise ValueError(
                f"problem {problem_id}: answer is {answer}; training and scoring need an index from 0 to "
                f"{len(choices) - 1}."
            )


def read_pictures(problem: dict[str, Any]) -> list[Image.Image]:
    """The problem's pictures, decoded to the end, as RGB."""
    return [read_picture(picture, problem["id"]) for picture in problem["images"]]


def read_picture(picture: dict[str, Any], problem_id: str) -> Image.Image:
    where = f"problem {problem_id}: picture {picture['path'] or 'given as bytes'}"
    try:
        return datasets.Image(mode="RGB").decode_example(picture)
    except FileNotFoundError as error:
        raise ValueError(f"{where} is missing.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{where} is not an image that Pillow can read.") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{where} cannot be decoded to its end ({error}); expected a whole image file.") from error


def check_pictures(problems: datasets.Dataset) -> None:
    """Decode every picture once, so that a bad one is found before a long run and not in its middle."""
    columns = problems.select_columns(["id", "images"])
    for problem in tqdm(columns, desc="checking pictures", leave=False):
        read_pictures(problem)


def join_column(problems: datasets.Dataset, column: str, path: str) -> datasets.Dataset:
    """The problems with a text column from a JSON file `{id: text}`, which must have every problem's id."""
    texts = read_json(path)
    absent = [problem_id for problem_id in problems["id"] if not isinstance(texts.get(problem_id), str)]
    if absent:
        raise ValueError(
            f"{path}: {len(absent)} of {len(problems)} problems have no text there ({', '.join(absent[:5])}, …)."
        )
    if column in problems.column_names:
        problems = problems.remove_columns(column)
    return problems.add_column(column, [texts[problem_id] for problem_id in problems["id"]])
