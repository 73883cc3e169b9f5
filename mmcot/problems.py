"""Sources of problems -> `datasets.Dataset` of the one schema, and the checks that a run makes before it starts.

Pictures stay on disk (`pictures.py` reads them). Nothing here knows the model, templates or stages.
"""

import difflib
import hashlib
import inspect
import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from PIL import Image
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
Picture = tuple[str, dict[str, Any], str]  # its content's key, itself, and the first problem that shows it
SPLITS = ("train", "val", "test")


def load_problems(source: str, split: str, max_images: int | None = None, pictures: bool = True) -> datasets.Dataset:
    """
    Args:
        source: `demo`, or `demo:2` and so on for a harder one (`demo.generate`), a ScienceQA folder (`problems.json`,
            `pid_splits.json`, `images/SPLIT/ID/image.png`, perhaps `captions.json`), or a `.jsonl` / `.parquet` file of
            rows.
        split: `train`, `val` or `test`.
        max_images: the most pictures of a problem. Of ScienceQA's (`image.png`, then its choices' `choice_0.png` and so
            on) the first so many are taken: with 1 what the original takes. More in a row of a file are an error.
        pictures: whether the pictures' files must be there.

    Raises:
        ValueError: what is wrong with the source, by file or id, field, what was found and what was expected.
    """
    check_split(split, source)
    if source == "demo" or source.startswith("demo:"):
        return demo_problems(source, split)
    path = Path(source)
    if path.is_dir():
        rows, folder = scienceqa_rows(path, split, max_images), path
    elif path.suffix in TABLE_READERS:
        rows, folder = table_rows(path, split), path.parent
    else:
        raise ValueError(
            f"dataset is {source!r}; expected demo, a ScienceQA folder, or a .jsonl or .parquet file of problems."
        )
    complete = checked(rows, source, folder if pictures else None, max_images)
    # By column, because Dataset.from_list fails where a split has no rows.
    return datasets.Dataset.from_dict({name: [row[name] for row in complete] for name in FEATURES}, features=FEATURES)


def demo_problems(source: str, split: str) -> datasets.Dataset:
    from mmcot import demo

    difficulty = source.partition(":")[2] or "1"
    if difficulty not in map(str, range(1, 10)):
        raise ValueError(f"dataset is {source!r}; the difficulty of demo is a number from 1 to 9.")
    drawn = {"split": split, "difficulty": int(difficulty)}
    # datasets knows a generator by its name alone, and would serve what an older demo.py drew.
    version = datasets.fingerprint.Hasher.hash((inspect.getsource(demo), drawn))
    return datasets.Dataset.from_generator(demo.generate, gen_kwargs=drawn, features=FEATURES, fingerprint=version)


def scienceqa_rows(folder: Path, split: str, max_images: int | None) -> Iterator[dict[str, Any]]:
    problems_file, splits_file = folder / "problems.json", folder / "pid_splits.json"
    captions_file = folder / "captions.json"
    for file in (problems_file, splits_file):
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}; expected a ScienceQA folder.")
    problems = read_json(problems_file)
    ids = member(read_json(splits_file), split, list, splits_file)
    captions = member(read_json(captions_file), "captions", dict, captions_file) if captions_file.is_file() else {}
    present = [problem_id for problem_id in ids if problem_id in problems]
    if len(present) < len(ids):
        absent = len(ids) - len(present)
        logger.warning("%s: %d of %d %s problems are not in problems.json", folder, absent, len(ids), split)
    for problem_id in present:
        problem = member(problems, problem_id, dict, problems_file)
        check_split(problem.get("split", split), f"{folder}, problem {problem_id}")
        yield {
            **{name: problem[name] for name in problem.keys() & FEATURES.keys()},
            "id": problem_id,
            "context": problem.get("hint"),
            "images": scienceqa_pictures(folder, problem, f"images/{split}/{problem_id}")[:max_images],
            "caption": captions.get(problem_id),
            "split": split,
        }


def scienceqa_pictures(folder: Path, problem: dict[str, Any], pictures: str) -> list[str]:
    """The question's picture, if it has one, then those of its choices."""
    question = [f"{pictures}/image.png"] if problem.get("image") else []
    names = (f"{pictures}/choice_{number}.png" for number in range(len(problem.get("choices") or [])))
    return [*question, *(name for name in names if (folder / name).is_file())]


def member(data: dict[str, Any], name: str, kind: type, file: Path) -> Any:
    value = data.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{file}: {name!r} is {shown(value)}; expected a {kind.__name__}.")
    return value


def table_rows(file: Path, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a file; one without `split` serves every split, one with it gives the rows of that split."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file.")
    for number, row in enumerate(TABLE_READERS[file.suffix](file)):
        where = f"{file}, row {number + 1}"
        for name in row.keys() - FEATURES.keys():
            near = difflib.get_close_matches(name, FEATURES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{where}: unknown column {name!r}{hint}; known: {', '.join(FEATURES)}.")
        row = {name: value for name, value in row.items() if value is not None}
        check_split(row.get("split", split), where)
        if row.get("split", split) == split:
            yield {"id": f"{split}-{number}", "split": split, **row}


def jsonl_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{file}, line {number}: not valid JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: found {shown(row)}; expected a problem as a JSON object.")
            yield row


def parquet_rows(file: Path) -> list[dict[str, Any]]:
    try:
        return pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a whole Parquet file ({error}).") from error


TABLE_READERS = {".jsonl": jsonl_rows, ".parquet": parquet_rows}


def checked(
    rows: Iterable[dict[str, Any]], source: str, folder: Path | None, max_images: int | None
) -> list[dict[str, Any]]:
    """
    The rows with every column of the schema; the first bad one is an error that says where and what. Pictures are
    looked for in `folder`, where there is one.
    """
    complete, ids = [], set()
    for row in rows:
        row = {name: empty(name) if row.get(name) is None else row[name] for name in FEATURES}
        row["id"] = str(row["id"])
        where = f"{source}, problem {row['id']}"
        if row["id"] in ids:
            raise ValueError(f"{where}: this id stands there twice; expected one problem per id.")
        ids.add(row["id"])
        check_fields(row, where)
        if max_images is not None and len(row["images"]) > max_images:
            raise ValueError(
                f"{where}: images holds {len(row['images'])} pictures; max_images is {max_images}. Raise it "
                f"(--max_images) or leave pictures out."
            )
        row["images"] = [stored(picture, folder, where) for picture in row["images"]]
        complete.append(row)
    return complete


def empty(column: str) -> Any:
    return {"choices": [], "images": [], "answer": -1}.get(column, "")


def check_split(split: Any, where: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"{where}: split is {shown(split)}; expected one of {', '.join(SPLITS)}.")


def check_fields(row: dict[str, Any], where: str) -> None:
    choices, answer = row["choices"], row["answer"]
    for name in FEATURES:
        if FEATURES[name] == _TEXT and not isinstance(row[name], str):
            raise ValueError(f"{where}: {name} is {shown(row[name])}; expected a text.")
    if not row["question"].strip():
        raise ValueError(f"{where}: question is {row['question']!r}; expected a text that is not empty.")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: choices is {shown(choices)}; expected a list of texts.")
    # bool is an int to Python, and an answer `true` is not choice 1.
    if type(answer) is not int or (answer != -1 and choices and not 0 <= answer < len(choices)):
        indices = f"an index from 0 to {len(choices) - 1}, or " if choices else ""
        raise ValueError(f"{where}: answer is {shown(answer)}; expected {indices}-1 for unknown.")
    if not isinstance(row["images"], list):
        raise ValueError(f"{where}: images is {shown(row['images'])}; expected a list of pictures.")


def stored(picture: Any, folder: Path | None, where: str) -> dict[str, Any]:
    """A picture as the schema holds it. A file must be there and not be empty (with a folder), and is not read."""
    picture = {"path": picture} if isinstance(picture, str) else picture
    if isinstance(picture, dict) and picture.get("bytes") and isinstance(picture["bytes"], bytes):
        # Without their path: datasets would take what lies there, seen from this process, instead of the bytes.
        return {"bytes": picture["bytes"], "path": None}
    if not isinstance(picture, dict) or picture.get("bytes") or not isinstance(picture.get("path"), str):
        raise ValueError(f'{where}: images holds {shown(picture)}; expected paths or {{"bytes", "path"}}.')
    if folder is None:
        return {"bytes": None, "path": picture["path"]}
    path = folder / picture["path"]
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


def content_key(picture: dict[str, Any]) -> str:
    """What tells a picture from others: the SHA-256 of its file."""
    return hashlib.sha256(picture["bytes"] or Path(picture["path"]).read_bytes()).hexdigest()


class ContentKeys:
    """The pictures' keys, of each file read once."""

    def __init__(self):
        self.by_path: dict[str, str] = {}

    def __call__(self, picture: dict[str, Any]) -> str:
        path = picture["path"]
        if path is None:
            return content_key(picture)
        if path not in self.by_path:
            self.by_path[path] = content_key(picture)
        return self.by_path[path]


def distinct_pictures(problems: datasets.Dataset, first_only: bool = False) -> list[Picture]:
    """Each picture once, in the order of the problems."""
    found: dict[str, Picture] = {}
    for problem in tqdm(problems.select_columns(["id", "images"]), desc="reading pictures", leave=False):
        for picture in problem["images"][: 1 if first_only else None]:
            key = content_key(picture)
            found.setdefault(key, (key, picture, problem["id"]))
    return list(found.values())


def aspect_ratio(picture: dict[str, Any]) -> float:
    """Width / height as the file's header says; 0 where that cannot be read."""
    try:
        with Image.open(io.BytesIO(picture["bytes"]) if picture["bytes"] else picture["path"]) as opened:
            return opened.width / opened.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0.0


def join_captions(problems: datasets.Dataset, path: str) -> datasets.Dataset:
    """The problems with their captions from a `captions.json`; every problem with a picture must have one there."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; expected a captions.json.")
    captions = member(read_json(Path(path)), "captions", dict, Path(path))
    rows = problems.select_columns(["id", "images"])
    absent = [row["id"] for row in rows if row["images"] and not isinstance(captions.get(row["id"]), str)]
    if absent:
        raise ValueError(f"{path}: {len(absent)} problems with a picture have no caption there: {first_few(absent)}.")
    return with_column(problems, "caption", [captions.get(problem_id) or "" for problem_id in problems["id"]])


def join_column(problems: datasets.Dataset, column: str, path: str) -> datasets.Dataset:
    """The problems with a text column from a JSON file `{id: text}`, which must have every problem's id."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; expected JSON of the form {{id: text}}.")
    texts = read_json(path)
    absent = [problem_id for problem_id in problems["id"] if not isinstance(texts.get(problem_id), str)]
    if absent:
        raise ValueError(f"{path}: {len(absent)} of {len(problems)} problems have no text there: {first_few(absent)}.")
    return with_column(problems, column, [texts[problem_id] for problem_id in problems["id"]])


def with_column(problems: datasets.Dataset, column: str, texts: list[str]) -> datasets.Dataset:
    """The problems with these texts in that column, whether they have it or not."""
    if column in problems.column_names:
        problems = problems.remove_columns(column)
    return problems.add_column(column, texts, feature=_TEXT)
